"""Torch networks of the user's own: a module that an importable callable makes, and its weights in safetensors."""

from __future__ import annotations

import hashlib
import importlib
import inspect
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from cluster.errors import UserError
from jobs.oodface.faces.config import Detection, OwnFace
from jobs.oodface.faces.inputs import configured
from jobs.oodface.faces.weights import sha256
from jobs.oodface.faces.yunet import Candidates

# Of a face in a detector's table: left, top, right, bottom, score, and x and y of five landmarks.
_COLUMNS = 15
_TRIED = 64  # px, the side of the picture that a detector is tried on


class TorchNetwork:
    """The module of an `OwnFace` with a factory, for crops in [0, 1].

    size: height and width of the images that the module gets, px.
    version: SHA-256 over its weights and the source file of its factory.
    """

    def __init__(self, face: OwnFace, crop_size: tuple[int, int]) -> None:
        """Makes the module, fills it, and tries it on two black images.

        Raises:
            UserError: the factory cannot be imported or called, the file is missing, no safetensors or holds other
                weights, or what comes out is no embedding an image.
        """
        self.face, self.size, self.dtype = face, face.size or crop_size, torch.float32
        self.module, self.version = _made(face.factory or "", face.options, Path(face.path))
        output = _first(_tried(self.module, torch.zeros(2, 3, *self.size), face.factory))
        told = tuple(output.shape) if isinstance(output, Tensor) else type(output).__name__
        if not isinstance(output, Tensor) or output.ndim < 2 or len(output) != 2 or output[0].numel() < 2:
            raise UserError(
                f"{face.factory} gives {told} for two images, which is no embedding an image; name a factory whose "
                "module gives a tensor (batch, dim), alone or first"
            )

    def to(self, device: torch.device | str, dtype: torch.dtype) -> TorchNetwork:
        """Moves the module."""
        self.module.to(device, dtype)
        self.dtype = dtype
        return self

    def __call__(self, crops: Float[Tensor, "batch 3 height width"]) -> Float[Tensor, "batch dim"]:
        """Raw embeddings of crops, RGB in [0, 1]."""
        return _first(self.module(configured(crops, self.face, self.size).to(self.dtype))).flatten(1)


class OwnDetector(nn.Module):
    """The module of a `Detection` with a factory.

    It takes RGB images in [0, 1], (batch, 3, height, width) with sides that are multiples of 32 px, and gives a table
    (faces, 15) an image: left, top, right, bottom and landmarks in px of that image, in the order of `detector.Face`,
    with the score in [0, 1] as fifth column. Faces below the threshold or told twice may be among them.
    """

    def __init__(self, dials: Detection) -> None:
        """Makes the module, fills it, and tries it on two black images.

        Raises:
            UserError: as of `TorchNetwork`, or what comes out are no such tables.
        """
        super().__init__()
        self.factory = dials.factory
        self.module, self.version = _made(dials.factory or "", dials.options, Path(dials.path or ""))
        _tried(self, torch.zeros(2, 3, _TRIED, _TRIED), dials.factory)

    def forward(self, images: Float[Tensor, "batch 3 height width"]) -> Candidates:
        """Faces as the module tells them; where an image has fewer than another, the rest have a score of -1."""
        tables = self.module(images)
        told = [tuple(one.shape) if isinstance(one, Tensor) else type(one).__name__ for one in tables]
        if len(told) != len(images) or any(not isinstance(one, tuple) or one[1:] != (_COLUMNS,) for one in told):
            raise UserError(
                f"{self.factory} gives {told} for {len(images)} images, where each wants a table of shape "
                f"(faces, {_COLUMNS}); docs/oodface.md says what its columns are"
            )
        filled = nn.utils.rnn.pad_sequence([one.float() for one in tables], batch_first=True, padding_value=-1.0)
        return Candidates(filled[..., :4], filled[..., 4], filled[..., 5:].unflatten(-1, (5, 2)))


def _made(factory: str, options: Mapping[str, Any], path: Path) -> tuple[nn.Module, str]:
    """The filled module, ready to infer, and its version."""
    make = _imported(factory)
    try:
        module = make(**options)
    except Exception as error:  # foreign code fails with whatever comes up
        raise UserError(f"{factory} cannot be called with options {dict(options)} ({_reason(error)})") from None
    if not isinstance(module, nn.Module):
        raise UserError(f"{factory} makes a {type(module).__name__}; name one that makes a torch.nn.Module")
    _fill(module, path, factory)
    return module.eval().requires_grad_(False), _version(make, path)


def _imported(factory: str) -> Any:
    module, _, name = factory.partition(":")
    try:
        found = getattr(importlib.import_module(module), name, None)
    except ModuleNotFoundError as error:
        raise UserError(
            f"{factory} needs the module {error.name}, which is missing; install its package, or put the folder that "
            "holds it on PYTHONPATH"
        ) from None
    except Exception as error:  # foreign code fails with whatever comes up
        raise UserError(f"{factory}: the module {module} cannot be imported ({_reason(error)})") from None
    if not callable(found):
        raise UserError(f"the module {module} has nothing to call by the name {name}; check the factory {factory}")
    return found


def _fill(module: nn.Module, path: Path, factory: str) -> None:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        weights = load_file(path)
    except FileNotFoundError:
        raise UserError(f"there is no file {path}; check the path of the weights") from None
    except (SafetensorError, OSError) as error:
        raise UserError(f"{path} is no safetensors file ({_reason(error)}); save the weights again") from None
    try:
        missing, foreign = module.load_state_dict(weights, strict=False)
    except RuntimeError as error:
        raise UserError(
            f"{path} does not hold the weights of {factory} ({_reason(error, line=1)}); check file and options"
        ) from None
    missing = [name for name in missing if not name.endswith("num_batches_tracked")]  # which only training reads
    both = (missing, "is missing"), (foreign, "is not among its weights")
    told = [f"{names[0]} {what}, {len(names)} in all" for names, what in both if names]
    if told:
        raise UserError(f"{path} does not hold the weights of {factory}: {'; '.join(told)}; check file and options")


def _version(make: Any, path: Path) -> str:
    parts = [sha256(path)]
    try:
        source = inspect.getsourcefile(inspect.unwrap(make))
    except TypeError:  # made in C, or by an object
        source = None
    parts += [sha256(Path(source))] if source else []
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()


@torch.no_grad()
def _tried(module: nn.Module, images: Tensor, factory: str | None) -> Any:
    try:
        return module(images)
    except UserError:
        raise
    except Exception as error:  # foreign code fails with whatever comes up
        height, width = images.shape[2:]
        raise UserError(
            f"{factory} fails on two images of {height}x{width} px ({_reason(error)}); check its size and options"
        ) from None


def _first(output: Any) -> Any:
    return output[0] if isinstance(output, tuple | list) and output else output


def _reason(error: Exception, line: int = 0) -> str:
    lines = str(error).strip().splitlines() or [type(error).__name__]
    return lines[min(line, len(lines) - 1)].strip()
