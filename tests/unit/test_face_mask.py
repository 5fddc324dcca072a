"""The mask: what it covers at each severity, how it goes with a turned head, and what is printed on it."""

from __future__ import annotations

import math

import pytest
import torch

from jobs.oodface.randomness import Random, keys
from jobs.oodface.scenario import SEVERITIES
from jobs.oodface.variations.base import ARCFACE, Face, place_template
from jobs.oodface.variations.drawing import luma, sample
from jobs.oodface.variations.face_mask import FaceMask
from jobs.oodface.variations.prints import PATTERNS

SIDE = 224
SKIN = torch.tensor([0.8, 0.6, 0.5]).view(1, 3, 1, 1)
# right eye, left eye, nose, right and left corner of the mouth of a face in the middle of a larger picture
POINTS = (place_template(ARCFACE, SIDE, SIDE) - 112) * 0.7 + 112


def draws(severity: int, count: int, **fixed: torch.Tensor) -> dict[str, torch.Tensor]:
    """What is drawn, worn straight."""
    drawn = FaceMask().draw(Random(keys([str(one) for one in range(count)], "face_mask", 1)), severity, SIDE, SIDE)
    return {**drawn, "worn": torch.zeros(count, 2), **fixed}


def worn(severity: int, landmarks: torch.Tensor = POINTS, count: int = 1, skin=SKIN, **fixed) -> torch.Tensor:
    images = skin.expand(count, 3, SIDE, SIDE).contiguous()
    points = landmarks.expand(count, 5, 2).contiguous()
    return FaceMask().apply(images, severity, draws(severity, count, **fixed), points).clamp(0, 1)


def covered(severity: int, landmarks: torch.Tensor = POINTS) -> torch.Tensor:
    """(SIDE, SIDE): where there is cloth: green among skin, loops and shadows."""
    cloth = worn(severity, landmarks, cloth=torch.tensor([6]), pattern=torch.tensor([0]), inks=torch.tensor([7]))
    return (cloth[0, 1] > cloth[0, 0] * 1.02) & (cloth[0, 1] < 0.72)


def turned(degrees: float) -> torch.Tensor:
    angle = math.radians(degrees)
    turn = torch.tensor([[math.cos(angle), math.sin(angle)], [-math.sin(angle), math.cos(angle)]])
    return (POINTS - 112) @ turn + 112


@pytest.mark.parametrize(
    ("severity", "hidden", "free"),
    [
        (1, [(0, 1.0), (0.3, 1.15), (-0.3, 1.15), (0, 1.6)], [(0, 0.57), (0.6, 0.7)]),
        (2, [(0, 0.75), (0.55, 1.1), (0, 1.7)], [(0, 0.45), (0.7, 0.5)]),
        (3, [(0, 0.57), (0.6, 0.8), (-0.6, 0.8)], [(0, 0.2), (0.5, 0.3), (0.95, 0.6)]),
    ],
)
def test_plain_cloth_covers_from_the_mouth_up_to_the_cheeks(severity, hidden, free):
    _require(covered(severity), hidden, free)


@pytest.mark.parametrize(("severity", "top"), [(4, 0.45), (5, 0.33)])
def test_printed_cloth_reaches_close_under_the_eyes(severity, top):
    change = (worn(severity, pattern=torch.tensor([2])) - SKIN).abs().amax(1)[0] > 0.02
    _require(change, [(0.5, top), (-0.5, top), (0, 0.35), (0.75, 0.9)], [(0.5, 0.12), (-0.5, 0.12), (0, -0.1)])


def _require(cloth: torch.Tensor, hidden: list, free: list) -> None:
    face = Face(POINTS[None], torch.zeros(1, 3, SIDE, SIDE))
    for places, expected in ((hidden, True), (free, False)):
        for u, v in places:
            x, y = (round(float(one)) for one in face.pixels(torch.tensor(u), torch.tensor(v)))
            assert bool(cloth[y, x]) is expected, (u, v)


@pytest.mark.parametrize("degrees", [-30, 20])
@pytest.mark.parametrize("severity", [1, 3])
def test_it_turns_with_the_head_in_the_plane(severity, degrees):
    upright, other = covered(severity), covered(severity, turned(degrees))
    angle = math.radians(degrees)
    axis = torch.arange(SIDE) - 112.0
    right, down = axis[None, None, :], axis[None, :, None]
    x, y = math.cos(angle) * right - math.sin(angle) * down, math.sin(angle) * right + math.cos(angle) * down
    back = sample(other[None, None].float(), x + 112, y + 112)[0, 0] > 0.5
    assert (back & upright).sum() / (back | upright).sum() > 0.95


@pytest.mark.parametrize("yaw", [0.12, 0.25])
def test_it_turns_with_the_head_aside(yaw):
    aside = POINTS.clone()
    aside[2, 0] += yaw * (POINTS[1, 0] - POINTS[0, 0])
    ahead, there = covered(3), covered(3, aside)
    middle = 112
    near, far = there[:, :middle].sum() - ahead[:, :middle].sum(), there[:, middle:].sum() - ahead[:, middle:].sum()
    assert near > 0 > far  # the cheek that comes forward shows more of it
    peak = there.float().argmax(0)[there.any(0)]
    columns = there.any(0).nonzero()[:, 0]
    assert columns[peak.argmin()] == pytest.approx(float(aside[2, 0]), abs=12)  # its highest place is over the nose
    mirrored = aside[[1, 0, 2, 4, 3]].clone()
    mirrored[:, 0] = SIDE - 1 - mirrored[:, 0]
    assert (covered(3, mirrored).flip(1) != there).float().mean() < 0.002


def test_cloth_is_plain_up_to_3_and_boldly_printed_above():
    spread = []
    for severity in SEVERITIES:
        inner = luma(worn(severity, count=24))[:, 0, 155:190, 97:127]
        spread.append(inner.flatten(1).std(1))
    assert max(one.max() for one in spread[:3]) < 0.12
    assert spread[3].mean() > 2 * spread[2].mean()
    assert spread[4].mean() > spread[3].mean()


def test_patterns_and_colours_are_drawn():
    kinds = [worn(5, pattern=torch.tensor([one])) for one in range(len(PATTERNS))]
    assert all((one - other).abs().mean() > 0.02 for one, other in zip(kinds, kinds[1:] + kinds[:1], strict=True))
    colours = worn(2, count=40)[:, :, 165, 112]
    assert len({tuple(one) for one in (colours * 20).round().int().tolist()}) > 5


@pytest.mark.parametrize("severity", SEVERITIES)
def test_a_grey_photograph_stays_grey(severity):
    made = worn(severity, count=6, skin=torch.tensor([0.6, 0.6, 0.6]).view(1, 3, 1, 1))
    assert (made.amax(1) - made.amin(1)).max() < 1e-5


def test_in_bad_light_cloth_is_dark_too():
    dark, bright = (worn(1, count=8, skin=SKIN * share) for share in (0.25, 1.0))
    assert (luma(dark)[:, 0, 165, 112] < 0.85 * luma(bright)[:, 0, 165, 112]).all()
