"""Every scenario at every severity on a GPU against the CPU, bits apart; written without a GPU at hand."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from jobs.oodface.randomness import keys
from jobs.oodface.scenario import SEVERITIES
from jobs.oodface.scenarios import SCENARIOS, distort

COUNT, SIDE = 32, 112
STEP = 1.01 / 255
# A drawn number that differs in its last digit may fall on the other side of a threshold, as of drops and flakes.
BEYOND, LEAST_COSINE = 0.005, 0.999


def compared(name: str, severity: int, device: str) -> tuple[float, float]:
    """The share of values more than a step of 8 bits apart, and the least cosine of an image's two forms."""
    rows, columns = torch.linspace(0, 1, SIDE)[:, None], torch.linspace(0, 1, SIDE)
    phase = torch.arange(COUNT * 3, dtype=torch.float32).view(COUNT, 3, 1, 1)
    images = ((0.5 + 0.4 * torch.sin(6 * rows + 4 * columns + phase)) * 255).floor() / 255
    drawn = keys([f"person/{one}" for one in range(COUNT)], name, severity)
    here = distort(images, name, severity, drawn, truncate=True)
    there = distort(images.to(device), name, severity, drawn, truncate=True)
    assert there.device.type == torch.device(device).type
    there = there.cpu()
    cosine = F.cosine_similarity(here.flatten(1).double(), there.flatten(1).double())
    return ((here - there).abs() > STEP).double().mean().item(), cosine.min().item()


@pytest.mark.parametrize("name", ["fog", "makeup"])
def test_the_comparison_finds_nothing_on_the_same_device(name):
    assert compared(name, 3, "cpu") == (0, pytest.approx(1))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("name", SCENARIOS)
def test_a_gpu_makes_the_images_of_the_cpu(name):
    found = {severity: compared(name, severity, "cuda") for severity in SEVERITIES}
    print(name, found)
    assert all(beyond <= BEYOND and cosine >= LEAST_COSINE for beyond, cosine in found.values()), found
