"""dlib's face network: a ResNet of 29 layers, 128 numbers a face (King 2017; weights CC0).

It was trained so that two photographs of one person lie nearer than .6 to each other (Euclidean, raw embeddings).
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from cluster.errors import UserError
from jobs.oodface.faces.dlib_format import DlibLayer, DlibNetwork, read_network
from jobs.oodface.faces.weights import PackagedFile, fill

WEIGHTS = PackagedFile(
    "face-recognition-models",
    "0.3.0",
    "face_recognition_models/models/dlib_face_recognition_resnet_model_v1.dat",
    "55533b28a95800a551ba546ba62fe69625c7e95a7061c338adffead08719da30",
)
SIDE = 150
DIM = 128

# Channels, and whether the block halves the image.
_BLOCKS = (
    *((32, False),) * 3,
    (64, True),
    *((64, False),) * 3,
    (128, True),
    *((128, False),) * 2,
    (256, True),
    *((256, False),) * 2,
    (256, True),
)


class Block(nn.Module):
    """Two convolutions beside a shortcut; a block that halves pools its shortcut and pads what is too small."""

    def __init__(self, inputs: int, outputs: int, halves: bool) -> None:
        super().__init__()
        self.halves = halves
        stride, padding = (2, 0) if halves else (1, 1)
        self.first = nn.Conv2d(inputs, outputs, 3, stride, padding)
        self.second = nn.Conv2d(outputs, outputs, 3, 1, 1)

    def forward(self, x: Float[Tensor, "batch inputs height width"]) -> Float[Tensor, "batch outputs rows columns"]:
        y = self.second(F.relu(self.first(x)))
        if not self.halves:
            return F.relu(x + y)
        shortcut = F.avg_pool2d(x, 2)
        size = [max(a, b) for a, b in zip(y.shape[1:], shortcut.shape[1:], strict=True)]
        return F.relu(_padded(y, size) + _padded(shortcut, size))


class DlibResNet(nn.Module):
    """The network with its scales, and what it does to pixels, folded into the convolutions."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 32, 7, stride=2)
        self.blocks = nn.Sequential()
        channels = self.stem.out_channels
        for width, halves in _BLOCKS:
            self.blocks.append(Block(channels, width, halves))
            channels = width
        self.head = nn.Linear(channels, DIM, bias=False)

    @property
    def convolutions(self) -> list[nn.Conv2d]:
        """All convolutions, in the order in which the image passes them."""
        return [self.stem, *(convolution for block in self.blocks for convolution in (block.first, block.second))]

    def forward(self, crops: Float[Tensor, "batch 3 150 150"]) -> Float[Tensor, "batch 128"]:
        """Embeddings as dlib gives them (length about 1.4) of dlib's chips, RGB in [0, 1]."""
        x = F.max_pool2d(F.relu(self.stem(crops.to(self.head.weight))), 3, 2)
        return self.head(self.blocks(x).mean((2, 3)))


def read_dlib_resnet(path: Path) -> DlibResNet:
    """The network in dlib's file at `path`, in evaluation mode.

    Raises:
        UserError: the file is cut short or holds another network.
    """
    file = read_network(path)
    network = DlibResNet()
    if [layer.name for layer in file.layers] != _names(network) or (file.rows, file.columns) != (SIDE, SIDE):
        raise UserError(f"{path} holds another dlib network: its layers are not those expected; name the right file")
    kernels = [layer for layer in file.layers if layer.name == "con_4"]
    scales = [layer for layer in file.layers if layer.name == "affine_"]
    for convolution, kernel, scale in zip(network.convolutions, kernels, scales, strict=True):
        _fill(convolution, kernel, scale, path)
    _fold_pixels(network.stem, file)
    fill(network.head.weight, _shaped(file.layers[-1].parameters, (256, DIM), path).T, path)
    return network.eval().to(memory_format=torch.channels_last)


def _names(network: DlibResNet) -> list[str]:
    names = ["con_4", "affine_", "relu_", "max_pool_2"]
    for block in network.blocks:
        names += ["con_4", "affine_", "relu_", "con_4", "affine_"]
        names += ["avg_pool_2", "add_prev_", "relu_"] if block.halves else ["add_prev_", "relu_"]
    return [*names, "avg_pool_2", "fc_2"]


def _fill(convolution: nn.Conv2d, kernel: DlibLayer, scale: DlibLayer, path: Path) -> None:
    outputs, *shape = convolution.weight.shape
    geometry = (outputs, *convolution.kernel_size, *convolution.stride, *convolution.padding)
    if kernel.integers != geometry:
        raise UserError(f"{path} holds another dlib network: a convolution {kernel.integers} where {geometry} belongs")
    split = len(kernel.parameters) - outputs
    weight = _shaped(kernel.parameters[:split], (outputs, *shape), path)
    bias = _shaped(kernel.parameters[split:], (outputs,), path)
    gamma, beta = _shaped(scale.parameters, (2, outputs), path)
    fill(convolution.weight, weight * gamma[:, None, None, None], path)
    fill(convolution.bias, bias * gamma + beta, path)


def _fold_pixels(stem: nn.Conv2d, file: DlibNetwork) -> None:
    """dlib sees (x - mean) / 256 of pixels from 0 to 255; the stem pads nothing, so it can do that itself."""
    weight = stem.weight.data.double()
    mean = torch.tensor(file.mean, dtype=torch.float64)
    stem.bias.data -= (weight.sum((2, 3)) @ mean / 256).float()
    stem.weight.data *= 255 / 256


def _shaped(values: np.ndarray, shape: Sequence[int], path: Path) -> Float[Tensor, "*shape"]:
    tensor = torch.as_tensor(values, dtype=torch.float64)
    if tensor.numel() != torch.Size(shape).numel():
        raise UserError(f"{path} holds another dlib network: {tensor.numel()} weights where {tuple(shape)} belong")
    return tensor.reshape(shape)


def _padded(x: Float[Tensor, "batch channels height width"], size: Sequence[int]) -> Float[Tensor, "batch c h w"]:
    """Zeros behind the last channel, at the bottom and at the right, up to `size`."""
    channels, height, width = (wanted - found for wanted, found in zip(size, x.shape[1:], strict=True))
    return F.pad(x, (0, width, 0, height, 0, channels))
