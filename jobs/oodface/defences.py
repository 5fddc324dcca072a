"""Input transformations put before a face model: RobFR's JPEG, bit-depth reduction, random resize and pad."""

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from jobs.oodface.corruptions.data import jpeg
from jobs.oodface.randomness import Random
from jobs.oodface.scenario import Images

JPEG_QUALITY = 80
STEP = 8  # of 255: what is left of the bit depth
DRAWS, SMALLEST = 10, 0.9  # random resize and pad: embeddings averaged, least scale


def defended(images: Images, defence: str, keys: Int[Tensor, " batch"]) -> list[Images]:
    """The images behind a defence, in [0, 1]: one form of them, or several whose embeddings are to be averaged.

    Args:
        defence: jpeg, bit_depth or resize_pad.
        keys: of the samples (`randomness.keys`); what is random depends on them alone.
    """
    if defence == "jpeg":
        return [jpeg(images, JPEG_QUALITY)]
    if defence == "bit_depth":
        return [(images * (255 / STEP)).round().mul_(STEP / 255).clamp_(0, 1)]
    random = Random(keys, images.device)
    return [resized_and_padded(images, random.uniform(3)) for _ in range(DRAWS)]


def resized_and_padded(images: Images, drawn: Float[Tensor, "batch 3"]) -> Images:
    """Each image scaled by .9 to 1 (bilinear), put somewhere in its own size, the rest black.

    drawn: in [0, 1): scale, place downwards, place to the right.
    """
    result = torch.zeros_like(images)
    height, width = images.shape[2:]
    for image, canvas, (scale, down, right) in zip(images, result, drawn.tolist(), strict=True):
        factor = SMALLEST + (1 - SMALLEST) * scale
        high, wide = max(1, round(height * factor)), max(1, round(width * factor))
        top, left = int(down * (height - high + 1)), int(right * (width - wide + 1))
        small = F.interpolate(image[None], size=(high, wide), mode="bilinear", align_corners=False)
        canvas[:, top : top + high, left : left + wide] = small[0]
    return result
