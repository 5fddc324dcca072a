"""Facial Expression: mouth closed and opened, eyes closed and opened."""

import torch
from torch import Tensor

from jobs.oodface.scenario import Draws, Images
from jobs.oodface.variations.base import LEFT_EYE, RIGHT_EYE, Each, Face, Plane, Variation
from jobs.oodface.variations.drawing import Colour, bump, colour, inside, luma, moved, paint, sample, smooth
from jobs.oodface.variations.mouth import find_mouth
from jobs.oodface.variations.skin import DARKEST, relative, saturation, skin_colour

CATEGORY = "Facial Expression"


class MouthClose(Variation):
    """Lips brought together: a procedural stand-in for the smile direction of a generator, not the paper's generator.

    What lies between the lips disappears at their seam and the chin follows; closed lips are pressed thinner.
    """

    name, title, category = "mouth_close", "Mouth Close", CATEGORY
    levels = (0.2, 0.4, 0.6, 0.8, 1.0)

    def vary(self, images: Images, face: Face, severity: int, draws: Draws) -> Images:
        """A share of the gap, and of the lips' own height, is left out at the seam."""
        strength = self.level(severity)
        mouth = find_mouth(images, face)
        part = mouth.part(face, 1.35, -1.6, 2.6)
        x, y = mouth.coordinates(part.u, part.v)
        band = mouth.pale
        below = y - band.middle - mouth.line(x, band)
        # what lies within `half` of the middle vanishes; each lip closes in, and further away the change fades
        half = (0.14 + 0.55 * band.height) * strength * bump((x / 1.3).square().square())
        fading = torch.where(below < 0, smooth(1 + below / 0.9), smooth(1 - below / 1.7))
        shift = half * fading * torch.where(below < 0, -1.0, 1.0)
        closed = moved(images, part, part.u, part.v + shift * mouth.half)
        near = bump((x / 1.2).square()) * bump((below / 0.55).square()) * band.sure
        light = relative(closed, mouth.lips)
        coloured = saturation(closed) / saturation(mouth.lips).clamp(min=DARKEST)
        teeth = smooth((0.95 - coloured) / 0.25) * smooth((light - 0.75) / 0.25) * smooth(near / 0.25)
        closed = paint(closed, mouth.lips * (0.8 + 0.2 * light.clamp(0.6, 1.3)[:, None]), teeth * strength * 0.9)
        seam = bump((below / 0.12).square()) * bump((x / 1.05).square()).sqrt() * band.sure
        closed = paint(closed, mouth.lips * 0.45, seam * strength * 0.75)
        return part.put(images, closed)


class MouthOpen(Variation):
    """Lips parted, jaw dropped: a procedural stand-in for a generator's mouth direction, not the paper's generator."""

    name, title, category = "mouth_open", "Mouth Open", CATEGORY
    levels = (0.16, 0.32, 0.48, 0.64, 0.8)  # the opening's height in half widths of the mouth
    CAVITY, TONGUE, TEETH = (0.2, 0.07, 0.06), (0.68, 0.34, 0.33), (1.0, 0.96, 0.89)
    RAISED = 0.2  # the upper lip's share of the opening
    NARROWED = 0.25

    def vary(self, images: Images, face: Face, severity: int, draws: Draws) -> Images:
        """The image is cut along the seam, the lower part moved down, and the gap painted: teeth, dark, tongue."""
        height = self.level(severity)
        mouth = find_mouth(images, face)
        part = mouth.part(face, 2.9, -2.6, 4.9)
        x, y = mouth.coordinates(part.u, part.v)
        band = mouth.teeth
        seam = band.middle + 0.5 * band.height + 0.06 * band.sure + mouth.line(x, band)
        ellipse = (1 - (x / 0.84).square()).clamp(min=0)
        across = 0.6 * ellipse + 0.4 * ellipse.sqrt()
        top, bottom = seam - self.RAISED * height * across, seam + (1 - self.RAISED) * height * across
        jaw = across + (bump((x / 2.8).square()) - across) * smooth((y - bottom) / 0.9)
        lowered = (1 - self.RAISED) * height * jaw * smooth((2.9 - (y - bottom)) / 1.6)
        raised = self.RAISED * height * across * smooth(1 - (top - y) / 0.7)
        down = torch.where(y < (top + bottom) / 2, raised, -lowered) * mouth.half
        drawn_in = self.NARROWED * height * bump((x / 2.2).square()) * bump(((y - bottom) / 1.6).square())
        aside = x * drawn_in * mouth.half
        opened = moved(images, part, part.u + aside, part.v + mouth.tilt * aside + down)
        light = luma(skin_colour(images, face))
        soft = 1.4 * face.pixel / mouth.half
        gap = inside(torch.maximum(top - y, y - bottom), soft) * smooth((bottom - top) / soft)
        return part.put(images, paint(opened, self._hollow(x, y, top, bottom, soft, light, height, band.sure), gap))

    def _hollow(
        self, x: Plane, y: Plane, top: Plane, bottom: Plane, soft: Each, light: Tensor, height: float, shown: Each
    ) -> Images:
        """What is seen between the lips. Upper teeth are drawn only where the image shows none of its own."""
        cavity, tongue, teeth = (colour(rgb, light) for rgb in (self.CAVITY, self.TONGUE, self.TEETH))
        share = (y - top) / (bottom - top).clamp(min=1e-3)
        hollow = cavity * (0.4 + light) * (0.75 + 0.6 * (share - 0.5).square())[:, None]
        hollow = paint(hollow, tongue * light, smooth((share - 0.5) / 0.5) * bump((x / 0.8).square()) * 0.8)
        high = min(0.22, 0.6 * height)
        row = inside(y - top - high * (1 - 0.5 * x.square()), 1.6 * soft) * smooth((0.72 - x.abs()) / 0.3)
        shaded = (0.3 + 0.68 * light) * (0.7 + 0.3 * smooth((y - top) / 0.12) - 0.35 * x.square())[:, None]
        return paint(hollow, teeth * shaded, row * (1 - shown) * 0.92)


class _Eyes(Variation):
    """Changes both eyes, in coordinates about the centre of each: x towards the nose, y down, in its half widths."""

    HALF = 0.25  # of the distance between the eyes

    def frame(self, face: Face, which: int) -> tuple[Each, Each, Each, Each]:
        """The centre's u and v, and the units of the face of one x and one y."""
        half = self.HALF * (face.marks[LEFT_EYE][0] - face.marks[RIGHT_EYE][0])
        inward = 1.0 if which == RIGHT_EYE else -1.0
        # the farther eye of a turned head is seen from the side
        across = half * (1 + inward * face.turned).clamp(0.7, 1.1)
        return *face.marks[which], inward * across, half


class EyeClose(_Eyes):
    """Lids lowered: a procedural stand-in for a generator's eye direction, not the paper's generator."""

    name, title, category = "eye_close", "Eye Close", CATEGORY
    levels = (0.2, 0.4, 0.6, 0.8, 1.0)
    FOLD = -1.15  # from here down the skin is stretched
    # where there is skin around an eye: two rows above it, two below
    COLUMNS, ROWS = (-0.9, -0.45, 0.0, 0.45, 0.9), (-0.95, -0.75, 0.85, 1.1)

    def vary(self, images: Images, face: Face, severity: int, draws: Draws) -> Images:
        """The skin above each eye is stretched down to a lowered margin, tinted as a lid and edged with lashes."""
        skin = skin_colour(images, face)
        for which in (RIGHT_EYE, LEFT_EYE):
            u, v, across, down = self.frame(face, which)
            part = face.part(u - 1.4 * across.abs(), u + 1.4 * across.abs(), v - 1.4 * down, v + 1.2 * down)
            images = part.put(images, self._close(images, part, which, self.level(severity), skin))
        return images

    def _close(self, images: Images, face: Face, which: int, closed: float, skin: Colour) -> Images:
        u, v, across, down = self.frame(face, which)
        x, y = (face.u - u) / across, (face.v - v) / down
        arch = bump((x / 1.35).square())
        upper, lower = -0.5 * arch, 0.36 * arch
        margin = upper + closed * (lower - upper)
        # above the margin the lid, stretched; nothing at all where margin and lid are one
        lifted = (y - self.FOLD) * ((upper - margin) / (margin - self.FOLD))
        lifted = torch.where((y > self.FOLD) & (y < margin), lifted, 0.0)
        result = moved(images, face, face.u, face.v + lifted * down)
        lid = self._lid(images, face, which, skin, x, y)
        soft = face.pixel / down
        shade = 1.0 - 0.12 * smooth((y - upper) / (margin - upper + 0.05)) - 0.12 * x.square()
        covered = inside(y - margin, soft) * smooth((y - upper + 0.3) / 0.35) * smooth(arch / 0.4)
        result = paint(result, lid * shade[:, None], covered * 0.9 * min(1.0, closed / 0.4))
        lashes = inside((y - margin).abs() - 0.05 - 0.02 * closed, 1.4 * soft) * smooth(arch / 0.3)
        return paint(result, lid * 0.28, lashes * (0.3 + 0.4 * closed))

    def _lid(self, images: Images, face: Face, which: int, skin: Colour, x: Plane, y: Plane) -> Images:
        """Skin as it would be where the eye is: blended from that above and below it, so that its light goes on."""
        u, v, across, down = self.frame(face, which)
        columns, rows = (torch.tensor(one, device=x.device, dtype=x.dtype) for one in (self.COLUMNS, self.ROWS))
        places = u + columns[None, None, :] * across, v + rows[None, :, None] * down
        around = sample(images, *face.pixels(*places))
        above = around[:, :, :2].amax(2)
        below = (around[:, :, 2] + around[:, :, 3]) / 2
        # deep-set eyes lie in shadow, which a lid that bulges forward leaves
        rim = torch.stack([torch.maximum(above, skin[..., 0] * 0.7), torch.maximum(below, skin[..., 0] * 0.75)], 2)
        rim = rim * 0.75 + skin * 0.25
        column = (x - self.COLUMNS[0]) / (self.COLUMNS[1] - self.COLUMNS[0])
        return sample(rim, column, ((y + 1.0) / 1.8).clamp(0, 1))


class EyeOpen(_Eyes):
    """Eyes widened, brows raised: a procedural stand-in for a generator's eye direction, not the paper's generator."""

    name, title, category = "eye_open", "Eye Open", CATEGORY
    levels = (0.12, 0.24, 0.36, 0.48, 0.6)

    def vary(self, images: Images, face: Face, severity: int, draws: Draws) -> Images:
        """Each eye is magnified about its centre, more in height than in width; the brow above it goes up."""
        wide = self.level(severity)
        (right, _, across, down), (left, *_) = (self.frame(face, which) for which in (RIGHT_EYE, LEFT_EYE))
        reach = 2.4 * down
        part = face.part(right - reach, left + reach, -3.3 * down, 1.8 * down)
        u, v = part.u, part.v
        for which in (RIGHT_EYE, LEFT_EYE):
            eye_u, eye_v, across, down = self.frame(face, which)
            x, y = (part.u - eye_u) / across, (part.v - eye_v) / down
            near = bump((x / 1.9).square()) * bump((y / 1.7).square())
            raised = 0.4 * wide * bump((x / 2.1).square()) * bump(((y + 1.6) / 1.6).square())
            u = u + x * across * (1 / (1 + 0.35 * wide * near) - 1)
            v = v + down * (y * (1 / (1 + wide * near) - 1) + raised)
        return part.put(images, moved(images, part, u, v))
