"""The face models by name: aligned crops go in, embeddings of length 1 come out."""

from __future__ import annotations

import difflib
import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from cluster.errors import UserError
from jobs.oodface.faces import dlib_resnet, sface
from jobs.oodface.faces.align import ARCFACE, DLIB, TEMPLATES, Template
from jobs.oodface.faces.config import OwnFace
from jobs.oodface.faces.onnx_model import OnnxNetwork
from jobs.oodface.faces.torch_model import TorchNetwork
from jobs.oodface.faces.weights import PackagedFile, sha256

# Crops of one pass on a CPU: what one layer writes, the next still finds in the cache.
_CROPS_ON_CPU = 8


class Network(Protocol):
    """Crops, RGB in [0, 1], to raw embeddings; a torch module is one."""

    def __call__(self, crops: Float[Tensor, "batch 3 height width"]) -> Float[Tensor, "batch dim"]: ...

    def to(self, device: torch.device | str, dtype: torch.dtype) -> Network: ...


@dataclass(frozen=True)
class FaceModel:
    """A network that embeds faces.

    name: its public name.
    template: the crops it expects; see `align.align`.
    version: SHA-256 of the file of its weights, or of all that it is made of; it pins what is computed.
    network: what gives raw embeddings, those of dlib with a length that means nothing.
    """

    name: str
    template: Template
    version: str
    network: Network

    def to(self, device: torch.device | str, dtype: torch.dtype = torch.float32) -> FaceModel:
        """Itself, moved to `device`.

        Args:
            dtype: float32, or float16 or bfloat16 for speed on hardware that has them (cosines between photographs then
                move by up to .001 and .005); a user's ONNX model keeps the precision of its file.
        """
        self.network.to(device, dtype)
        return self

    @torch.no_grad()
    def embed(self, crops: Float[Tensor, "batch 3 height width"]) -> Float[Tensor, "batch dim"]:
        """Embeddings of length 1, float32 on the device of the crops: a dot product is a cosine.

        Args:
            crops: aligned to `template`, RGB in [0, 1], float32 on the model's device; at least one.
        """
        step = _CROPS_ON_CPU if crops.device.type == "cpu" else len(crops)
        return torch.cat([F.normalize(self.network(part).float()) for part in crops.split(step)])


def load(
    entry: str | OwnFace,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
    threads: int | None = None,
) -> FaceModel:
    """The model that a configuration names.

    Args:
        entry: one of `config.BUILT_IN`, or a model of the user's own.
        device, dtype: see `FaceModel.to`.
        threads: of an ONNX model where processors compute it; None for as many as torch has.

    Raises:
        UserError: no such name; the package or file with its weights is missing, damaged, or holds something else.
    """
    if isinstance(entry, OwnFace):
        return _own(entry, threads).to(device, dtype)
    template, weights, read = _reader(entry)
    path = weights.locate()
    return FaceModel(entry, template, weights.sha256, read(path)).to(device, dtype)


def template_of(entry: str | OwnFace) -> Template:
    """The crops that a model of a configuration expects, without its weights.

    Raises:
        UserError: no such name.
    """
    return TEMPLATES[entry.template] if isinstance(entry, OwnFace) else _reader(entry)[0]


def _reader(name: str) -> tuple[Template, PackagedFile, Callable[[Path], Network]]:
    if name not in _READERS:
        nearest = difflib.get_close_matches(name, _READERS, n=1, cutoff=0.0)[0]
        raise UserError(
            f"there is no face model '{name}'; the nearest of {', '.join(_READERS)} is {nearest}, and a model of your "
            "own is a section with name and path"
        )
    return _READERS[name]


# The names are those of `config.BUILT_IN`.
_READERS: dict[str, tuple[Template, PackagedFile, Callable[[Path], Network]]] = {
    "sface": (ARCFACE, sface.WEIGHTS, sface.read_sface),
    "dlib_resnet": (DLIB, dlib_resnet.WEIGHTS, dlib_resnet.read_dlib_resnet),
}


def _own(face: OwnFace, threads: int | None) -> FaceModel:
    template = TEMPLATES[face.template]
    crop_size = (template.height, template.width)
    if face.factory is not None:
        made = TorchNetwork(face, crop_size)
        return FaceModel(face.name, template, made.version, made)
    network = OnnxNetwork(face, crop_size, threads)
    digests = [sha256(network.path), *(f"{path.name} {sha256(path)}" for path in network.data)]
    version = digests[0] if len(digests) == 1 else hashlib.sha256("\n".join(digests).encode()).hexdigest()
    return FaceModel(face.name, template, version, network)
