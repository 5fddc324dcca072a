"""Weights of an ONNX file, layer by layer in the order of its graph; block-quantised ones as the numbers they mean."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from cluster.errors import UserError

if TYPE_CHECKING:
    from onnx import ModelProto, NodeProto


@dataclass(frozen=True)
class Layer:
    """A node of the graph: its operator, its constant inputs in order, its attributes."""

    kind: str
    constants: tuple[Tensor, ...]
    attributes: dict[str, object]


def read_layers(path: Path, kinds: Collection[str]) -> list[Layer]:
    """The nodes whose operator is in `kinds`, in graph order.

    Initialisers that pass through DequantizeLinear and Reshape count as constants of the node that takes the result.

    Raises:
        UserError: no package onnx; the file is missing, no ONNX, or its constants do not fit together.
    """
    graph = _parsed(path).graph
    from onnx.helper import get_attribute_value
    from onnx.numpy_helper import to_array

    try:
        values = {tensor.name: to_array(tensor) for tensor in graph.initializer}
        layers = []
        for node in graph.node:
            attributes = {attribute.name: get_attribute_value(attribute) for attribute in node.attribute}
            if node.op_type in kinds:
                constants = tuple(torch.tensor(values[name]) for name in node.input if name in values)
                layers.append(Layer(node.op_type, constants, attributes))
            elif (value := _folded(node, values, attributes)) is not None:
                values[node.output[0]] = value
    except (KeyError, ValueError, TypeError, IndexError) as error:
        raise UserError(f"{path} holds weights that do not fit together ({error}); get the file again") from error
    return layers


def require_layers(layers: Sequence[Layer], expected: Sequence[tuple[str, int]], path: Path) -> None:
    """Raises UserError unless the layers have these operators and numbers of constants, in this order."""
    if [(layer.kind, len(layer.constants)) for layer in layers] != list(expected):
        raise UserError(f"{path} holds another network: its layers are not those expected; name the right file")


def _parsed(path: Path) -> ModelProto:
    try:
        import onnx
        from google.protobuf.message import DecodeError
    except ModuleNotFoundError:
        raise UserError(f"{path} needs the package onnx, which is missing; run `make env`") from None
    try:
        return onnx.load_model(path, load_external_data=False)
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}; check the path") from None
    except DecodeError:
        raise UserError(f"{path} is no ONNX file, or a damaged one; get the file again") from None


def _folded(node: NodeProto, values: dict[str, np.ndarray], attributes: dict[str, object]) -> np.ndarray | None:
    """What the node makes of constants; None where it depends on the image or is of another kind."""
    if node.op_type == "DequantizeLinear":
        return _dequantised(*(values[name] for name in node.input), **attributes)
    if node.op_type == "Reshape" and all(name in values for name in node.input):
        return values[node.input[0]].reshape(values[node.input[1]])
    return None


def _dequantised(quantised: np.ndarray, scale: np.ndarray, zero: np.ndarray, axis: int, block_size: int) -> np.ndarray:
    """(q - zero) * scale, each scale holding for `block_size` neighbours along `axis`; the last block may be short."""
    count = quantised.shape[axis]

    def spread(blocks: np.ndarray) -> np.ndarray:
        return blocks.repeat(block_size, axis).take(np.arange(count), axis)

    # In integers the difference of two int8 values would wrap around.
    return (quantised.astype(np.float32) - spread(zero).astype(np.float32)) * spread(scale)
