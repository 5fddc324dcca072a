"""Any embedding model in an ONNX file, run by onnxruntime."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from cluster.errors import UserError
from jobs.oodface.faces.config import OwnFace
from jobs.oodface.faces.inputs import configured
from jobs.oodface.faces.weights import reason

if TYPE_CHECKING:
    from onnx import GraphProto, TensorProto
    from onnxruntime import InferenceSession

_CUDA = "CUDAExecutionProvider"
logger = logging.getLogger(__name__)


class OnnxNetwork:
    """The network of an `OwnFace` without a factory, called like a torch module.

    What the file says is not asked for: whether channels stand before or behind the pixels, the size of its images and
    how many it takes at once. Pixels and embeddings pass through the CPU's memory.

    path: the file. data: those beside it that hold its weights, as torch.onnx.export writes them.
    size: height and width of the images that the network gets, px.
    images_at_once: how many one pass takes; None for any number.
    """

    def __init__(self, face: OwnFace, crop_size: tuple[int, int], threads: int | None = None) -> None:
        """Reads the file, and tries it on a black image.

        Args:
            face: what the user says about it.
            crop_size: height and width of crops, px; the network gets them so where neither `face` nor the file says
                another size.
            threads: of processors, where these compute; None for as many as torch has.

        Raises:
            UserError: no onnxruntime, no such file or one that it needs, no model that turns an image into an
                embedding, or a size against the file's.
        """
        self.face, self.threads = face, threads
        self.path = Path(face.path).expanduser()
        self.data = _data(self.path)
        self.session = _session(self.path, "cpu", threads)
        shape = self._input_shape()
        self.images_at_once = shape[0] if isinstance(shape[0], int) else None
        self.channels_last = shape[1] != 3
        self.size = self._input_size(shape[1:3] if self.channels_last else shape[2:], crop_size)
        self._try()

    def to(self, device: torch.device | str, dtype: torch.dtype) -> OnnxNetwork:
        """On a CUDA device onnxruntime computes there where its build can, else on the CPU; the file says the dtype."""
        if torch.device(device).type == "cuda":
            self.session = _session(self.path, "cuda", self.threads)
        return self

    def __call__(self, crops: Float[Tensor, "batch 3 height width"]) -> Float[Tensor, "batch dim"]:
        """Raw embeddings, float32 on the device of the crops; these are RGB in [0, 1] and at least one."""
        pixels = self._pixels(crops)
        step = self.images_at_once or len(pixels)
        parts = [self._pass(pixels[start : start + step]) for start in range(0, len(pixels), step)]
        return torch.from_numpy(np.concatenate(parts)).to(crops.device)

    def _input_shape(self) -> list[int | str | None]:
        inputs = self.session.get_inputs()
        shape = inputs[0].shape
        if len(inputs) > 1 or inputs[0].type != "tensor(float)" or len(shape) != 4 or 3 not in (shape[1], shape[3]):
            told = ", ".join(f"{found.name} {found.type} {found.shape}" for found in inputs[:3])
            raise UserError(
                f"{self.path} must take float32 images of 3 channels and nothing else, but takes {told}; "
                "export the embedding network alone"
            )
        return shape

    def _input_size(self, own: list[int | str | None], crop_size: tuple[int, int]) -> tuple[int, int]:
        wanted = self.face.size or crop_size
        height, width = (said if isinstance(said, int) else side for said, side in zip(own, wanted, strict=True))
        if self.face.size not in (None, (height, width)):
            raise UserError(
                f"{self.path} takes images of {height}x{width} px, and the size of {self.face.name} is set to "
                f"{wanted[0]}x{wanted[1]}; leave size out"
            )
        return height, width

    def _try(self) -> None:
        try:
            shape = self(torch.zeros(2, 3, *self.size)).shape
        except Exception as error:  # onnxruntime meets a foreign graph with whatever comes up
            raise UserError(f"{self.path} cannot embed two images ({reason(error)}); export the model again") from None
        if len(shape) != 2 or shape[0] != 2 or shape[1] < 2:
            raise UserError(
                f"the first output of {self.path} has the shape {tuple(shape)} for two images, which is no embedding "
                "an image; export the embedding as the first output"
            )

    def _pixels(self, crops: Tensor) -> np.ndarray:
        pixels = configured(crops, self.face, self.size).cpu().numpy()
        return np.ascontiguousarray(pixels.transpose(0, 2, 3, 1)) if self.channels_last else pixels

    def _pass(self, pixels: np.ndarray) -> np.ndarray:
        """A file made for a number of images gets that many, the missing ones black."""
        missing = (self.images_at_once or len(pixels)) - len(pixels)
        batch = np.pad(pixels, ((0, missing), (0, 0), (0, 0), (0, 0)))
        output = self.session.run(None, {self.session.get_inputs()[0].name: batch})[0]
        return output.reshape(len(output), -1)[: len(pixels)].astype(np.float32)


def _data(path: Path) -> list[Path]:
    """The files that a model's weights are kept in beside its own, by name."""
    import onnx

    try:
        model = onnx.load(path, load_external_data=False)
    except Exception:  # a file that is none, or missing: told by onnxruntime, which knows more formats
        return []
    external = [tensor for tensor in _tensors(model.graph) if tensor.data_location == onnx.TensorProto.EXTERNAL]
    names = {entry.value for tensor in external for entry in tensor.external_data if entry.key == "location"}
    files = [path.parent / name for name in sorted(names)]
    for file in files:
        if not file.is_file():
            raise UserError(f"{path} keeps weights in {file}, which is missing; put that file there too")
    return files


def _tensors(graph: GraphProto) -> Iterator[TensorProto]:
    """Initialisers and constants, those of inner graphs too."""
    yield from graph.initializer
    for attribute in (one for node in graph.node for one in node.attribute):
        yield from (attribute.t, *attribute.tensors)
        for inner in (attribute.g, *attribute.graphs):
            yield from _tensors(inner)


def _session(path: Path, device: str, threads: int | None) -> InferenceSession:
    try:
        import onnxruntime
    except ModuleNotFoundError:
        raise UserError(f"{path} needs the package onnxruntime, which is missing; run `make env`") from None
    if not path.is_file():
        raise UserError(f"there is no file {path}; check the path of the ONNX model")
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads or torch.get_num_threads()
    options.log_severity_level = 3  # else it warns of every initialiser that is listed as an input
    providers: list[str | tuple[str, dict[str, str]]] = ["CPUExecutionProvider"]
    if device == "cuda" and _CUDA in onnxruntime.get_available_providers():
        providers.insert(0, (_CUDA, {"use_tf32": "0"}))  # whose ten bits would move embeddings, as in torch
    elif device == "cuda":
        _warn(options.intra_op_num_threads)
    try:
        return onnxruntime.InferenceSession(path, options, providers=providers)
    except Exception as error:  # onnxruntime meets a foreign file with whatever comes up
        raise UserError(f"onnxruntime cannot load {path} ({reason(error)}); export the model again") from None


@lru_cache
def _warn(threads: int) -> None:
    """Once a process, not once a model."""
    logger.warning(
        "ONNX models run on %d threads of processors, not on the GPU: this build of onnxruntime has no %s; put the "
        "package onnxruntime-gpu in its place to use the GPU",
        threads,
        _CUDA,
    )
