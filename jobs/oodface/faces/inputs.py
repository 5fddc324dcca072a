"""Crops as a model of the user's own wants them."""

from __future__ import annotations

import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from jobs.oodface.faces.config import OwnFace


def configured(
    crops: Float[Tensor, "batch 3 height width"], face: OwnFace, size: tuple[int, int]
) -> Float[Tensor, "batch 3 _ _"]:
    """Crops, RGB in [0, 1], resized to `size` (height and width, px), in the model's colour order and standardised."""
    crops = crops.float()
    if crops.shape[2:] != size:
        crops = F.interpolate(crops, size, mode="bilinear", align_corners=False)
    if face.colour == "bgr":
        crops = crops.flip(1)
    mean, std = (crops.new_tensor(values)[:, None, None] for values in (face.mean, face.std))
    return (crops * 255 - mean) / std
