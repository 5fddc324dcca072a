"""The filters that corruptions share, batched: Gaussian, streak, centre zoom, box reduction."""

import math
from functools import lru_cache
from itertools import accumulate, repeat

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

Planes = Float[Tensor, "batch channels height width"]


def gaussian(images: Planes, sigma: float) -> Planes:
    """Gaussian blur with edges repeated, out to four sigma, as scipy.ndimage.gaussian_filter(mode="nearest")."""
    radius = int(4 * sigma + 0.5)
    weights = _gaussian_weights(radius, sigma)
    padded = F.pad(images, (radius, radius, radius, radius), mode="replicate")
    return _along(_along(padded, weights, 2, images.shape[2]), weights, 3, images.shape[3])


def mirrored_gaussian(planes: Planes, sigma: tuple[float, float]) -> Planes:
    """Gaussian blur with the image mirrored at its edges, out to three sigma, which may be a side of the image at most.

    As scipy.ndimage.gaussian_filter(mode="reflect", truncate=3).

    Args:
        sigma: along the rows' axis and along the columns', in pixels.
    """
    for dim, one in zip((2, 3), sigma, strict=True):
        length, radius = planes.shape[dim], int(3 * one + 0.5)
        before = planes.narrow(dim, 0, radius).flip(dim)
        after = planes.narrow(dim, length - radius, radius).flip(dim)
        padded = torch.cat([before, planes, after], dim)
        planes = _along(padded, _gaussian_weights(radius, one), dim, length)
    return planes


def _along(images: Planes, weights: tuple[float, ...], dim: int, length: int) -> Planes:
    """Correlation with symmetric weights along one dimension: a sum of slices, faster than a convolution this thin."""
    last = len(weights) - 1
    total = images.narrow(dim, last // 2, length) * weights[last // 2]
    for step in range(last // 2):
        pair = images.narrow(dim, step, length) + images.narrow(dim, last - step, length)
        total.add_(pair, alpha=weights[step])
    return total


@lru_cache
def _gaussian_weights(radius: int, sigma: float) -> tuple[float, ...]:
    raw = [math.exp(-0.5 * (step / sigma) ** 2) for step in range(-radius, radius + 1)]
    return tuple(one / sum(raw) for one in raw)


def streak(images: Planes, radius: int, sigma: float, degrees: Float[Tensor, " batch"]) -> Planes:
    """One-sided motion blur: image i of the sum is moved by i pixels along the angle, its weight falls as a Gaussian.

    Edges repeat. The sum ends where a shift reaches the image's size, and the weights are not made to sum to 1 again.
    """
    batch, _, height, width = images.shape
    columns, rows, reached = _shifts(2 * radius + 1, degrees, height, width)
    raw = torch.exp(-(torch.arange(2 * radius + 1, dtype=torch.float64) ** 2) / (2 * sigma**2))
    weights = (raw / raw.sum()).tolist()
    pad_x, pad_y = int(columns.abs().max()), int(rows.abs().max())
    padded = F.pad(images, (pad_x, pad_x, pad_y, pad_y), mode="replicate")
    if images.is_cuda:
        return _streak_gathered(padded, columns, rows, reached, weights, (height, width))
    result = torch.empty_like(images)
    for one in range(batch):
        total = result[one]
        total.zero_()
        steps = list(zip(columns[one].tolist(), rows[one].tolist(), strict=True))[: int(reached[one])]
        for weight, (right, down) in _merged(steps, weights):
            top, left = pad_y - down, pad_x - right
            total.add_(padded[one, :, top : top + height, left : left + width], alpha=weight)
    return result


def _shifts(
    length: int, degrees: Float[Tensor, " batch"], height: int, width: int
) -> tuple[Int[Tensor, "batch length"], Int[Tensor, "batch length"], Int[Tensor, " batch"]]:
    """Pixels to the right and down of each term, and how many terms stay inside the image; on the CPU."""
    angle = torch.deg2rad(degrees.double().cpu())[:, None]
    step = torch.arange(length, dtype=torch.float64)
    columns = -torch.ceil(step * torch.cos(angle) - 0.5).to(torch.int64)
    rows = -torch.ceil(step * torch.sin(angle) - 0.5).to(torch.int64)
    inside = (columns.abs() < width) & (rows.abs() < height)
    reached = inside.to(torch.int64).cumprod(1).sum(1)
    outside = torch.arange(length) >= reached[:, None]
    return columns.masked_fill(outside, 0), rows.masked_fill(outside, 0), reached


def _merged(steps: list[tuple[int, int]], weights: list[float]) -> list[tuple[float, tuple[int, int]]]:
    """Terms with equal shifts become one."""
    found: dict[tuple[int, int], float] = {}
    for step, weight in zip(steps, weights, strict=False):
        found[step] = found.get(step, 0.0) + weight
    return [(weight, step) for step, weight in found.items()]


def _streak_gathered(
    padded: Planes,
    columns: Int[Tensor, "batch length"],
    rows: Int[Tensor, "batch length"],
    reached: Int[Tensor, " batch"],
    weights: list[float],
    size: tuple[int, int],
) -> Planes:
    """The same sum, a launch a term instead of a launch a term and image."""
    (batch, channels, high, wide), (height, width) = padded.shape, size
    device = padded.device
    pad_y, pad_x = (high - height) // 2, (wide - width) // 2
    at = (torch.arange(height, device=device)[:, None] + pad_y) * wide + torch.arange(width, device=device) + pad_x
    offsets = -(rows * wide + columns).to(device)
    inside = (torch.arange(len(weights)) < reached[:, None]).to(device, padded.dtype)
    flat = padded.view(batch, channels, -1)
    total = torch.zeros(batch, channels, height * width, device=device, dtype=padded.dtype)
    for step, weight in enumerate(weights):
        index = at.view(1, 1, -1) + offsets[:, step].view(-1, 1, 1)
        moved = flat.gather(2, index.expand(-1, channels, -1))
        total.addcmul_(moved, inside[:, step].view(-1, 1, 1), value=weight)
    return total.view(batch, channels, height, width)


def centre_zoom(images: Planes, zoom: float) -> Planes:
    """The centre of ceil(side / zoom) pixels, enlarged bilinearly with end points aligned to round(that x zoom)."""
    height, width = images.shape[-2:]
    inner = [math.ceil(side / zoom) for side in (height, width)]
    top, left = (height - inner[0]) // 2, (width - inner[1]) // 2
    centre = images[..., top : top + inner[0], left : left + inner[1]]
    size = [round(side * zoom) for side in inner]
    return F.interpolate(centre, size=size, mode="bilinear", align_corners=True)


@lru_cache
@torch.inference_mode(False)
def box_matrix(length: int, reduced: int) -> Float[Tensor, "reduced length"]:
    """Row i averages the pixels whose centres lie in the i-th of `reduced` equal boxes: Pillow's BOX, whole pixels."""
    scale = length / reduced
    offset = torch.arange(length, dtype=torch.float64) + 0.5 - (torch.arange(reduced)[:, None] + 0.5) * scale
    inside = (offset / scale > -0.5) & (offset / scale <= 0.5)
    return (inside / inside.sum(1, keepdim=True)).to(torch.float32)


@lru_cache
@torch.inference_mode(False)
def box_taps(length: int, reduced: int, device: torch.device) -> list[tuple[Tensor, Float[Tensor, "reduced 1"]]]:
    """The same as pairs (rows to take, their weights), as many as the largest box has pixels."""
    matrix = box_matrix(length, reduced)
    first, most = matrix.argmax(1), int((matrix > 0).sum(1).max())
    taps = [(first + tap).clamp_(max=length - 1) for tap in range(most)]
    weights = [matrix.gather(1, tap[:, None]).mul_((first + at < length)[:, None]) for at, tap in enumerate(taps)]
    return [(tap.to(device), weight.to(device)) for tap, weight in zip(taps, weights, strict=True)]


@lru_cache
@torch.inference_mode(False)
def nearest_index(length: int, reduced: int, device: torch.device) -> Int[Tensor, " length"]:
    """Of which reduced pixel each of `length` pixels is a copy; ties fall as in Pillow, which adds step upon step."""
    step = reduced / length
    places = accumulate(repeat(step, length - 1), initial=0.5 * step)
    return torch.tensor([min(int(place), reduced - 1) for place in places], device=device)
