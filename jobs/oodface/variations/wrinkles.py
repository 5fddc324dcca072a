"""The lines of an old face, drawn once on the mean face: grooves that are dark above and lit below."""

import math
from collections.abc import Callable
from functools import lru_cache

import torch
from jaxtyping import Float
from torch import Tensor

from jobs.oodface.scenario import Images
from jobs.oodface.variations.base import Face, Plane
from jobs.oodface.variations.drawing import bump, sample

LEFT, TOP, RIGHT, BOTTOM = -1.3, -1.25, 1.3, 2.05  # of the map, in units of the face
FINE = 48  # pixels of the map in a unit
GROUPS = ("forehead", "eyes", "folds", "hollows")  # each has a weight of its own in a face

Curve = tuple[tuple[float, float], ...]

# each a curve by points (u, v) in order, its width and its depth; the side of negative u is mirrored
FOREHEAD = tuple(
    (tuple((u / 10, height + 0.035 * math.cos(0.23 * u + turn)) for u in range(-7, 8)), width, depth)
    for height, turn, width, depth in ((-0.58, 0.4, 0.028, 0.7), (-0.75, -0.5, 0.03, 1.0), (-0.93, 0.2, 0.028, 0.7))
)
FROWN = ((((-0.11, -0.36), (-0.085, -0.22), (-0.1, -0.05)), 0.032, 0.55),)
CROWS_FEET = (
    (((-0.79, -0.03), (-0.9, -0.12), (-1.0, -0.2)), 0.024, 0.8),
    (((-0.8, 0.02), (-0.92, -0.01), (-1.04, -0.03)), 0.024, 0.9),
    (((-0.79, 0.07), (-0.9, 0.1), (-1.0, 0.16)), 0.024, 0.8),
    (((-0.76, 0.12), (-0.84, 0.19), (-0.91, 0.29)), 0.022, 0.6),
)
BAGS = (
    (((-0.26, 0.14), (-0.36, 0.22), (-0.5, 0.25), (-0.63, 0.22), (-0.74, 0.13)), 0.04, 0.9),
    (((-0.22, 0.2), (-0.33, 0.31), (-0.48, 0.36), (-0.6, 0.34)), 0.035, 0.6),
)
FOLDS = (
    (((-0.25, 0.5), (-0.33, 0.63), (-0.43, 0.78), (-0.52, 0.95), (-0.57, 1.13)), 0.05, 1.0),
    (((-0.47, 1.2), (-0.52, 1.36), (-0.53, 1.56)), 0.045, 0.5),
    (((-0.74, 0.62), (-0.8, 0.8), (-0.8, 1.0)), 0.035, 0.4),
)
CHIN = ((((-0.2, 1.47), (0.0, 1.44), (0.2, 1.47)), 0.035, 0.6),)
# soft shadows: centre and reach, in u and v each, and depth
HOLLOWS = (
    *((-0.78, 0.78, 0.22, 0.36, 0.5), (-0.5, 0.2, 0.3, 0.16, 0.7)),
    *((-1.0, -0.35, 0.22, 0.3, 0.5), (-0.17, 0.1, 0.1, 0.2, 0.4)),
)


@lru_cache
def relief(device: torch.device) -> Float[Tensor, "4 rows columns"]:
    """How each group of lines darkens (below 0) or lights the mean face."""
    # the map is kept: made under inference mode, it would be of no use where gradients flow
    with torch.inference_mode(False), torch.no_grad():
        return _drawn(device)


def _drawn(device: torch.device) -> Float[Tensor, "4 rows columns"]:
    u = LEFT + (torch.arange(round((RIGHT - LEFT) * FINE), device=device) + 0.5) / FINE
    v = (TOP + (torch.arange(round((BOTTOM - TOP) * FINE), device=device) + 0.5) / FINE)[:, None]

    def sided(draw: Callable[[Tensor], Tensor]) -> Tensor:
        return draw(u) + draw(-u)

    groups = (
        _lines(u, v, FOREHEAD) + sided(lambda side: _lines(side, v, FROWN)),
        sided(lambda side: _lines(side, v, CROWS_FEET + BAGS)),
        sided(lambda side: _lines(side, v, FOLDS)) + _lines(u, v, CHIN),
        sided(lambda side: _shadows(side, v)),
    )
    return torch.stack(groups)


def _lines(u: Tensor, v: Tensor, curves: tuple[tuple[Curve, float, float], ...]) -> Plane:
    total = torch.zeros(v.shape[0], u.shape[0], device=u.device)
    for points, width, depth in curves:
        total = total + depth * _groove(u, v, points, width)
    return total


def _groove(u: Tensor, v: Tensor, points: Curve, width: float) -> Plane:
    """A dark line that fades to its ends, with a lit edge on its lower or outer side."""
    nearest = torch.full((v.shape[0], u.shape[0]), math.inf, device=u.device)
    signed, along = torch.zeros_like(nearest), torch.zeros_like(nearest)
    for step in range(len(points) - 1):
        (start_u, start_v), (end_u, end_v) = points[step], points[step + 1]
        across, down = end_u - start_u, end_v - start_v
        length = math.hypot(across, down)
        share = (((u - start_u) * across + (v - start_v) * down) / length**2).clamp(0, 1)
        off_u, off_v = u - start_u - share * across, v - start_v - share * down
        distance = (off_u.square() + off_v.square()).sqrt()
        side = torch.sign(off_v * abs(across) - off_u * down * math.copysign(1, across))
        closer = distance < nearest
        nearest = torch.where(closer, distance, nearest)
        signed = torch.where(closer, side * distance, signed)
        along = torch.where(closer, (step + share) / (len(points) - 1), along)
    fading = (4 * along * (1 - along)).clamp(min=0).sqrt()
    dark = bump((signed / (2 * width)).square())
    lit = bump(((signed - 2 * width) / (2 * width)).square())
    return fading * (0.3 * lit - dark)


def _shadows(u: Tensor, v: Tensor) -> Plane:
    total = torch.zeros(v.shape[0], u.shape[0], device=u.device)
    for centre_u, centre_v, reach_u, reach_v, depth in HOLLOWS:
        near = bump(((u - centre_u) / (1.6 * reach_u)).square() + ((v - centre_v) / (1.6 * reach_v)).square())
        total = total - depth * near
    return total


def lines_on(
    images: Images, face: Face, weights: Float[Tensor, "batch 4"], bend: Float[Tensor, "batch 2 rows columns"]
) -> Plane:
    """The groups' weighted sum laid over the face's window, each line bent a little by coarse noise in [-1, 1]."""
    u, v = face.fitted()
    column, row = (u - LEFT) / (RIGHT - LEFT), (v - TOP) / (BOTTOM - TOP)
    high, wide = bend.shape[2:]
    waves = sample(bend, column * (wide - 1), row * (high - 1)) * 0.05
    groups = relief(images.device)
    total = sum(groups[at] * weights[:, at, None, None] for at in range(len(GROUPS)))
    x, y = (u + waves[:, 0] - LEFT) * FINE - 0.5, (v + waves[:, 1] - TOP) * FINE - 0.5
    return sample(total[:, None], x, y)[:, 0]
