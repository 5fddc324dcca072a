"""Faces brought to a template: five landmarks, the similarity that fits them best, one bilinear warp.

Coordinates are in px; the centre of an image's first pixel is (0, 0), as in OpenCV.
Source: OODFace, aligner (Umeyama's transform, black border, no antialiasing).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Tensor

from jobs.oodface.faces import dlib_chip
from jobs.oodface.faces.detector import Face

Points = tuple[tuple[float, float], ...]

# Share of a coordinate, or of perfect correlation, below which float32 says nothing.
_TINY = 1e-5


@dataclass(frozen=True)
class Template:
    """What a model expects to see.

    height, width: of the crop, px.
    points: x and y in the crop of the five landmarks.
    landmarks: whose these are: the detector's (right eye, left eye, nose, right and left corner of the mouth; see
        `Face`), or those of dlib's own predictor (see `dlib_chip`).
    """

    name: str
    height: int
    width: int
    points: Points
    landmarks: Literal["detector", "dlib"] = "detector"


_NARROW = ((30.2946, 51.6963), (65.5318, 51.5014), (48.0252, 71.7366), (33.5493, 92.3655), (62.7299, 92.2041))

ARCFACE_96 = Template("arcface_96", 112, 96, _NARROW)
ARCFACE = Template("arcface", 112, 112, tuple((x + 8, y) for x, y in _NARROW))
DLIB = Template("dlib", dlib_chip.SIDE, dlib_chip.SIDE, dlib_chip.POINTS, landmarks="dlib")
# dlib's chip without dlib: where the detector's landmarks lie in it, mean of 614 photographs of LFW.
_IN_CHIPS = ((47.1, 44.9), (103.2, 45.1), (74.8, 76.8), (51.0, 101.2), (98.9, 102.0))
DLIB_YUNET = Template("dlib_yunet", dlib_chip.SIDE, dlib_chip.SIDE, _IN_CHIPS)
TEMPLATES = {template.name: template for template in (ARCFACE, ARCFACE_96, DLIB, DLIB_YUNET)}


@dataclass(frozen=True)
class Aligned:
    """Crops of one template, RGB in [0, 1].

    found: whether a face was there; else the crop is the whole image resized.
    landmarks: the detector's five points in px of the crop; NaN where no face was found.
    """

    crops: Float[Tensor, "batch 3 height width"]
    found: Bool[Tensor, " batch"]
    landmarks: Float[Tensor, "batch 5 2"]


def align(images: Sequence[Float[Tensor, "3 _ _"]], faces: Sequence[Face | None], template: Template) -> Aligned:
    """A crop an image.

    Args:
        images: RGB in [0, 1], on one device, of any sizes; at least one.
        faces: the face of each image, as `detector.choose` gives it; None where there is none. A face whose landmarks
            are one point, or no numbers, counts as none.

    Raises:
        UserError: the dlib template is asked for and dlib or its landmark file is missing.
    """
    matrices = _matrices(images, faces, template)
    found = matrices.isfinite().all((1, 2))
    size = (template.height, template.width)
    crops = [
        crop(image, matrix, size) if good else _whole(image, size)
        for image, matrix, good in zip(images, matrices, found.tolist(), strict=True)
    ]
    landmarks = moved(_landmarks(faces).double(), matrices).float()
    device = images[0].device
    return Aligned(torch.stack(crops), found.to(device), landmarks.to(device))


def similarity(
    src: Float[Tensor, "batch points 2"], dst: Float[Tensor, "batch points 2"]
) -> Float[Tensor, "batch 2 3"]:
    """The rotation, scale and shift that bring `src` nearest to `dst` (least squares), never a reflection.

    With points as complex numbers it is z -> a z + b, so a is a quotient of sums and needs no decomposition; it equals
    Umeyama's transform. The matrix is NaN where that says nothing: the points of either side are one, `dst` is `src`
    mirrored so that no rotation is better than another, or a coordinate is not finite.

    Source: Umeyama 1991.
    """
    p, q = src - src.mean(1, keepdim=True), dst - dst.mean(1, keepdim=True)
    spread = p.square().sum((1, 2))
    real = (p * q).sum((1, 2))
    imaginary = (p[..., 0] * q[..., 1] - p[..., 1] * q[..., 0]).sum(1)
    turn = torch.stack([torch.stack([real, -imaginary], -1), torch.stack([imaginary, real], -1)], 1)
    turn = turn / spread[:, None, None]
    shift = dst.mean(1) - (turn @ src.mean(1)[..., None]).squeeze(-1)
    correlation = torch.hypot(real, imaginary) / (spread * q.square().sum((1, 2))).sqrt()
    # What rounding leaves of equal points is not zero.
    apart = spread > (_TINY * src.abs().amax((1, 2))).square()
    good = apart & (correlation > _TINY) & shift.isfinite().all(1)
    return torch.where(good[:, None, None], torch.cat([turn, shift[..., None]], dim=2), torch.nan)


def inverse(matrix: Float[Tensor, "batch 2 3"]) -> Float[Tensor, "batch 2 3"]:
    """The way back of similarities."""
    turn, shift = matrix[..., :2], matrix[..., 2:]
    back = turn.transpose(1, 2) / torch.linalg.det(turn)[:, None, None]
    return torch.cat([back, -back @ shift], dim=2)


def moved(
    points: Float[Tensor, "batch points 2"], matrix: Float[Tensor, "batch 2 3"]
) -> Float[Tensor, "batch points 2"]:
    """Where the matrix puts the points."""
    return points @ matrix[..., :2].transpose(1, 2) + matrix[..., 2][:, None]


def crop(
    image: Float[Tensor, "3 rows columns"], matrix: Float[Tensor, "2 3"], size: tuple[int, int]
) -> Float[Tensor, "3 height width"]:
    """The image warped bilinearly by `matrix` (image px -> crop px), black where the image ends.

    Args:
        image: RGB, float32, on any device.
        matrix: a similarity, finite.
        size: height and width of the crop, px.
    """
    height, width = size
    back = inverse(matrix[None]).to(image.device, torch.float32)
    y, x = torch.meshgrid(
        torch.arange(height, device=image.device), torch.arange(width, device=image.device), indexing="ij"
    )
    source = moved(torch.stack([x, y], -1).reshape(1, -1, 2).float(), back)
    # grid_sample counts from -1 at the centre of the first pixel to 1 at that of the last.
    last = torch.tensor([max(image.shape[2] - 1, 1), max(image.shape[1] - 1, 1)], device=image.device)
    grid = (2 * source / last - 1).reshape(1, height, width, 2)
    return F.grid_sample(image[None], grid, mode="bilinear", padding_mode="zeros", align_corners=True)[0]


def _matrices(images: Sequence[Tensor], faces: Sequence[Face | None], template: Template) -> Float[Tensor, "batch 2 3"]:
    """Image px -> crop px, float64 on the CPU; NaN where no face was found."""
    points = torch.tensor(template.points, dtype=torch.float64).expand(len(faces), -1, -1)
    if template.landmarks == "detector":
        return similarity(_landmarks(faces).double(), points)
    places = [
        torch.full((5, 2), torch.nan) if face is None else dlib_chip.five_points(image, face.box)
        for image, face in zip(images, faces, strict=True)
    ]
    # dlib fits the chip to the image, and not the image to the chip: that gives another scale.
    return inverse(dlib_chip.stretched(similarity(points, torch.stack(places).double())))


def _landmarks(faces: Sequence[Face | None]) -> Float[Tensor, "batch 5 2"]:
    return torch.stack([torch.full((5, 2), torch.nan) if face is None else face.landmarks for face in faces])


def _whole(image: Float[Tensor, "3 rows columns"], size: tuple[int, int]) -> Float[Tensor, "3 height width"]:
    return F.interpolate(image[None], size, mode="bilinear", align_corners=False)[0]
