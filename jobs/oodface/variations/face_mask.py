"""Extensions: a mask of cloth over the lower face."""

from dataclasses import dataclass
from typing import NamedTuple

import torch

from jobs.oodface.randomness import Random
from jobs.oodface.scenario import Draws, Images
from jobs.oodface.variations.base import LEFT_EYE, RIGHT_EYE, Each, Face, Plane, Variation
from jobs.oodface.variations.drawing import Colour, bump, inside, luma, one_of, paint, sample, smooth
from jobs.oodface.variations.prints import PATTERNS, printed
from jobs.oodface.variations.skin import colour_at, compare, relative, saturation, skin_colour

CLOTHS = (
    *((0.94, 0.95, 0.95), (0.55, 0.75, 0.85), (0.1, 0.1, 0.11), (0.45, 0.46, 0.48)),
    *((0.1, 0.15, 0.33), (0.45, 0.08, 0.14), (0.36, 0.42, 0.3), (0.9, 0.68, 0.72)),
)
# a head as a barrel about its vertical axis, in units of the mean face
RADIUS, WIDEST, LONG = 1.06, 0.35, 1.75
DEPTH = 0.1  # how far behind its front the barrel's middle line is seen at u = 0, as eyes and mouth are
NOSE_OUT = 0.3  # how far the nose stands out from it
TO_EAR = 0.95  # share of the barrel's radius at which the widest mask ends
EAR, EARS = 1.04, (0.0, 0.66)  # where the loops go behind an ear: s, and v of the upper and lower one
LOOP, CORNER = 0.03, 0.12  # half a loop's width, radius of the mask's corners
PLEATS = (0.3, 0.5, 0.7)  # shares of the mask's height


class Level(NamedTuple):
    """top: v of the upper edge on the middle line. half: half the width, in units. ink: how opaque the print is."""

    top: float
    half: float
    ink: float


class FaceMask(Variation):
    """A mask of cloth with pleats and ear loops: a procedural stand-in for photographs of the paper's worn masks.

    It grows from mouth and chin up to the lower lids; at severities 4 and 5 it is printed with stripes, dots or the
    lower half of another face.
    """

    name, title, category = "face_mask", "Face Mask", "Extensions"
    levels = (
        Level(0.84, 0.56, 0.0),
        Level(0.6, 0.72, 0.0),
        Level(0.34, 0.86, 0.0),
        Level(0.24, 0.94, 0.75),
        Level(0.08, 1.0, 1.0),
    )

    def draw(self, random: Random, severity: int, height: int, width: int) -> Draws:
        """cloth, pattern: (batch,) indices. inks: (batch,) 0 to 19, the print's colours.

        style: (batch, 6) in [0, 1), the print's form. worn: (batch, 2) in [-1, 1), how askew and how high it sits.
        folds: (batch, 1, 7, 9) in [0, 1), the cloth's height.
        """
        return {
            "cloth": random.integers(0, len(CLOTHS)),
            "pattern": random.integers(0, len(PATTERNS)),
            "inks": random.integers(0, 20),
            "style": random.uniform(6),
            "worn": random.uniform(2, low=-1),
            "folds": random.uniform(1, 7, 9),
        }

    def vary(self, images: Images, face: Face, severity: int, draws: Draws) -> Images:
        """Loops, shadow, cloth."""
        level = self.level(severity)
        worn, style, folds = (draws[name].to(images.device) for name in ("worn", "style", "folds"))
        part = face.fitted_part(-2.1, 2.1, -0.35, 2.5)
        window, skin = part.cut(images), skin_colour(images, face)
        head = _head(part)
        shape = _shape(head, level, *(0.03 * one[:, None, None] for one in worn.unbind(1)))
        colours: Images | Colour = one_of(CLOTHS, draws["cloth"], images)
        if level.ink:
            flat = head.s * (1 + (head.s / RADIUS).square() / 6)
            laid = printed(flat, head.v, draws["pattern"], draws["inks"], style, skin / _exposure(skin), part.pixel)
            colours = colours + (laid - colours) * level.ink
        cloth = _as_exposed(colours, skin) * _light(images, face, head, shape, folds)[:, None]
        window = _looped(window, head, shape, skin)
        seen = head.seen
        shade = inside(shape.outside - 0.02, 0.14) * (0.3 + 0.2 * smooth((head.v - 1.3) / 0.4))
        window = window * (1 - shade * seen)[:, None]
        return part.put(images, paint(window, cloth, inside(shape.outside, 1.3 * part.pixel) * seen))


@dataclass(frozen=True)
class Head:
    """Where the pixels of a window lie on a head that may be turned aside; all in units of the mean face.

    Attributes:
        u, v: of the mean face (`Face.fitted`), the nose pulled back to where it would be on the barrel.
        s: across from the middle line as if seen from the front.
        q: sine of the angle between line of sight and surface, negative on the image's left; beyond +-1 is no head.
        front: cosine of the angle to the face's own direction; below 0 lies the back of the head.
        radius: of the barrel at this height. sine, cosine: of the turn.
        stretched: units of s in one of u. pixel: units of one pixel.
    """

    u: Plane
    v: Plane
    s: Plane
    q: Plane
    front: Plane
    radius: Plane
    sine: Each
    cosine: Each
    stretched: Plane
    pixel: Each

    @property
    def seen(self) -> Plane:
        """1 on the front half of the head, 0 beside it."""
        return inside((self.q.abs() - 1) * self.radius, 1.3 * self.pixel) * inside(-self.front, 0.1)


def _head(part: Face) -> Head:
    u, v = part.fitted()
    wide = part.marks[LEFT_EYE][0] - part.marks[RIGHT_EYE][0]
    tangent = (part.turned / wide / (NOSE_OUT + DEPTH)).clamp(-1, 1)
    cosine = 1 / (1 + tangent.square()).sqrt()
    sine = tangent * cosine
    out = NOSE_OUT * tangent * bump(((v - 0.62) / 0.8).square())
    u = u - out * bump(((u - out) / 0.65).square())
    radius = _radius(v)
    q = (u * cosine + (radius - DEPTH) * sine) / radius
    held = q.clamp(-1, 1)
    away = (1 - held.square()).clamp(min=0).sqrt()
    stretched = (cosine * (cosine + held * sine / away.clamp(min=0.15))).clamp(0.25, 5)
    return Head(
        *(u, v, radius * (held * cosine - away * sine), q, away * cosine + held * sine, radius, sine, cosine),
        *(stretched, part.pixel),
    )


def _radius(v: Plane | Each) -> Plane | Each:
    below = ((v - WIDEST).clamp(min=0) / LONG).clamp(max=0.98)
    return RADIUS * (1 - below.square()).sqrt()


@dataclass(frozen=True)
class Shape:
    """The mask on its head.

    Attributes:
        outside: about the distance to its edge, in units, negative on the cloth.
        down: below the upper edge, in units. height: from that edge to the lower one.
        half: its half width. corners: s and v of the upper and the lower one at s > 0. askew: added to v at s = 1.
    """

    outside: Plane
    down: Plane
    height: Plane
    half: float
    corners: tuple[tuple[Each, Each], ...]
    askew: Each


def _shape(head: Head, level: Level, askew: Each, high: Each) -> Shape:
    side, v = head.s.abs(), head.v - askew * head.s
    flank = 0.17 * (1 - level.top)  # how far the edge runs down beside the nose
    top = level.top + high + flank * smooth(side / 0.42) + 0.1 * (side - 0.42).clamp(min=0)
    bottom = 2.02 - 0.5 * (side / level.half).square().clamp(max=1)
    waist = level.half * (1 - 0.05 * bump(((v - 1.05) / 0.6).square()))
    # it ends before the ear, but closes below the jaw
    waist = torch.minimum(waist, head.radius * (TO_EAR + 0.1 * smooth((v - 1.5) / 0.35)))
    across, beyond = (side - waist) / head.stretched + CORNER, torch.maximum(top - v, v - bottom) + CORNER
    outside = (across.clamp(min=0).square() + beyond.clamp(min=0).square()).sqrt()
    outside = outside + torch.maximum(across, beyond).clamp(max=0) - CORNER
    upper = level.top + high + flank + 0.1 * (level.half - 0.42)
    heights = (upper + 0.1, torch.full_like(upper, 1.45))
    corners = tuple(((_radius(one) * TO_EAR).clamp(max=level.half) - 0.07, one) for one in heights)
    return Shape(outside, v - top, bottom - top, level.half, corners, askew)


def _light(images: Images, face: Face, head: Head, shape: Shape, folds: Images) -> Plane:
    """How much light comes back from the cloth: form, side light as on the cheeks, pleats, folds, seams."""
    s, v = head.s, head.v
    side = s.abs()
    left, right = (luma(colour_at(images, face, [(u, 0.45), (u, 0.6), (0.8 * u, 0.3)]))[:, 0] for u in (-0.55, 0.55))
    slant = ((right - left) / (right + left).clamp(min=0.1)).clamp(-0.35, 0.35)
    light = 0.68 + 0.36 * (1 - head.q.square()).clamp(min=0).sqrt()
    light = light * (1 + 1.3 * slant * s / RADIUS) * (1.04 - 0.3 * smooth((v - 1.2) / 0.8))
    nose = smooth((1.05 - v) / 0.4)
    light = light * (1 + nose * (0.07 * bump((s / 0.13).square()) - 0.13 * bump(((side - 0.27) / 0.2).square())))
    gathered = 0.45 + 0.55 * smooth(side / shape.half)
    for pleat in PLEATS:
        below = shape.down - pleat * shape.height
        crease = 0.26 * bump(((below - 0.035) / 0.05).square()) - 0.1 * bump(((below + 0.035) / 0.05).square())
        light = light * (1 - crease * gathered)
    column, row = (s / shape.half + 1) / 2 * (folds.shape[3] - 1), shape.down / shape.height * (folds.shape[2] - 1)
    light = light * (1 + 0.16 * (sample(folds, column, row, mode="bicubic")[:, 0] - 0.5))
    depth = -shape.outside
    return light * (1 - 0.1 * bump(((depth - 0.075) / 0.025).square()) - 0.18 * bump((depth / 0.035).square()))


def _as_exposed(colours: Images | Colour, skin: Colour) -> Images:
    """Cloth as bright and as colourful as the photograph shows skin."""
    coloured = ((saturation(skin)[:, None] - 0.06) / 0.14).clamp(0, 1)
    grey = luma(colours)
    return (grey + (colours - grey) * coloured) * _exposure(skin)


def _exposure(skin: Colour) -> Colour:
    """How bright white cloth is, guessed from the skin's luma: skin itself is bright or dark in any light."""
    return (0.5 + 0.75 * luma(skin)).clamp(0.5, 1.08)


def _looped(window: Images, head: Head, shape: Shape, skin: Colour) -> Images:
    """Two bands on either side from the mask's corners to the ear; hair hides them, and the head what is behind it."""
    v = head.v - shape.askew * head.s
    free = 0.25 + 0.75 * compare(window, skin).tinted(0.25, 0.5) * smooth((relative(window, skin) - 0.3) / 0.3)
    free = free * inside((head.q.abs() - 1) * head.radius, 1.3 * head.pixel)
    white = 0.55 + 0.4 * luma(skin).clamp(0.35, 0.9)
    for side in (-1.0, 1.0):
        shown = free * smooth((0.4 - side * head.sine) / 0.2)
        for (corner, start), ear in zip(shape.corners, EARS, strict=True):
            ends = _seen_at(head, side * corner, start), _seen_at(head, side * EAR, torch.full_like(start, ear))
            far = _from_line(head.u, v, ends[0], start, ends[1], ear)
            window = window * (1 - 0.25 * inside(far - LOOP - 0.02, 0.1) * shown)[:, None]
            round_ = 1 - 0.25 * (far / LOOP).square().clamp(max=1)
            window = paint(window, white * round_[:, None], 0.92 * inside(far - LOOP, 1.2 * head.pixel) * shown)
    return window


def _seen_at(head: Head, s: Each | float, v: Each) -> Each:
    """u of a place on the head; of one behind the contour as far beyond it."""
    radius = _radius(v)
    ahead = (s / radius).clamp(-0.99, 0.99)
    aside = (1 - ahead.square()).sqrt()
    q, front = ahead * head.cosine + aside * head.sine, aside * head.cosine - ahead * head.sine
    q = torch.where(front < 0, 2 * torch.sign(q) - q, q)
    return (q * radius - (radius - DEPTH) * head.sine) / head.cosine


def _from_line(x: Plane, y: Plane, x0: Each, y0: Each, x1: Each, y1: float) -> Plane:
    """The distance to a straight line between two places."""
    along_x, along_y = x1 - x0, y1 - y0
    at = ((x - x0) * along_x + (y - y0) * along_y) / (along_x.square() + along_y.square())
    at = at.clamp(0, 1)
    return ((x - x0 - at * along_x).square() + (y - y0 - at * along_y).square()).sqrt()
