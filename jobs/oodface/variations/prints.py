"""What is printed on cloth: stripes, dots, the lower half of a face."""

import torch
from jaxtyping import Float, Int
from torch import Tensor

from jobs.oodface.scenario import Images
from jobs.oodface.variations.base import Each, Plane
from jobs.oodface.variations.drawing import Colour, bump, colour, inside, one_of, paint, smooth

WHITE, BLACK = (0.95, 0.95, 0.93), (0.06, 0.06, 0.07)
# ground and ink
INKS = (
    *((WHITE, BLACK), (BLACK, WHITE), ((0.95, 0.78, 0.1), BLACK), ((0.78, 0.08, 0.12), WHITE)),
    *(((0.08, 0.14, 0.4), WHITE), ((0.93, 0.45, 0.08), (0.2, 0.08, 0.35)), (WHITE, (0.82, 0.1, 0.2))),
    *(((0.05, 0.45, 0.42), (0.97, 0.72, 0.78)), (BLACK, (0.55, 0.9, 0.15)), ((0.9, 0.35, 0.6), (0.1, 0.2, 0.5))),
)
LIPS = ((0.88, 0.42, 0.46), (0.92, 0.62, 0.6), (0.72, 0.36, 0.42), (0.8, 0.55, 0.52))  # share of the skin's colour
DIRECTIONS = ((1.0, 0.0), (0.0, 1.0), (0.7071, 0.7071), (0.7071, -0.7071))  # across the stripes
PATTERNS = ("stripes", "dots", "face")

Style = Float[Tensor, "batch 6"]


def printed(
    x: Plane,
    y: Plane,
    pattern: Int[Tensor, " batch"],
    inks: Int[Tensor, " batch"],
    style: Style,
    skin: Colour,
    soft: Each,
) -> Images:
    """The cloth's own colours, before light falls on it.

    Args:
        x, y: places on the cloth, in the units of `Face`, as if it lay flat: 0 on its middle line, and down the face.
        pattern: which of PATTERNS.
        inks: 0 to 19, from which the colours come.
        style: six numbers in [0, 1) that vary size, place and form.
        skin: that the printed face comes near to.
        soft: units of one pixel.
    """
    like = x[:, None]
    ground, ink = (one_of([pair[at] for pair in INKS], inks % len(INKS), like) for at in (0, 1))
    chosen = pattern.to(x.device)[:, None, None]
    inked = torch.where(chosen == PATTERNS.index("stripes"), _stripes(x, y, style, soft), _dots(x, y, style, soft))
    half_face = _half_face(x, y, one_of(LIPS, inks % len(LIPS), like), style, skin, soft)
    return torch.where((chosen == PATTERNS.index("face"))[:, None], half_face, paint(ground, ink, inked))


def _stripes(x: Plane, y: Plane, style: Style, soft: Each) -> Plane:
    kind = (style[:, 0] * len(DIRECTIONS)).to(torch.int64)
    right, down = torch.tensor(DIRECTIONS, device=x.device, dtype=x.dtype)[kind.to(x.device)].unbind(1)
    wide = _each(0.2 + 0.14 * style[:, 1])
    at = (x * _each(right) + y * _each(down)) / wide + _each(style[:, 2]) + 16
    return inside((at.remainder(1) - 0.5).abs() - 0.25, 1.5 * soft / wide)


def _dots(x: Plane, y: Plane, style: Style, soft: Each) -> Plane:
    apart = _each(0.24 + 0.14 * style[:, 1])
    row = y / (0.866 * apart) + _each(style[:, 2]) + 16
    odd = (row.floor() % 2) / 2
    across = (x / apart + odd + 16.5).remainder(1) - 0.5
    below = (row.remainder(1) - 0.5) * 0.866
    radius = 0.26 + 0.1 * _each(style[:, 3])
    return inside((across.square() + below.square()).sqrt() - radius, 1.5 * soft / apart)


def _half_face(x: Plane, y: Plane, lips: Colour, style: Style, skin: Colour, soft: Each) -> Images:
    """Nose, smiling mouth, chin, and on some a moustache."""
    tone = skin * (0.85 + 0.3 * style[:, 0])[:, None, None, None]
    lips, like = lips * tone, x[:, None]
    large, low, bend, gap, hairy = (_each(one) for one in style[:, 1:].unbind(1))
    side, soft = x.abs(), 1.5 * soft
    face = tone * (1.05 - 0.3 * smooth((side - 0.35) / 0.6))[:, None]
    face = paint(face, tone * 0.45, 0.8 * bump(((y - 1.62) / 0.07).square() + (x / 0.4).square()))

    tip = 0.56 + 0.1 * low
    face = paint(face, tone * 0.55, 0.6 * bump(((side - 0.2) / 0.07).square() + ((y - tip + 0.12) / 0.42).square()))
    face = paint(face, 0.3 + 0.7 * tone, 0.6 * bump((x / 0.09).square() + ((y - tip + 0.2) / 0.4).square()))
    face = paint(face, tone * 0.1, inside(_oval(side - 0.11, y - tip - 0.08, 0.07, 0.04), soft))

    half, middle = 0.38 + 0.16 * large, 1.1 + 0.16 * low
    across = x / half
    arch = (1 - across.square()).clamp(min=0)
    line = middle - 0.2 * bend * across.square()
    open_ = 0.2 * gap * arch
    upper = line - open_ / 2 - 0.14 * arch.sqrt() * (1 - 0.3 * bump((across / 0.22).square()))
    lower = line + open_ / 2 + 0.18 * arch.sqrt()
    fringe = smooth((1 - across.abs()) / 0.08)
    face = paint(face, lips * 0.35, inside(torch.maximum(upper - y, y - lower) - 0.025, soft) * fringe)
    shine = 1.1 - 0.5 * smooth((line - y) / 0.1)
    face = paint(face, lips * shine[:, None], inside(torch.maximum(upper - y, y - lower), soft) * fringe)
    between = inside((y - line).abs() - open_ / 2 - 0.012, soft) * fringe
    gaps = bump((((across * 4.5 + 8.5).remainder(1) - 0.5) / 0.14).square())
    teeth = paint(colour(WHITE, like), tone * 0.4, 0.45 * gaps)
    face = paint(face, paint(lips * 0.2, teeth, smooth((open_ - 0.03) / 0.03)), between)

    edge = (y - tip - 0.26 - 0.5 * side.square()).abs() - 0.1 * (1 - side / 0.5).clamp(min=0)
    return paint(face, tone * 0.15, (hairy > 0.6) * inside(edge, soft) * smooth((0.5 - side) / 0.05))


def _oval(x: Plane, y: Plane, wide: float, high: float) -> Plane:
    """About the signed distance to an ellipse with these half axes."""
    return ((x / wide).square() + (y / high).square()).sqrt().sub(1) * min(wide, high)


def _each(one: Float[Tensor, " batch"]) -> Each:
    return one[:, None, None]
