"""Data & Processing: Gaussian, impulse, shot, speckle and salt-pepper noise, JPEG compression."""

import math
from functools import lru_cache
from typing import Literal

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from jobs.oodface.randomness import Random, remixed, unit
from jobs.oodface.scenario import Draws, Images, Scenario
from jobs.oodface.threads import each

CATEGORY = "Data & Processing"


class GaussianNoise(Scenario):
    """Normal noise, the same on dark and bright pixels."""

    name, title, category = "gaussian_noise", "Gaussian Noise", CATEGORY
    levels = (0.08, 0.12, 0.18, 0.26, 0.38)

    def draw(self, random: Random, severity: int, height: int, width: int) -> Draws:
        """noise: (batch, 3, height, width) standard normal."""
        return {"noise": random.normal(3, height, width)}

    def apply(self, images: Images, severity: int, draws: Draws) -> Images:
        """x + c n."""
        return torch.add(images, draws["noise"], alpha=self.level(severity))


class SpeckleNoise(Scenario):
    """Normal noise in proportion to the pixel."""

    name, title, category = "speckle_noise", "Speckle Noise", CATEGORY
    levels = (0.15, 0.2, 0.35, 0.45, 0.6)
    draw = GaussianNoise.draw

    def apply(self, images: Images, severity: int, draws: Draws) -> Images:
        """x + c x n."""
        return torch.addcmul(images, images, draws["noise"], value=self.level(severity))


class ImpulseNoise(Scenario):
    """Single values, channel by channel, put to 0 or 1."""

    name, title, category = "impulse_noise", "Impulse Noise", CATEGORY
    levels = (0.03, 0.06, 0.09, 0.17, 0.27)

    def draw(self, random: Random, severity: int, height: int, width: int) -> Draws:
        """chance: (batch, 3, height, width) in [0, 1): below c/2 a value becomes 0, from there to c it becomes 1."""
        return {"chance": random.uniform(3, height, width)}

    def apply(self, images: Images, severity: int, draws: Draws) -> Images:
        """Each value is replaced with probability c."""
        chance, share = draws["chance"], self.level(severity)
        return torch.where(chance < share, (chance >= share / 2).to(images.dtype), images)


class ShotNoise(Scenario):
    """The noise of counting photons."""

    name, title, category = "shot_noise", "Shot Noise", CATEGORY
    levels = (60, 25, 12, 5, 3)

    def draw(self, random: Random, severity: int, height: int, width: int) -> Draws:
        """bits: (batch, 3, height, width) int32, of which Poisson counts are made when the image is known."""
        return {"bits": random.bits(3, height, width)}

    def apply(self, images: Images, severity: int, draws: Draws) -> Images:
        """Poisson(c x) / c."""
        photons = self.level(severity)
        return poisson(images, photons, draws["bits"]).div_(photons)


STEPS = 256  # of the pixel's value: Poisson(a + b) is Poisson(a) + Poisson(b), with a from a table of these
SLOTS = 256  # of an alias table: more than any count that occurs at 60 photons (P(X > 255) < 1e-70)
REST_TERMS = 6  # P(X > 6) < 1e-8 at the largest mean of a rest, 60/255


def poisson(images: Images, photons: int, bits: Int[Tensor, "batch 3 height width"]) -> Images:
    """Counts with mean photons x images, exact in distribution to the 2^-24 of a 32-bit draw.

    The mean is split into that of the next lower 8-bit value, drawn from an alias table (Walker, 1977) with one look,
    and the small rest, drawn by inversion; images that came from 8-bit files have none.
    """
    scaled = images.clamp(0, 1).mul_(STEPS - 1)
    step = scaled.add(1e-3).to(torch.int32)  # 8-bit values divided by 255 come back as they were
    own = bits & (SLOTS - 1)
    entry = _table(photons, images.device).index_select(0, torch.add(own, step, alpha=SLOTS).view(-1)).view_as(own)
    counts = torch.where(bits < entry, own, entry.bitwise_and(SLOTS - 1)).to(images.dtype)
    left = F.threshold_(scaled.sub_(step), 1e-3, 0.0)
    if images.is_cuda or bool(left.any()):
        counts.add_(_small_poisson(left.mul_(photons / (STEPS - 1)), unit(remixed(bits))))
    return counts


def _small_poisson(mean: Images, chance: Images) -> Images:
    """By inversion, for means well below 1: how many partial sums of the distribution lie below the chance."""
    term = torch.exp(-mean)
    cumulated, counts = term.clone(), torch.zeros_like(mean)
    for count in range(1, REST_TERMS + 1):
        counts.add_(chance >= cumulated)
        cumulated.add_(term.mul_(mean).div_(count))
    return counts


@lru_cache
@torch.inference_mode(False)
def _table(photons: int, device: torch.device) -> Int[Tensor, " entries"]:
    """Alias tables of Poisson(photons k / 255), k = 0..255, one after another.

    Entry j of a table is taken with the lowest 8 bits of a word: its upper 24 bits are the chance of j itself, as a
    word to compare with, its lower 8 bits the count that stands in for j.
    """
    entries = []
    counts = torch.arange(SLOTS, dtype=torch.float64)
    for step in range(STEPS):
        mean = photons * step / (STEPS - 1)
        log = counts * math.log(mean) - mean - torch.lgamma(counts + 1) if mean else torch.where(counts > 0, -1e9, 0.0)
        chance, alias = _alias(torch.exp(log))
        threshold = (chance * (1 << 24)).round().to(torch.int64).clamp_(max=(1 << 24) - 1)
        entries.append((threshold - (1 << 23)) * SLOTS + alias)
    return torch.cat(entries).to(device, torch.int32)


def _alias(weights: Float[Tensor, " slots"]) -> tuple[Float[Tensor, " slots"], Int[Tensor, " slots"]]:
    """Vose's construction: every slot holds one of its own outcomes with a chance, and one other outcome else."""
    scaled = (weights / weights.sum() * len(weights)).tolist()
    chance, alias = [1.0] * len(scaled), list(range(len(scaled)))
    small = [at for at, one in enumerate(scaled) if one < 1]
    large = [at for at, one in enumerate(scaled) if one >= 1]
    while small and large:
        less, more = small.pop(), large.pop()
        chance[less], alias[less] = scaled[less], more
        scaled[more] -= 1 - scaled[less]
        (small if scaled[more] < 1 else large).append(more)
    return torch.tensor(chance, dtype=torch.float64), torch.tensor(alias)


class SaltPepperNoise(Scenario):
    """Whole pixels put to black or white, drawn with replacement; the last draw of a pixel counts."""

    name, title, category = "salt_pepper_noise", "Salt-Pepper Noise", CATEGORY
    levels = (0.02, 0.04, 0.06, 0.08, 0.1)

    def draw(self, random: Random, severity: int, height: int, width: int) -> Draws:
        """pixel: (batch, int(3 r height width)) flat index. white: as many, 0 or 1."""
        number = int(height * width * 3 * self.level(severity))
        return {"pixel": random.integers(0, height * width, number), "white": random.integers(0, 2, number)}

    def apply(self, images: Images, severity: int, draws: Draws) -> Images:
        """All three channels of a drawn pixel."""
        pixel, white = draws["pixel"], draws["white"]
        batch, _, height, width = images.shape
        order = torch.arange(1, pixel.shape[1] + 1, device=pixel.device) * 2
        last = torch.zeros(batch, height * width, dtype=torch.int64, device=pixel.device)
        last.scatter_reduce_(1, pixel, order + white, "amax")
        last = last.view(batch, 1, height, width)
        return torch.where(last > 1, (last & 1).to(images.dtype), images)


class JpegCompression(Scenario):
    """The block artefacts of JPEG at low quality, 4:2:0.

    codec: "real" cuts to 8 bits and runs libjpeg, as the benchmark does; "differentiable" computes the same steps in
    floating point, so that gradients pass.
    """

    name, title, category = "jpeg_compression", "JPEG Compression", CATEGORY
    levels = (25, 18, 15, 10, 7)

    def __init__(self, codec: Literal["real", "differentiable"] = "real") -> None:
        self.codec = codec

    def apply(self, images: Images, severity: int, draws: Draws) -> Images:
        """Compressed and read again."""
        quality = self.level(severity)
        if self.codec == "differentiable":
            from kornia.enhance import jpeg_codec_differentiable

            quality = torch.full((len(images),), float(quality), device=images.device)
            return jpeg_codec_differentiable(images, quality)
        return jpeg(images, quality)


def jpeg(images: Images, quality: int) -> Images:
    """JPEG by the real codec, 4:2:0; 8 bits in and out, and what lies outside [0, 1] is cut.

    On the CPU for images of any device: nvJPEG as torchvision calls it keeps the full chroma (4:4:4).
    """
    import cv2

    pixels = images.clamp(0, 1).mul_(255).to(torch.uint8).cpu()
    decoded = torch.empty_like(pixels)

    def coded(pair: tuple[np.ndarray, np.ndarray]) -> None:
        one, result = pair
        _, file = cv2.imencode(".jpg", cv2.merge(one[::-1]), (cv2.IMWRITE_JPEG_QUALITY, quality))
        result[2], result[1], result[0] = cv2.split(cv2.imdecode(file, cv2.IMREAD_COLOR))

    each(coded, zip(pixels.numpy(), decoded.numpy(), strict=True))
    return decoded.to(images.device, images.dtype).div_(255)
