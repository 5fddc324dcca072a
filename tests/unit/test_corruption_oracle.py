"""The corruptions against imagecorruptions: its outputs pixel by pixel, with its own random numbers handed over.

`tests/fixtures/imagecorruptions/make.py` made the files. Both sides cut to 8 bits, so that a value within float error
of a step may differ by one.
"""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from jobs.oodface.randomness import keys
from jobs.oodface.scenarios import apply, distort, find
from tests.fixtures.imagecorruptions.make import BINS, NAMES, RANDOM, RINGS, rings

HERE = Path(__file__).parents[1] / "fixtures" / "imagecorruptions"
SEVERITIES = (1, 2, 3, 4, 5)
# Values that may differ by one, as a share: on 8-bit input many results of these lie on a step, or a flat area stays.
ON_STEPS = {"brightness": 0.15, "saturate": 0.15, "defocus_blur": 0.15}
NEAR_STEPS = 0.03
# In dB: these codecs and filters round to 8 bits on their way, so that errors add up.
RATIO = {"pixelate": 48, "jpeg_compression": 48}


@pytest.fixture(scope="module")
def oracle():
    with np.load(HERE / "oracle.npz") as arrays:
        return dict(arrays)


@pytest.fixture(scope="module")
def picture(oracle):
    return torch.from_numpy(oracle["picture"]).permute(2, 0, 1)[None].float() / 255


def batched(values) -> torch.Tensor:
    return torch.as_tensor(np.asarray(values))[None].float()


def drawn(name: str, severity: int, height: int, width: int) -> dict[str, torch.Tensor]:
    """What the library drew for this output, in the form of our draws."""
    numpy, level = np.random.RandomState(severity), find(name).level(severity)
    if name == "fog":
        return {"plasma": batched(plasma_noise(numpy, 64, level[1]))}
    if name == "snow":
        flakes = numpy.normal(level[0], level[1], (height, width))
        return {"flakes": batched((flakes - level[0]) / level[1]), "angle": batched(numpy.uniform(-135, -45))}
    if name == "motion_blur":
        return {"angle": batched(numpy.uniform(-45, 45))}
    if name == "glass_blur":
        return glass_steps(numpy, level[1], level[2], height, width)
    if name in ("gaussian_noise", "speckle_noise"):
        return {"noise": batched(numpy.normal(scale=level, size=(height, width, 3)) / level).permute(0, 3, 1, 2)}
    if name == "impulse_noise":
        generator = np.random.default_rng(numpy.randint(2**31))
        flipped, salted = (generator.random((height, width, 3)) <= share for share in (level, 0.5))
        return {"chance": batched(np.where(flipped, np.where(salted, 0.75, 0.25) * level, 1)).permute(0, 3, 1, 2)}
    if name == "frost":
        texture = numpy.randint(5)
        frost = find("frost")
        room = frost_room(frost, texture, height, width)
        place = [(numpy.randint(0, side) + 0.5) / side for side in room]
        return {"texture": torch.tensor([texture]), "place": batched(place)}
    if name == "spatter":
        return {"liquid": batched((numpy.normal(level[0], level[1], (height, width)) - level[0]) / level[1])}
    if name == "elastic_transform":
        most = 0.005 * height
        return {one: batched(numpy.uniform(-most, most, (height, width)) / most) for one in ("columns", "rows")}
    return {}


def frost_room(frost, texture: int, height: int, width: int) -> tuple[int, int]:
    from jobs.oodface.corruptions.occlusion import frost_texture

    high, wide = frost_texture(frost.folder, texture, height, width, torch.device("cpu")).shape[1:]
    return high - height, wide - width


def plasma_noise(numpy, side: int, decay: float) -> np.ndarray:
    noise, step, wobble = np.zeros((side, side)), side, 100.0
    while step >= 2:
        half = step // 2
        for rows, columns in ((half, half), (0, half), (half, 0)):
            place = noise[rows::step, columns::step]
            place[:] = numpy.uniform(-wobble, wobble, place.shape) / wobble
        step, wobble = half, wobble / decay
    return noise


def glass_steps(numpy, delta: int, iterations: int, height: int, width: int) -> dict[str, torch.Tensor]:
    steps = np.zeros((2, iterations, height, width), dtype=np.int64)
    for iteration in range(iterations):
        for h in range(height - delta, delta, -1):
            for w in range(width - delta, delta, -1):
                steps[:, iteration, h, w] = numpy.randint(-delta, delta, size=2)
    return {"columns": torch.from_numpy(steps[0])[None], "rows": torch.from_numpy(steps[1])[None]}


def made(picture, name: str, severity: int) -> np.ndarray:
    draws = drawn(name, severity, *picture.shape[2:])
    result = apply(picture, find(name), severity, draws, truncate=True)
    return (result[0].permute(1, 2, 0) * 255).round().to(torch.uint8).numpy()


@pytest.mark.parametrize("severity", SEVERITIES)
@pytest.mark.parametrize("name", [name for name in NAMES if name != "shot_noise"])
def test_a_corruption_is_the_reference_with_its_random_numbers(oracle, picture, name, severity):
    ours, theirs = made(picture, name, severity).astype(int), oracle[f"{name}_{severity}"].astype(int)
    off = np.abs(ours - theirs)
    told = f"{(off > 0).mean():.2%} of the values differ, by at most {off.max()}"
    if name in RATIO:
        ratio = 10 * np.log10(255**2 / max((off**2).mean(), 1e-9))
        assert ratio >= RATIO[name], f"{ratio:.1f} dB; {told}"
    else:
        assert off.max() <= 1, told
        assert (off > 0).mean() < ON_STEPS.get(name, NEAR_STEPS), told


@pytest.mark.parametrize("severity", SEVERITIES)
@pytest.mark.parametrize("name", RANDOM)
def test_our_random_numbers_give_the_statistics_of_the_reference(picture, name, severity):
    kept = json.loads((HERE / "statistics.json").read_text())
    count = kept["draws"]
    many = keys([str(one) for one in range(count)], name, severity)
    outputs = distort(picture.expand(count, -1, -1, -1), name, severity, many, truncate=True)
    images = (outputs.permute(0, 2, 3, 1) * 255).round().to(torch.uint8).numpy()
    ours = {
        "mean": [one.mean((0, 1)) / 255 for one in images],
        "variance": [(one / 255.0).var((0, 1)) for one in images],
        "histogram": [np.histogram(one, BINS, (0, 256))[0] / one.size for one in images],
        "spectrum": [rings(one) for one in images],
    }
    for what, rows in ours.items():
        rows, theirs = np.array(rows), kept["found"][f"{name}_{severity}"][what]
        error = np.hypot(rows.std(0, ddof=1) / np.sqrt(count), theirs["error"])
        scores = (rows.mean(0) - theirs["mean"]) / np.maximum(error, 1e-4)
        # 50 tests of up to 16 figures: 4.5 standard errors are exceeded by chance in one run of a thousand
        assert np.abs(scores).max() < 4.5, f"{what}: {np.round(scores, 1)}"
    assert len(ours["spectrum"][0]) == RINGS
