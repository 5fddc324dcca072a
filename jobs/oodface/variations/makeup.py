"""Accessories: make-up."""

import torch

from jobs.oodface.randomness import Random
from jobs.oodface.scenario import Draws, Images
from jobs.oodface.variations.base import LEFT_EYE, RIGHT_EYE, Face, Plane, Variation
from jobs.oodface.variations.drawing import Colour, bump, inside, luma, one_of, paint, smooth
from jobs.oodface.variations.mouth import Mouth, find_mouth
from jobs.oodface.variations.skin import DARKEST, compare, relative, saturation, skin_colour

LIPS = (
    *((0.72, 0.07, 0.12), (0.58, 0.05, 0.2), (0.8, 0.24, 0.32)),
    *((0.5, 0.1, 0.13), (0.83, 0.3, 0.22), (0.62, 0.16, 0.36)),
)
CHEEKS = ((0.93, 0.4, 0.42), (0.95, 0.48, 0.38), (0.85, 0.34, 0.45), (0.88, 0.42, 0.34))
SHADOWS = (
    *((0.36, 0.22, 0.18), (0.24, 0.27, 0.45), (0.42, 0.2, 0.4)),
    *((0.16, 0.34, 0.36), (0.3, 0.3, 0.32), (0.55, 0.33, 0.24)),
)
PALETTES = {"lips": LIPS, "cheeks": CHEEKS, "shadow": SHADOWS}


class Makeup(Variation):
    """Lipstick, blush, eye shadow and eyeliner: a procedural stand-in for BeautyGAN, not the paper's generator."""

    name, title, category = "makeup", "Makeup", "Accessories"
    levels = (0.12, 0.24, 0.36, 0.48, 0.6)  # how opaque the colours are

    def draw(self, random: Random, severity: int, height: int, width: int) -> Draws:
        """lips, cheeks, shadow: (batch,) indices of colours."""
        return {name: random.integers(0, len(colours)) for name, colours in PALETTES.items()}

    def vary(self, images: Images, face: Face, severity: int, draws: Draws) -> Images:
        """Cheeks, eyes, lips, each in its own window."""
        alpha = self.level(severity)
        skin, mouth = skin_colour(images, face), find_mouth(images, face)
        lips, cheeks, shadow = (one_of(colours, draws[name], images) for name, colours in PALETTES.items())
        made = _cheeks(images, face.fitted_part(-1.3, 1.3, 0.1, 1.2), cheeks, skin, alpha)
        for eye, outward in ((RIGHT_EYE, -1.0), (LEFT_EYE, 1.0)):
            made = _eye(made, face, eye, outward, shadow, skin, alpha)
        return _lips(made, mouth.part(face, 1.1, -1.2, 1.5), mouth, lips, skin, alpha)


def _cheeks(images: Images, part: Face, colour: Colour, skin: Colour, alpha: float) -> Images:
    window = part.cut(images)
    u, v = part.fitted()
    side = u.abs() - 0.64
    near = bump(((side - 0.35 * (0.66 - v)) / 0.36).square() + ((v - 0.66 + 0.3 * side) / 0.27).square())
    blush = window * (0.35 + 0.65 * colour / colour.amax(1, keepdim=True))
    return part.put(images, paint(window, blush, near * compare(window, skin).tinted(0.2, 0.45) * (1.2 * alpha)))


def _eye(images: Images, face: Face, eye: int, outward: float, colour: Colour, skin: Colour, alpha: float) -> Images:
    """Shadow from the lid's edge up, and a line along that edge with a wing; x outward and y down, in half widths."""
    half = 0.25 * (face.marks[LEFT_EYE][0] - face.marks[RIGHT_EYE][0])
    u, v = face.marks[eye]
    part = face.part(u - 2 * half, u + 2 * half, v - 2.2 * half, v + 0.6 * half)
    window = part.cut(images)
    x, y = (part.u - u) / half * outward, (part.v - v) / half
    lid = -0.35 * bump((x / 1.5).square()) - 0.28 * (x - 0.6).clamp(min=0)
    lifted = (lid - y) / (0.85 + 0.2 * x.clamp(-1, 1))
    shadow = smooth(lifted / 0.15) * bump((lifted / 1.1).square()) * bump(((x - 0.15) / 1.55).square()).sqrt()
    shaded = colour * (0.35 + 0.75 * relative(window, skin).clamp(0.2, 1.4))[:, None]
    window = paint(window, shaded, shadow * (1.15 * alpha))
    wing = 0.04 + 0.07 * smooth((x + 0.8) / 1.6)
    line = inside((y - lid).abs() - wing, 1.2 * part.pixel / half) * smooth((1.3 - x) / 0.35) * smooth((x + 1.15) / 0.3)
    return part.put(images, paint(window, window * 0.12, line * (1.3 * alpha)))


def _lips(images: Images, part: Face, mouth: Mouth, colour: Colour, skin: Colour, alpha: float) -> Images:
    window = part.cut(images)
    light = relative(window, mouth.lips)
    painted = colour * (0.35 + 0.65 * light.clamp(0.2, 1.6))[:, None] * (0.45 + 0.75 * luma(skin))
    return part.put(images, paint(window, painted, lip_cover(window, light, part, mouth) * (1.35 * alpha)))


def lip_cover(window: Images, light: Plane, part: Face, mouth: Mouth) -> Plane:
    """Where lips are: between their outlines, and not teeth or the dark behind them. light: relative to the lips'."""
    x, y = mouth.coordinates(part.u, part.v)
    band = mouth.pale
    middle = band.middle + mouth.line(x, band)
    parted = 0.5 * band.height * (1 - x.square()).clamp(min=0)
    arch = (1 - (x / 0.95).square()).clamp(min=0).sqrt()
    top = middle - parted - 0.23 * arch * (1 - 0.22 * bump((x / 0.25).square()))
    bottom = middle + parted + 0.33 * arch
    shape = inside(torch.maximum(top - y, y - bottom), 2 * part.pixel / mouth.half) * smooth((0.95 - x.abs()) / 0.12)
    coloured = saturation(window) / saturation(mouth.lips).clamp(min=DARKEST)
    # a lip's gleam looks like teeth too
    teeth = smooth((0.92 - coloured) / 0.2) * smooth((light - 0.95) / 0.25) * (0.5 + 0.5 * band.sure)
    dark = smooth((0.5 - light) / 0.2)
    return shape * (1 - teeth * smooth(bump(((y - middle) / 0.5).square()) / 0.2)) * (1 - dark)
