"""Where a mouth's parts are: landmarks give its corners, the image the rest."""

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from jobs.oodface.scenario import Images
from jobs.oodface.variations.base import LEFT_MOUTH, RIGHT_MOUTH, Each, Face, Plane
from jobs.oodface.variations.drawing import Colour, added, luma, sample, smooth
from jobs.oodface.variations.skin import DARKEST, relative, saturation, skin_colour

STEP, TOP, ROWS = 0.05, -0.45, 25  # the searched heights, from above the corners to below them, in half widths
STRIPS = ((-0.6, -0.5, -0.4), (-0.12, -0.04, 0.04, 0.12), (0.4, 0.5, 0.6))
SMILE = -0.22  # the bend of lips that show teeth

Strip = Float[Tensor, "batch 3 rows"]
Profile = Float[Tensor, "batch rows"]


@dataclass(frozen=True)
class Band:
    """What lies between the lips at the mouth's centre: the middle's height y, how high it is, how sure that is."""

    middle: Each
    height: Each
    sure: Each


@dataclass(frozen=True)
class Mouth:
    """Coordinates x (corners at -1 and 1) and y (down from the line through them), both in half widths.

    Attributes:
        u, v, half, tilt: where the coordinates lie in the face's.
        seam: height y of the darkest line at x = 0, where closed lips meet. bend: what is added to it at x = +-1.
        teeth: what is whiter than skin, and bright. pale: what is paler than the lips above and below it: teeth in bad
            light too, but also the gleam of a lip. Without them: height 0, at the seam.
        lips: their colour.
    """

    u: Each
    v: Each
    half: Each
    tilt: Each
    seam: Each
    bend: Each
    teeth: Band
    pale: Band
    lips: Colour

    def coordinates(self, u: Plane, v: Plane) -> tuple[Plane, Plane]:
        """x, y of places in the face."""
        across = u - self.u
        return across / self.half, (v - self.v - self.tilt * across) / self.half

    def part(self, face: Face, across: float, top: float, bottom: float) -> Face:
        """The face's window between x = +-across and these heights y."""
        slope = self.tilt.abs() * across
        left, right = self.u - across * self.half, self.u + across * self.half
        return face.part(left, right, self.v + (top - slope) * self.half, self.v + (bottom + slope) * self.half)

    def line(self, x: Plane, band: Band) -> Plane:
        """The seam's height at x, less its height at the centre; teeth show in a smile."""
        bend = self.bend + (SMILE - self.bend) * band.sure
        return bend * x.square().clamp(max=1)


def find_mouth(images: Images, face: Face) -> Mouth:
    """The lips' seam as the darkest line, teeth as what is pale, near the height where mouths have them."""
    right, left = face.marks[RIGHT_MOUTH], face.marks[LEFT_MOUTH]
    across, down = left[0] - right[0], left[1] - right[1]
    corners = (*face.mouth, across / 2, down / across)
    skin = skin_colour(images, face)[..., 0]
    y = torch.arange(ROWS, device=images.device, dtype=images.dtype) * STEP + TOP
    strips = [_strip(images, face, corners, x, y) for x in STRIPS]
    valleys = [_valley(strip, skin) for strip in strips]
    seam = y[(valleys[1] + 0.35 * (valleys[0] + valleys[2]) - 2.5 * (y - 0.15).square()).argmax(1)][:, None]
    sides = [y[(valley - 2 * (y - 0.8 * seam).square()).argmax(1)] for valley in valleys[::2]]
    bend = (((sides[0] + sides[1]) / 2)[:, None] - seam).mul(4).clamp(-0.35, 0.2)
    white = _whiteness(strips[1], skin)
    teeth, pale = (_band(one, y, seam) for one in (white, torch.maximum(white, _gleam(strips[1], skin))))
    return Mouth(*corners, seam[..., None], bend[..., None], teeth, pale, _reddest(strips[1], skin))


def _strip(images: Images, face: Face, corners: tuple[Each, ...], x: tuple[float, ...], y: Tensor) -> Strip:
    """Colours down the mouth, the mean over some columns."""
    columns = torch.tensor(x, device=images.device, dtype=images.dtype)
    u, v, half, tilt = corners
    across = columns[None, None, :] * half
    taken = sample(images, *face.pixels(u + across, v + tilt * across + y[None, :, None] * half))
    total = taken[..., 0]
    for column in range(1, len(x)):
        total = total + taken[..., column]
    return total / len(x)


def _band(pale: Profile, y: Float[Tensor, " rows"], seam: Float[Tensor, "batch 1"]) -> Band:
    pale = pale * (1 - ((y - 0.2) / 0.5).square()).clamp(min=0).sqrt()
    rows = added(pale)[:, None]
    middle, height = added(pale * y)[:, None] / rows.clamp(min=1e-3), rows * STEP
    sure = smooth((height - 0.06) / 0.1)
    return Band(*(one[..., None] for one in (seam + (middle - seam) * sure, height * sure, sure)))


def _whiteness(strip: Strip, skin: Tensor) -> Profile:
    """How much a place looks like teeth: brighter than skin and less coloured."""
    coloured = saturation(strip) / saturation(skin).clamp(min=DARKEST)
    return smooth((0.92 - coloured) / 0.28) * smooth((relative(strip, skin) - 0.98) / 0.12)


def _gleam(strip: Strip, skin: Tensor) -> Profile:
    """How much less coloured a place is than the most coloured within half a mouth above and below it."""
    coloured, reach = saturation(strip), 8
    around = torch.cat([coloured[:, :1].expand(-1, reach), coloured, coloured[:, -1:].expand(-1, reach)], 1)
    above = around.unfold(1, reach + 1, 1)[:, :ROWS].amax(2)
    below = around.unfold(1, reach + 1, 1)[:, reach:].amax(2)
    bright = smooth((relative(strip, skin) - 0.6) / 0.2) * smooth((luma(strip)[:, 0] - 0.42) / 0.1)
    return smooth((0.75 - coloured / torch.minimum(above, below).clamp(min=DARKEST)) / 0.25) * bright


def _reddest(strip: Strip, skin: Tensor) -> Colour:
    """The mean of the four reddest colours that are not dark: lips, not teeth, skin or the line between the lips."""
    dark = (0.7 - relative(strip, skin)).clamp(min=0)
    redness = strip[:, 0] / (strip[:, 0] + strip[:, 1] + strip[:, 2] + 0.05) - 0.3 * dark
    order = redness.topk(4, dim=1).indices
    chosen = strip.gather(2, order[:, None].expand(-1, 3, -1))
    return ((chosen[..., 0] + chosen[..., 1] + chosen[..., 2] + chosen[..., 3]) / 4)[:, :, None, None]


def _valley(strip: Strip, skin: Tensor) -> Profile:
    """How much darker a place is than those above and below it."""
    light, reach = relative(strip, skin), 3
    around = torch.cat([light[:, :1].expand(-1, reach), light, light[:, -1:].expand(-1, reach)], 1)
    return torch.minimum(around[:, : -2 * reach], around[:, 2 * reach :]) - light
