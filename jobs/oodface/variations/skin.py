"""Which colours are skin, hair or neither, judged by the face itself."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from jobs.oodface.scenario import Images
from jobs.oodface.variations.base import Face, Plane
from jobs.oodface.variations.drawing import Colour, luma, sample, smooth

# cheeks, bridge of the nose, forehead; and around the forehead, where there is hair if there is any
SKIN = (
    *((-0.5, 0.5), (0.5, 0.5), (-0.4, 0.65), (0.4, 0.65), (-0.6, 0.4), (0.6, 0.4)),
    *((0.0, 0.2), (-0.2, -0.5), (0.2, -0.5)),
)
HAIR = (
    *((0.0, -1.3), (-0.35, -1.28), (0.35, -1.28), (-0.7, -1.12), (0.7, -1.12)),
    *((-0.95, -0.8), (0.95, -0.8), (-1.08, -0.45), (1.08, -0.45)),
)
DARKEST = 0.05  # luma below which a colour is not divided by


@dataclass(frozen=True)
class Tones:
    """Colours compared with the skin's.

    Attributes:
        skin: the skin's colour.
        light: each pixel's luma over the skin's.
        apart: how far each pixel's chromaticity (RGB over the largest channel) is from the skin's, at most 1.
    """

    skin: Colour
    light: Plane
    apart: Plane

    def tinted(self, near: float, far: float) -> Plane:
        """How much each pixel has the skin's tint whatever its brightness: 1 within `near` of it, 0 beyond `far`."""
        return smooth((far - self.apart) / (far - near))

    @property
    def skinlike(self) -> Plane:
        """1 for the skin's tint in light and half shade."""
        return self.tinted(0.1, 0.25) * smooth((self.light - 0.45) / 0.25)


def compare(colours: Images, skin: Colour) -> Tones:
    """The tones of colours: an image's, or a single one's."""
    tints = [one / (one.amax(1, keepdim=True) + 0.02) for one in (colours, skin)]
    return Tones(skin, relative(colours, skin), (tints[0] - tints[1]).abs().amax(1))


def relative(colours: Images, other: Colour) -> Plane:
    """The colours' luma over another's."""
    return luma(colours)[:, 0] / luma(other)[:, 0].clamp(min=DARKEST)


def colour_at(images: Images, face: Face, places: Sequence[tuple[float, float]]) -> Colour:
    """The median colour, channel by channel, at some places (u, v): one hair or highlight among them does not count."""
    spots = torch.tensor(places, device=images.device, dtype=images.dtype)
    x, y = face.pixels(spots[None, None, :, 0], spots[None, None, :, 1])
    return sample(images, x, y)[:, :, 0].median(2).values[:, :, None, None]


def skin_colour(images: Images, face: Face) -> Colour:
    """The median over cheeks, nose and forehead."""
    return colour_at(images, face, SKIN)


def hair_colour(images: Images, face: Face) -> Colour:
    """The median around the forehead; skin or background where there is no hair."""
    return colour_at(images, face, HAIR)


def saturation(colours: Tensor) -> Tensor:
    """HSV's saturation of colours, whose channels are dimension 1; that dimension goes."""
    return 1 - colours.amin(1) / (colours.amax(1) + 0.02)
