"""Rotation: the head turned to the left and to the right."""

import math

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from jobs.oodface.scenario import Draws, Images
from jobs.oodface.variations.base import LEANING, NOSE, Face, Plane, Variation
from jobs.oodface.variations.drawing import bump, paint, sample, smooth, warped

BACKGROUND = 14  # patches along the shorter side, of which each gives one colour to what was never seen
Lattice = Float[Tensor, "batch rows columns"]


class _Rotate(Variation):
    """The head turned about its vertical axis.

    A generic surface of a head is turned by the angle and seen from the front again. Of places that come to lie behind
    one another the front one is seen; what comes into view from the side is the stretched edge of what was seen.
    """

    category = "Rotation"
    levels = (8, 16, 24, 32, 40)  # degrees of yaw
    TOWARDS = 1  # 1: the nose moves to the image's right
    REACH, ROWS, COLUMNS = 2.2, 111, 177  # a lattice of about a pixel of a crop of 112, for sharp contours
    TOP, BOTTOM = -1.8, 2.8

    def vary(self, images: Images, face: Face, severity: int, draws: Draws) -> Images:
        """Each row of the surface is projected on a lattice, and the projection inverted."""
        angle = math.radians(self.level(severity))
        axis = {"device": images.device, "dtype": images.dtype}
        u = torch.linspace(-self.REACH, self.REACH, self.COLUMNS, **axis)[None, None]
        v = torch.linspace(self.TOP, self.BOTTOM, self.ROWS, **axis)[None, :, None]
        projected = u + self._shift(face, u * self.TOWARDS, v, angle)
        source = visible(projected, u.expand_as(projected))
        column = (face.u * self.TOWARDS / self.REACH + 1) * ((self.COLUMNS - 1) / 2)
        row = (face.v - self.TOP) * ((self.ROWS - 1) / (self.BOTTOM - self.TOP))
        row = row.expand_as(column)
        moves = sample((source - u)[:, None], column, row)[:, 0]
        # at a contour the place behind it is seen right beside it, and nothing that lies between
        nearest = sample((source - u)[:, None], column, row, mode="nearest")[:, 0]
        moves = torch.where((moves - nearest).abs() < 0.04, moves, nearest)
        u = face.u + moves * self.TOWARDS
        return self._filled(images, face, u, warped(images, face, u, face.v))

    @staticmethod
    def _filled(images: Images, face: Face, u: Plane, turned: Images) -> Images:
        """What the image does not show gets its border's colours, smoothed along it: repeated they would be streaks."""
        x, y = face.pixels(u, face.v)
        height, width = images.shape[2:]
        outside = torch.maximum((x - (width - 1) / 2).abs() - width / 2, (y - (height - 1) / 2).abs() - height / 2)
        size = max(1, min(height, width) // BACKGROUND)
        coarse = F.avg_pool2d(images, size, ceil_mode=True, count_include_pad=False)
        border = sample(coarse, (x + 0.5) / size - 0.5, (y + 0.5) / size - 0.5)
        return paint(turned, border, smooth(outside / (0.15 * face.unit)))

    def _shift(self, face: Face, u: Tensor, v: Tensor, angle: float) -> Lattice:
        """How far each place moves, in the direction of the turn; u is measured as in the image."""
        nose_u, nose_v = face.marks[NOSE]
        mouth_u, mouth_v = face.mouth
        middle = mouth_u / mouth_v * v.clamp(*LEANING)
        across = (u - middle) * self.TOWARDS
        high = (v - 0.25) / 2.0
        depth = self._depth(across, high) - face.turned / 0.45 * self.TOWARDS * across.clamp(-1.2, 1.2)
        nose = bump(((u - nose_u) / 0.42).square() + ((v - nose_v + 0.1) / 0.56).square())
        head = smooth((1.0 - ((across / 1.85).square() + high.square() * 0.55).sqrt()) / 0.3)
        moved_by = across * (math.cos(angle) - 1) + (depth + 0.3 * nose) * math.sin(angle)
        return moved_by * head

    @staticmethod
    def _depth(across: Tensor, high: Tensor) -> Tensor:
        return -0.43 * across.square() - 0.15 * high.square()


def visible(projected: Lattice, source: Lattice) -> Lattice:
    """For each place of a regular lattice, which source is seen there.

    Args:
        projected: to which place along its row each source goes.
        source: the sources, and the places that are asked for: the lattice's own columns, rising.

    A source that goes to a place which an earlier one has gone beyond lies behind that one and is not seen.
    """
    front = projected.cummax(2).values
    # equal values would leave a place undecided
    front = front + torch.arange(front.shape[2], device=front.device, dtype=front.dtype) * 1e-5
    after = torch.searchsorted(front.contiguous(), source.contiguous()).clamp(1, front.shape[2] - 1)
    low, high = front.gather(2, after - 1), front.gather(2, after)
    share = ((source - low) / (high - low)).clamp(0, 1)
    before = source.gather(2, after - 1)
    return before + (source.gather(2, after) - before) * share


class RotateLeft(_Rotate):
    """A head turned to the image's left: a procedural stand-in for a generator's yaw, not the paper's generator."""

    name, title = "rotate_left", "Rotate Left"
    TOWARDS = -1


class RotateRight(_Rotate):
    """A head turned to the image's right: a procedural stand-in for a generator's yaw, not the paper's generator."""

    name, title = "rotate_right", "Rotate Right"
