"""Accessories: bangs and glasses."""

import torch
from jaxtyping import Float
from torch import Tensor

from jobs.oodface.randomness import Random
from jobs.oodface.scenario import Draws, Images
from jobs.oodface.variations.base import LEFT_EYE, RIGHT_EYE, Each, Face, Plane, Variation
from jobs.oodface.variations.drawing import Colour, bump, inside, one_of, paint, sample, smooth
from jobs.oodface.variations.skin import compare, hair_colour, skin_colour

FRAMES = (
    *((0.05, 0.05, 0.06), (0.25, 0.14, 0.08), (0.36, 0.05, 0.09), (0.07, 0.11, 0.26)),
    *((0.62, 0.5, 0.27), (0.55, 0.56, 0.58), (0.32, 0.33, 0.35), (0.1, 0.22, 0.18)),
)
TINTS = ((0.16, 0.17, 0.2), (0.3, 0.2, 0.11), (0.14, 0.22, 0.18), (0.12, 0.16, 0.28), (0.34, 0.17, 0.2))
HAIRS = (
    *((0.07, 0.06, 0.055), (0.17, 0.11, 0.08), (0.28, 0.18, 0.11)),
    *((0.37, 0.19, 0.11), (0.58, 0.44, 0.27), (0.42, 0.4, 0.39)),
)


class BangsGlasses(Variation):
    """A fringe and a pair of glasses: a procedural stand-in for HiSD's two tags, not the paper's generator.

    Frames thicken and lenses darken with the severity; the fringe covers a fifth of the forehead more at each. It has
    the colour of the hair found above the forehead, or a drawn one where that looks like skin.
    """

    name, title, category = "bangs_glasses", "Bangs & Glasses", "Accessories"
    levels = (0.2, 0.4, 0.6, 0.8, 1.0)

    def draw(self, random: Random, severity: int, height: int, width: int) -> Draws:
        """frame, tint, hair: (batch,) indices of colours. shape: (batch, 3) and sweep: (batch,) in [0, 1).

        strands: (batch, 1, 4, 128) in [0, 1), the brightness and length of the hair from one side to the other.
        """
        return {
            "frame": random.integers(0, len(FRAMES)),
            "tint": random.integers(0, len(TINTS)),
            "hair": random.integers(0, len(HAIRS)),
            "shape": random.uniform(3),
            "sweep": random.uniform(),
            "strands": random.uniform(1, 4, 128),
        }

    def vary(self, images: Images, face: Face, severity: int, draws: Draws) -> Images:
        """The fringe first: glasses are worn over it."""
        strength = self.level(severity)
        part = face.fitted_part(-1.7, 1.7, -2.6, 0.8)
        skin = skin_colour(images, face)
        hair = self._hair(images, face, skin, draws)
        sweep, strands = (draws[name].to(images.device) for name in ("sweep", "strands"))
        worn = fringe(part.cut(images), part, hair, sweep, strands, strength)
        frame, tint = one_of(FRAMES, draws["frame"], images), one_of(TINTS, draws["tint"], images)
        worn = glasses(worn, part, frame, tint, draws["shape"].to(images.device), strength)
        return part.put(images, worn)

    @staticmethod
    def _hair(images: Images, face: Face, skin: Colour, draws: Draws) -> Colour:
        found, drawn = hair_colour(images, face), one_of(HAIRS, draws["hair"], images)
        tones = compare(found, skin)
        own = 1 - torch.maximum(smooth((tones.light - 0.45) / 0.15), tones.tinted(0.12, 0.22))
        return paint(drawn, found, own)


def fringe(
    images: Images,
    face: Face,
    hair: Colour,
    sweep: Float[Tensor, " batch"],
    strands: Float[Tensor, "batch 1 4 128"],
    share: float,
) -> Images:
    """Hair falling over a share (0 to 1) of the forehead; `images` is the face's window."""
    u, v = face.fitted()
    u = u + 0.7 * face.turned
    slant = (sweep[:, None, None] - 0.5) * 1.1
    across = u / (0.7 + 0.17 * (v + 2.2)) + slant * (v + 1.1)
    fine, coarse = (_along(strands, row, across, frequency) for row, frequency in ((0, 21.0), (1, 10.0)))
    clumps = _along(strands, 2, across, 6.0)
    hairline = -1.12 + 0.42 * (u / 0.95).square()
    edge = hairline + share * (-0.1 - hairline) + (clumps - 0.5) * (0.1 + 0.2 * share) + (fine - 0.5) * 0.07
    edge = edge - 0.25 * share * (u / 0.9).square() * torch.sign(u * slant)
    skull = 1 - ((u / 1.2).square() + ((v - 0.12) / 1.95).square()).sqrt()
    soft = 1.5 * face.pixel
    covered = inside(v - edge, 2 * soft + 0.03) * inside(-skull, 0.12) * inside(u.abs() - 1.02 + 0.06 * fine, 0.14)
    shadow = inside(v - edge - 0.09, 0.16) * inside(-skull, 0.1) * inside(u.abs() - 0.97, 0.15)
    images = images * (1 - 0.3 * shadow * (0.4 + 0.6 * share))[:, None]
    sheen = bump(((v + 1.0 + 0.25 * u.square()) / 0.35).square())
    light = 0.66 + 0.3 * fine + 0.3 * coarse + 0.3 * sheen * (0.4 + coarse) - 0.2 * smooth((v - edge + 0.15) / 0.15)
    colour = hair * light[:, None] + (0.05 * sheen * coarse)[:, None]
    return paint(images, colour, covered * (0.9 + 0.1 * fine))


def _along(strands: Float[Tensor, "batch 1 4 128"], row: int, across: Plane, frequency: float) -> Plane:
    """A row of the noise, `frequency` values in one unit."""
    column = (across * frequency) + 64.0
    # beyond its ends the noise comes back
    column = 127 - (column.remainder(254) - 127).abs()
    return sample(strands, column, torch.full_like(column, float(row)))[:, 0]


def glasses(
    images: Images, face: Face, frame: Colour, tint: Colour, shape: Float[Tensor, "batch 3"], strength: float
) -> Images:
    """Rims, bridge, temples and lenses; `images` is the face's window, `shape` in [0, 1) makes the lenses' form."""
    right, left = face.marks[RIGHT_EYE], face.marks[LEFT_EYE]
    apart, middle = left[0] - right[0], (left[0] + right[0]) / 2
    wide, high, round_ = (one[:, None, None] for one in shape.unbind(1))
    half_wide = (0.37 + 0.05 * wide) * apart
    half_high = 0.26 + 0.07 * high
    corner = torch.minimum(half_high, half_wide) * (0.35 + 0.65 * round_)
    x, y = (face.u - middle).abs() - apart * 0.52, face.v - 0.06
    lens = _rounded(x, y, half_wide, half_high, corner)
    thick = 0.022 + 0.045 * strength
    soft = 1.1 * face.pixel
    rim = lens.abs() - thick / 2
    gap = apart * 0.52 - half_wide
    inner = (face.u - middle).abs() - gap
    bridge = torch.maximum((y + 0.1 - 0.35 * inner.clamp(max=0)).abs() - thick / 2, inner)
    outer = x - half_wide
    # the farther temple of a turned head is hidden by the cheek
    reach = (0.27 * apart - 0.9 * face.turned * torch.sign(face.u - middle)).clamp(min=0)
    temple = torch.maximum(torch.maximum((y + 0.12 - 0.05 * outer).abs() - 0.4 * thick, -outer), outer - reach)
    fading = smooth((reach + 0.5 * thick - outer) / (0.6 * reach + thick))
    body = torch.maximum(inside(torch.minimum(rim, bridge), soft), inside(temple, soft) * fading)
    shade = inside(_rounded(x, y - 0.05, half_wide, half_high, corner).abs() - thick / 2, 0.09) * inside(-rim, soft)
    images = images * (1 - 0.3 * shade)[:, None]
    within = inside(lens, soft)
    images = paint(images, tint, within * (0.06 + 0.5 * strength))
    glint = bump(((x * 0.8 + y + 0.08) / 0.13).square()) + 0.6 * bump(((x * 0.8 + y - 0.16) / 0.06).square())
    images = images + (within * glint * (0.05 + 0.13 * strength))[:, None]
    lit = 1.0 + 0.55 * bump(((y + half_high + 0.15 * thick) / (thick * 1.2)).square()) - 0.15 * smooth(y / half_high)
    metal = frame * lit[:, None] + (0.06 * bump(((y + half_high) / thick).square()))[:, None]
    return paint(images, metal, body)


def _rounded(x: Plane, y: Plane, wide: Each, high: Each, corner: Each) -> Plane:
    """Signed distance to a rectangle with rounded corners, centred, of these half sides."""
    over_x, over_y = x.abs() - wide + corner, y.abs() - high + corner
    outside = (over_x.clamp(min=0).square() + over_y.clamp(min=0).square()).sqrt()
    return outside + torch.maximum(over_x, over_y).clamp(max=0) - corner
