"""Torch networks of the user's own: a module that an importable callable makes, and its weights in safetensors."""

from __future__ import annotations

import hashlib
import importlib
import inspect
import sys
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from cluster.errors import UserError
from jobs.oodface.faces.config import Detection, OwnFace
from jobs.oodface.faces.inputs import configured
from jobs.oodface.faces.weights import reason, sha256
from jobs.oodface.faces.yunet import Candidates

# Of a face in a detector's table: left, top, right, bottom, score, and x and y of five landmarks.
_COLUMNS = 15


class TorchNetwork:
    """The module of an `OwnFace` with a factory, for crops in [0, 1].

    size: height and width of the images that the module gets, px.
    version: SHA-256 over its weights and the source of its factory.
    """

    def __init__(self, face: OwnFace, crop_size: tuple[int, int]) -> None:
        """Makes the module and fills it; `to` tries it.

        Raises:
            UserError: the factory cannot be imported or called, the file is missing, no safetensors or holds other
                weights.
        """
        self.face, self.size, self.dtype = face, face.size or crop_size, torch.float32
        self.module, self.version = _made(face.factory or "", face.options, Path(face.path))

    @torch.no_grad()
    def to(self, device: torch.device | str, dtype: torch.dtype) -> TorchNetwork:
        """Moves the module, and tries it there on two black images.

        Raises:
            UserError: it fails, or what comes out is no embedding an image.
        """
        self.module.to(device, dtype)
        self.dtype = dtype
        output = self._output(torch.zeros(2, 3, *self.size, device=device))
        told = tuple(output.shape) if isinstance(output, Tensor) else type(output).__name__
        if not isinstance(told, tuple) or len(told) < 2 or told[0] != 2 or told[1] < 2 or output[0].numel() != told[1]:
            raise UserError(
                f"{self.face.factory} gives {told} for two images, which is no embedding an image; name a factory "
                "whose module gives a tensor (batch, dim), alone or first"
            )
        return self

    def __call__(self, crops: Float[Tensor, "batch 3 height width"]) -> Float[Tensor, "batch dim"]:
        """Raw embeddings of crops, RGB in [0, 1].

        Raises:
            UserError: the module fails.
        """
        # a module that squeezes its output gives (dim,) for one image
        return self._output(crops).reshape(len(crops), -1)

    def _output(self, crops: Tensor) -> Any:
        output = _called(self.module, configured(crops, self.face, self.size).to(self.dtype), self.face.factory)
        return output[0] if isinstance(output, tuple | list) and output else output


class OwnDetector(nn.Module):
    """The module of a `Detection` with a factory.

    It takes RGB images in [0, 1], (batch, 3, height, width) with sides that are multiples of 32 px, and gives a table
    (faces, 15) an image: left, top, right, bottom and landmarks in px of that image, in the order of `detector.Face`,
    with the score in [0, 1] as fifth column. Faces below the threshold or told twice may be among them.
    """

    def __init__(self, dials: Detection) -> None:
        """Makes the module and fills it; as `TorchNetwork`."""
        super().__init__()
        self.factory, self.threshold = dials.factory, dials.threshold
        self.module, self.version = _made(dials.factory or "", dials.options, Path(dials.path or ""))

    def forward(self, images: Float[Tensor, "batch 3 height width"]) -> Candidates:
        """Faces as the module tells them; where an image has fewer than another, the rest have a score of -1.

        Raises:
            UserError: the module fails, or tells no such tables.
        """
        tables = _called(self.module, images, self.factory)
        if not isinstance(tables, tuple | list | Tensor):
            tables = [tables]
        told = [tuple(one.shape) if isinstance(one, Tensor) else type(one).__name__ for one in tables]
        if len(told) != len(images) or any(not isinstance(one, tuple) or one[1:] != (_COLUMNS,) for one in told):
            raise UserError(
                f"{self.factory} gives {told} for {len(images)} images, where each wants a torch tensor of shape "
                f"(faces, {_COLUMNS}); docs/oodface.md says what its columns are"
            )
        filled = nn.utils.rnn.pad_sequence([one.float() for one in tables], batch_first=True, padding_value=-1.0)
        self._require_faces(filled[filled[..., 4] >= self.threshold])
        return Candidates(filled[..., :4], filled[..., 4], filled[..., 5:].unflatten(-1, (5, 2)))

    def _require_faces(self, rows: Float[Tensor, "faces 15"]) -> None:
        right = rows.isfinite().all(1) & (rows[:, 2] > rows[:, 0]) & (rows[:, 3] > rows[:, 1]) & (rows[:, 4] <= 1)
        if not right.all():
            row = [round(value, 2) for value in rows[~right][0].tolist()]
            raise UserError(
                f"{self.factory} tells of a face {row}, where left < right, top < bottom and a score of at most 1 "
                "belong first; docs/oodface.md says what the columns are"
            )


def _made(factory: str, options: Mapping[str, Any], path: Path) -> tuple[nn.Module, str]:
    """The filled module, ready to infer, and its version."""
    make = _imported(factory)
    try:
        module = make(**options)
    except Exception as error:  # foreign code fails with whatever comes up
        from cluster.tracking import masked

        raise UserError(f"{factory} cannot be called with options {masked(dict(options))} ({reason(error)})") from None
    if not isinstance(module, nn.Module):
        raise UserError(f"{factory} makes a {type(module).__name__}; name one that makes a torch.nn.Module")
    module = module.to("cpu", torch.float32)  # wherever and whatever its factory likes; `to` decides
    _fill(module, path, factory)
    return module.eval().requires_grad_(False), _version(factory, make, path)


def _imported(factory: str) -> Any:
    module, _, name = factory.partition(":")
    try:
        found = getattr(importlib.import_module(module), name, None)
    except ModuleNotFoundError as error:
        raise UserError(
            f"{factory} needs the module {error.name or module}, which is missing; install its package, or put the "
            "folder that holds it on PYTHONPATH"
        ) from None
    except (Exception, SystemExit) as error:  # foreign code fails with whatever comes up, a script's parser too
        raise UserError(f"{factory}: the module {module} cannot be imported ({reason(error)})") from None
    if not callable(found):
        raise UserError(f"the module {module} has nothing to call by the name {name}; check the factory {factory}")
    return found


def _fill(module: nn.Module, path: Path, factory: str) -> None:
    from safetensors import SafetensorError
    from safetensors.torch import load_model

    try:
        missing, foreign = load_model(module, path, strict=False)
    except FileNotFoundError:
        raise UserError(f"there is no file {path}; check the path of the weights") from None
    except (SafetensorError, OSError) as error:
        raise UserError(f"{path} is no safetensors file ({reason(error)}); save the weights again") from None
    except RuntimeError as error:
        raise UserError(
            f"{path} does not hold the weights of {factory} ({reason(error, line=1)}); check file and options"
        ) from None
    missing = [name for name in missing if not name.endswith("num_batches_tracked")]  # which only training reads
    both = (missing, "is missing"), (foreign, "is not among its weights")
    told = [f"{sorted(names)[0]} {what}, {len(names)} in all" for names, what in both if names]
    if told:
        raise UserError(f"{path} does not hold the weights of {factory}: {'; '.join(told)}; check file and options")


def _version(factory: str, make: Any, path: Path) -> str:
    sources = [getattr(sys.modules[factory.partition(":")[0]], "__file__", None)]
    with suppress(TypeError):  # made in C, or an object that can be called
        sources.append(inspect.getsourcefile(inspect.unwrap(make)))
    parts = [sha256(path), *(sha256(Path(source)) for source in sources if source)]
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()


def _called(module: nn.Module, images: Tensor, factory: str | None) -> Any:
    try:
        return module(images)
    except torch.OutOfMemoryError:  # the pipeline says what to lower
        raise
    except Exception as error:  # foreign code fails with whatever comes up
        number, _, height, width = images.shape
        raise UserError(
            f"{factory} fails on {number} images of {height}x{width} px ({reason(error)}); check its options, and its "
            "size or longest_side"
        ) from None
