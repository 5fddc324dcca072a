"""Sensor: defocus blur, colour shift, pixelate."""

import math
from functools import lru_cache

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from jobs.oodface.filters import box_matrix, box_taps, nearest_index
from jobs.oodface.randomness import Random
from jobs.oodface.scenario import Draws, Images, Scenario

CATEGORY = "Sensor"
HUE_UNITS = 180  # of a full turn in OpenCV's 8-bit HSV: 2 degrees each


class DefocusBlur(Scenario):
    """Correlation with a disk whose edge is softened."""

    name, title, category = "defocus_blur", "Defocus Blur", CATEGORY
    levels = ((3, 0.1), (4, 0.5), (6, 0.5), (8, 0.5), (10, 0.5))
    at_once = 1

    def apply(self, images: Images, severity: int, draws: Draws) -> Images:
        """Borders are reflected without repeating the edge pixel."""
        kernel = disk(*self.level(severity))
        reach = kernel.shape[0] // 2
        height, width = images.shape[2:]
        padded = _reflect(images, reach)
        size = [_smooth_length(side + 2 * reach) for side in (height, width)]
        spectrum = _spectrum(self.level(severity), *size, images.device)
        blurred = torch.fft.irfft2(torch.fft.rfft2(padded, s=size).mul_(spectrum), s=size)
        return blurred[..., :height, :width]


@lru_cache
@torch.inference_mode(False)
def disk(radius: int, sigma: float) -> Float[Tensor, "side side"]:
    """A disk of sum 1 on a grid of at least 17 x 17, smoothed by a 3 x 3 Gaussian (5 x 5 beyond radius 8)."""
    reach, taps = (8, 3) if radius <= 8 else (radius, 5)
    axis = torch.arange(-reach, reach + 1)
    inside = (axis[:, None] ** 2 + axis**2 <= radius**2).to(torch.float64)
    weights = torch.exp(-((torch.arange(taps) - taps // 2).to(torch.float64) ** 2) / (2 * sigma**2))
    weights /= weights.sum()
    padded = F.pad((inside / inside.sum())[None, None], (taps // 2,) * 4, mode="reflect")
    return F.conv2d(padded, (weights[:, None] * weights)[None, None])[0, 0].to(torch.float32)


@lru_cache
@torch.inference_mode(False)
def _spectrum(level: tuple[int, float], height: int, width: int, device: torch.device) -> Tensor:
    # the conjugate turns the convolution of a product of spectra into a correlation
    return torch.fft.rfft2(disk(*level).to(device), s=(height, width)).conj().resolve_conj()


def _reflect(images: Images, reach: int) -> Images:
    """Reflection that goes back and forth where an image is smaller than its border."""
    rows, columns = (_bounced(side, reach, images.device) for side in images.shape[2:])
    if min(images.shape[2:]) > reach:
        return F.pad(images, (reach,) * 4, mode="reflect")
    return images[:, :, rows][..., columns]


def _bounced(side: int, reach: int, device: torch.device) -> Tensor:
    at = torch.arange(-reach, side + reach, device=device)
    if side == 1:
        return torch.zeros_like(at)
    period = 2 * (side - 1)
    at = at % period
    return torch.minimum(at, period - at)


def _smooth_length(length: int) -> int:
    """The next length whose only prime factors are 2, 3 and 5: Fourier transforms are fast there."""
    while True:
        rest = length
        for prime in (2, 3, 5):
            while rest % prime == 0:
                rest //= prime
        if rest == 1:
            return length
        length += 1


class ColorShift(Scenario):
    """Hue turned by a whole number of OpenCV's units of two degrees.

    From severity 3 on the range covers the whole circle, as in the authors' code; `narrow` reads their comment
    instead, which means degrees, and halves it.
    """

    name, title, category = "color_shift", "Color Shift", CATEGORY
    levels = (36, 72, 108, 144, 180)

    def __init__(self, narrow: bool = False) -> None:
        self.narrow = narrow

    def draw(self, random: Random, severity: int, height: int, width: int) -> Draws:
        """shift: (batch,) units in [-m, m]."""
        most = self.level(severity) // (2 if self.narrow else 1)
        return {"shift": random.integers(-most, most + 1)}

    def apply(self, images: Images, severity: int, draws: Draws) -> Images:
        """h := h + 2 shift degrees, around the circle."""
        sixths = draws["shift"].to(images.device, images.dtype) * (6 / HUE_UNITS)
        return turned_hue(images, sixths)


def turned_hue(images: Images, sixths: Float[Tensor, " batch"]) -> Images:
    """The images with their HSV hue moved by `sixths` of a turn a sample; saturation and value are kept."""
    red, green, blue = images.unbind(1)
    value, chroma = images.amax(1), images.amax(1) - images.amin(1)
    safe = chroma.clamp(min=torch.finfo(images.dtype).tiny)
    hue = torch.where(
        value == red,
        (green - blue) / safe,
        torch.where(value == green, (blue - red) / safe + 2, (red - green) / safe + 4),
    )
    hue += sixths[:, None, None]
    channels = []
    for start in (5, 3, 1):
        k = (hue + start).remainder(6)
        channels.append(torch.addcmul(value, chroma, torch.minimum(k, 4 - k).clamp(0, 1), value=-1))
    return torch.stack(channels, 1)


class Pixelate(Scenario):
    """Box-filtered to a share of the size, and back by repeating pixels."""

    name, title, category = "pixelate", "Pixelate", CATEGORY
    levels = (0.6, 0.5, 0.4, 0.3, 0.25)
    at_once = 5 << 15  # four images of 112 x 112: larger parts leave the cache between its steps

    def apply(self, images: Images, severity: int, draws: Draws) -> Images:
        """At least one pixel is left of each side."""
        reduced, index = self.rows(images, severity)
        return reduced.index_select(2, index)

    def rows(self, images: Images, severity: int) -> tuple[Images, Int[Tensor, " height"]]:
        """Rows of boxes, each box repeated along its row, and the row of boxes that each row of the result is."""
        images = images.float()
        height, width = images.shape[2:]
        high, wide = (max(1, math.floor(side * self.level(severity))) for side in (height, width))
        device = images.device
        (rows, weights), *others = box_taps(height, high, device)
        total = images.index_select(2, rows).mul_(weights)
        for rows, weights in others:
            total.addcmul_(images.index_select(2, rows), weights)
        # a product a plane, so that the order of its sums does not depend on the batch
        planes = total.flatten(0, 1)
        reduced = torch.bmm(planes, repeated_boxes(width, wide, device).expand(len(planes), -1, -1))
        return reduced.view_as(total), nearest_index(height, high, device)


@lru_cache
@torch.inference_mode(False)
def repeated_boxes(length: int, reduced: int, device: torch.device) -> Float[Tensor, "length length"]:
    """What a row of pixels is multiplied by to be averaged over boxes and repeated to its length again."""
    index = nearest_index(length, reduced, torch.device("cpu"))
    return box_matrix(length, reduced)[index].T.contiguous().to(device)
