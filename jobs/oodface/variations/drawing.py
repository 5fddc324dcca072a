"""Sampling, warping and painting that give each sample the same bits in any batch.

Sums over pixels are avoided, for their order depends on how many samples there are; medians, slices added one by one
and element-wise arithmetic without transcendental functions do not.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from jobs.oodface.scenario import Images
from jobs.oodface.variations.base import Each, Face, Plane

Colour = Float[Tensor, "batch 3 1 1"]
RGB = tuple[float, float, float]


def sample(images: Tensor, x: Plane, y: Plane, mode: str = "bilinear") -> Tensor:
    """(batch, channels, rows, columns): the images at places in pixels; beyond an edge it repeats."""
    height, width = images.shape[2:]
    # two planes are read as fast as pairs, and put together five times faster
    grid = torch.stack([(2 * x + 1) / width - 1, (2 * y + 1) / height - 1], 1)
    return F.grid_sample(images, grid.permute(0, 2, 3, 1), mode=mode, padding_mode="border", align_corners=False)


def warped(images: Images, face: Face, u: Plane, v: Plane, mode: str = "bicubic") -> Images:
    """The face's window with each pixel taken from (u, v)."""
    taken = sample(images, *face.pixels(u, v), mode=mode)
    return taken.clamp(0, 1) if mode == "bicubic" else taken


def moved(images: Images, face: Face, u: Plane, v: Plane, mode: str = "bicubic") -> Images:
    """`warped`, but where (u, v) is a pixel's own place it stays as it is, exactly."""
    moves = ((u != face.u) | (v != face.v)).to(images.dtype)
    return paint(face.cut(images), warped(images, face, u, v, mode), moves)


def halved(images: Tensor) -> Tensor:
    """The means of two by two pixels; where a side is odd, the last of what there is."""
    return F.avg_pool2d(images, 2, ceil_mode=True, count_include_pad=False)


def enlarged(planes: Tensor, face: Face) -> Tensor:
    """(batch, channels, height, width): what was computed on the halved face, for each pixel of its window."""
    return F.interpolate(planes, size=face.u.shape[1:], mode="bilinear", align_corners=False)


def magnified(
    u: Plane, v: Plane, centre: tuple[Each, Each], reach: tuple[float, float], by: tuple[float, float]
) -> tuple[Plane, Plane]:
    """How far u and v of the source move so that what lies at a centre is enlarged by 1 + `by`; 0 beyond `reach`."""
    across, below = u - centre[0], v - centre[1]
    near = bump((across / reach[0]).square() + (below / reach[1]).square())
    return across * (1 / (1 + by[0] * near) - 1), below * (1 / (1 + by[1] * near) - 1)


def smooth(share: Tensor) -> Tensor:
    """0 below 0, 1 above 1, and between them the cubic with level ends."""
    share = share.clamp(0, 1)
    return share.square() * (3 - 2 * share)


def bump(squared: Tensor) -> Tensor:
    """(1 - r^2)^2 of a squared radius, 0 beyond 1."""
    return (1 - squared).clamp(min=0).square()


def inside(distance: Plane, soft: Tensor | float) -> Plane:
    """Coverage of a shape from its signed distance (negative inside), with an edge `soft` wide."""
    return (0.5 - distance / soft).clamp(0, 1)


def paint(images: Images, colour: Colour | Images, alpha: Plane) -> Images:
    """The colour laid over the images."""
    return images + (colour - images) * alpha[:, None]


def colour(rgb: RGB, images: Images) -> Float[Tensor, "1 3 1 1"]:
    """One colour for all samples."""
    return torch.tensor(rgb, device=images.device, dtype=images.dtype)[None, :, None, None]


def one_of(palette: Sequence[RGB], index: Int[Tensor, " batch"], images: Images) -> Colour:
    """A colour a sample, chosen by its index."""
    colours = torch.tensor(palette, device=images.device, dtype=images.dtype)
    return colours[index.to(images.device)][:, :, None, None]


def luma(colours: Tensor) -> Tensor:
    """Rec. 601 luma of the channels, which are dimension 1; that dimension is kept."""
    return colours[:, :1] * 0.299 + colours[:, 1:2] * 0.587 + colours[:, 2:] * 0.114


def added(values: Float[Tensor, "batch count"]) -> Float[Tensor, " batch"]:
    """The sum of each row, in an order that does not depend on the batch."""
    while values.shape[1] > 1:
        half = values.shape[1] // 2
        folded = values[:, :half] + values[:, half : 2 * half]
        values = torch.cat([folded, values[:, 2 * half :]], 1)
    return values[:, 0]
