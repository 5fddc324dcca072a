"""The corruptions by themselves: what a sample depends on, closed forms, distributions, use from kornia."""

from __future__ import annotations

import math

import kornia.augmentation as K
import pytest
import torch
from scipy import stats

from cluster.errors import UserError
from jobs.oodface.augmentation import RandomScenario
from jobs.oodface.corruptions import CORRUPTIONS
from jobs.oodface.corruptions.data import JpegCompression, jpeg, poisson
from jobs.oodface.corruptions.extensions import ElasticTransform
from jobs.oodface.corruptions.sensor import ColorShift
from jobs.oodface.defences import defended
from jobs.oodface.filters import gaussian
from jobs.oodface.randomness import Random, keys
from jobs.oodface.scenario import SEVERITIES
from jobs.oodface.scenarios import SCENARIOS, apply, distort, find
from jobs.oodface.threads import use_threads

NAMES = [one.name for one in (*CORRUPTIONS, ElasticTransform)]


def faces(count: int, height: int = 45, width: int = 61) -> torch.Tensor:
    """Smooth pictures of 8-bit values with an edge, no two alike."""
    rows, columns = torch.linspace(0, 1, height)[:, None], torch.linspace(0, 1, width)
    phase = torch.arange(count * 3, dtype=torch.float32).view(count, 3, 1, 1)
    images = 0.5 + 0.4 * torch.sin(6 * rows + 4 * columns + phase)
    images[:, :, 10:20, 12:30] = 0.9
    return (images * 255).floor() / 255


def ids(count: int) -> list[str]:
    return [f"person/{one}" for one in range(count)]


def test_there_are_twenty_in_five_categories():
    assert len(CORRUPTIONS) == len({one.name for one in CORRUPTIONS}) == 20
    assert len({one.category for one in CORRUPTIONS}) == 5
    assert all(len(one.levels) == 5 for one in (*CORRUPTIONS, ElasticTransform))


@pytest.mark.parametrize("name", NAMES)
def test_a_sample_does_not_depend_on_its_batch(name):
    images, drawn = faces(37), keys(ids(37), name, 3)
    whole = distort(images, name, 3, drawn)
    assert whole.isfinite().all()
    assert 0 <= whole.min() <= whole.max() <= 1
    for size in (1, 5, 16):
        parts = [distort(images[at : at + size], name, 3, drawn[at : at + size]) for at in range(0, len(images), size)]
        assert torch.equal(torch.cat(parts), whole), size
    order = torch.randperm(37, generator=torch.Generator().manual_seed(0))
    assert torch.equal(distort(images[order], name, 3, drawn[order]), whole[order])


@pytest.mark.parametrize("name", NAMES)
def test_severities_mix_in_a_batch_and_grow(name):
    images = faces(1, 112, 112).expand(10, -1, -1, -1)
    severities = list(SEVERITIES) * 2
    drawn = torch.cat([keys([one], name, level) for one, level in zip(ids(10), severities, strict=True)])
    mixed = distort(images, name, torch.tensor(severities), drawn)
    for at, level in enumerate(severities):
        alone = distort(images[at : at + 1], name, level, drawn[at : at + 1])
        assert torch.equal(mixed[at : at + 1], alone)
    if name not in ("color_shift", "saturate", "snow"):  # the table's levels do not grow in these
        many = faces(1, 112, 112).expand(24, -1, -1, -1)
        change = [(distort(many, name, level, keys(ids(24), name, level)) - many).abs().mean() for level in (1, 5)]
        assert change[0] < change[1]


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("size", [(1, 1), (1, 7), (9, 2), (30, 200)])
def test_any_size(name, size):
    images = faces(2, 45, 61).repeat(1, 1, 1, 4)[:, :, : size[0], : size[1]]
    for severity in (1, 5):
        changed = distort(images, name, severity, keys(ids(2), name, severity))
        assert changed.shape == images.shape
        assert changed.isfinite().all()


@pytest.mark.parametrize("name", NAMES)
def test_half_precision_comes_back_as_it_came(name):
    images = faces(2)
    full = distort(images, name, 2, keys(ids(2), name, 2))
    half = distort(images.half(), name, 2, keys(ids(2), name, 2))
    assert half.dtype == torch.float16
    assert (half.float() - full).abs().mean() < 0.01


@pytest.mark.parametrize("name", NAMES)
def test_draws_can_be_kept_and_applied_again(name):
    images, scenario = faces(3), find(name)
    drawn = keys(ids(3), name, 4)
    draws = scenario.draw(Random(drawn), 4, *images.shape[2:])
    assert all(len(value) == 3 for value in draws.values())
    assert torch.equal(apply(images, scenario, 4, draws), distort(images, name, 4, drawn))


def test_truncation_gives_steps_of_eight_bits():
    changed = distort(faces(2), "gaussian_noise", 3, keys(ids(2), "gaussian_noise", 3), truncate=True) * 255
    assert torch.allclose(changed, changed.round(), atol=1e-4)


def test_an_id_a_scenario_a_severity_and_a_seed_each_give_another_key():
    found = {keys(["a"], "fog", 1).item(), keys(["b"], "fog", 1).item(), keys(["a"], "snow", 1).item()}
    found |= {keys(["a"], "fog", 2).item(), keys(["a"], "fog", 1, seed=1).item()}
    assert len(found) == 5


@pytest.mark.parametrize(("name", "told"), [("fogg", "did you mean fog?"), ("glas_blur", "did you mean glass_blur?")])
def test_an_unknown_scenario_names_the_nearest(name, told):
    with pytest.raises(UserError, match=told.replace("?", r"\?")):
        find(name)


@pytest.mark.parametrize("severity", [0, 6])
def test_a_severity_that_does_not_exist(severity):
    with pytest.raises(UserError, match=f"severity {severity} does not exist"):
        distort(faces(1), "fog", severity, keys(ids(1), "fog", 1))


@pytest.mark.parametrize(
    ("images", "severity", "count", "told"),
    [
        (torch.zeros(2, 3, 8, 8), [1], 2, "2 images need as many severities and keys; 1 and 2"),
        (torch.zeros(2, 3, 8, 8), 1, 1, "2 images need as many severities and keys; 2 and 1"),
        (torch.zeros(2, 3, 8, 8, dtype=torch.uint8), 1, 2, "uint8"),
        (torch.zeros(2, 1, 8, 8), 1, 2, r"\(2, 1, 8, 8\)"),
    ],
)
def test_a_batch_that_does_not_fit_is_refused(images, severity, count, told):
    with pytest.raises(UserError, match=told):
        distort(images, "fog", severity, keys(ids(count), "fog", 1))


@pytest.mark.parametrize("name", [name for name in NAMES if name not in ("shot_noise", "jpeg_compression")])
def test_gradients_reach_the_images(name):
    with torch.inference_mode():
        distort(faces(2), name, 2, keys(ids(2), name, 2))  # what is kept from it must not be in the way
    images = faces(2).requires_grad_(True)
    distort(images, name, 2, keys(ids(2), name, 2)).sum().backward()
    assert images.grad.isfinite().all()
    # pixels that are cut to 8 bits in between, or covered, have none
    assert images.grad.abs().sum() > 0 or name == "facial_distortion"


def test_bits_and_normals_are_distributed_as_they_should():
    random = Random(keys(ids(64), "test", 1))
    bits = random.bits(4096)
    for shift in range(0, 32, 4):
        counts = torch.bincount(((bits >> shift) & 15).flatten(), minlength=16)
        assert stats.chisquare(counts.numpy()).pvalue > 1e-4
    assert stats.kstest(random.uniform(2000).flatten().numpy(), "uniform").pvalue > 1e-4
    normal = random.normal(2001)
    assert stats.kstest(normal.flatten().numpy(), "norm").pvalue > 1e-4
    for moved in (1, 2, 7, 1000):
        assert abs((normal[:, moved:] * normal[:, :-moved]).mean()) < 5 / math.sqrt(normal.numel())
    assert abs((normal[1:] * normal[:-1]).mean()) < 5 / math.sqrt(normal.numel())
    whole = random.integers(-3, 4, 5000).flatten()
    assert stats.chisquare(torch.bincount(whole + 3).numpy()).pvalue > 1e-4
    far = random.integers(0, 50_000_000, 5000).flatten()
    assert len(far.unique()) > 0.99 * len(far)
    assert stats.kstest(far.numpy() / 5e7, "uniform").pvalue > 1e-4


@pytest.mark.parametrize("photons", [60, 12, 3])
@pytest.mark.parametrize("value", [0.0, 17 / 255, 0.4999, 1.0])
def test_shot_noise_counts_are_poisson(photons, value):
    images = torch.full((64, 3, 30, 30), value)
    counts = poisson(images, photons, Random(keys(ids(64), "shot", 1)).bits(3, 30, 30)).flatten().long()
    mean = photons * value
    if mean == 0:
        assert counts.max() == 0
        return
    seen = torch.bincount(counts).numpy()
    expected = stats.poisson.pmf(range(len(seen)), mean) * counts.numel()
    common = expected > 10
    pooled = ([*seen[common], seen[~common].sum()], [*expected[common], counts.numel() - expected[common].sum()])
    assert stats.chisquare(*pooled).pvalue > 1e-4 or pooled[1][-1] < 1
    assert abs(counts.float().mean() - mean) < 5 * math.sqrt(mean / counts.numel())


def test_a_rest_too_small_to_count_does_not_depend_on_the_batch():
    near, whole = torch.full((1, 3, 40, 40), (100 + 9e-4) / 255), torch.full((1, 3, 40, 40), 0.5)
    bits = Random(keys(ids(2), "shot", 1)).bits(3, 40, 40)
    together = poisson(torch.cat([near, whole]), 60, bits)
    assert torch.equal(together[:1], poisson(near, 60, bits[:1]))


def test_salt_and_pepper_hits_the_share_of_the_closed_form():
    images = torch.full((40, 3, 112, 112), 0.5)
    for severity, ratio in zip(SEVERITIES, (0.02, 0.04, 0.06, 0.08, 0.1), strict=True):
        changed = distort(images, "salt_pepper_noise", severity, keys(ids(40), "sp", severity))
        assert torch.equal(changed.amin(1), changed.amax(1))
        hit, pixels = (changed[:, 0] != 0.5).float().mean().item(), 112 * 112
        assert hit == pytest.approx(1 - (1 - 1 / pixels) ** int(pixels * 3 * ratio), abs=2e-3)
        assert (changed[:, 0][changed[:, 0] != 0.5]).mean().item() == pytest.approx(0.5, abs=0.01)


def test_the_last_draw_of_a_pixel_counts():
    draws = {"pixel": torch.tensor([[3, 3, 5, 5]]), "white": torch.tensor([[0, 1, 1, 0]])}
    changed = apply(torch.full((1, 3, 2, 4), 0.5), find("salt_pepper_noise"), 1, draws)[0, 0].flatten()
    assert changed.tolist() == [0.5, 0.5, 0.5, 1, 0.5, 0, 0.5, 0.5]


def test_an_ellipse_covers_its_area_where_it_should():
    draws = {
        "centre": torch.tensor([[[100, 60]]]),
        "axes": torch.tensor([[[40, 20]]]),
        "angle": torch.tensor([[90]]),
    }
    changed = apply(torch.ones(1, 3, 200, 200), find("random_occlusion"), 1, draws)[0, 0]
    covered = changed < 0.5
    assert covered.sum().item() == pytest.approx(math.pi * 40 * 20, rel=0.01)
    rows, columns = covered.nonzero().T
    assert (rows.min(), rows.max()) == (20, 100)  # the long axis stands upright after a quarter turn
    assert (columns.min(), columns.max()) == (80, 120)
    assert changed[60, 100].item() == pytest.approx(1 / 255)


@pytest.mark.parametrize(("columns", "rows"), [(1.0, 0.0), (0.0, -1.0), (1.0, 1.0)])
def test_equal_steps_move_the_whole_image_and_mirror_its_edge(columns, rows):
    images = torch.rand(1, 3, 40, 60, generator=torch.Generator().manual_seed(0))
    draws = {name: torch.full((1, 40, 60), step) for name, step in (("columns", columns), ("rows", rows))}
    changed = apply(images, find("elastic_transform"), 4, draws)  # 25 times .005 of the height: 5 pixels
    right, down = (round(5 * step) for step in (columns, rows))
    mirrored = torch.cat([images.flip(3)[..., -5:], images, images.flip(3)[..., :5]], 3)
    mirrored = torch.cat([mirrored.flip(2)[:, :, -5:], mirrored, mirrored.flip(2)[:, :, :5]], 2)
    torch.testing.assert_close(changed, mirrored[:, :, 5 + down : 45 + down, 5 + right : 65 + right], atol=1e-4, rtol=0)


def test_hue_turns_by_two_degrees_a_unit():
    red = torch.tensor([0.8, 0.2, 0.2]).view(1, 3, 1, 1)
    for units, wanted in (
        (60, [0.2, 0.8, 0.2]),
        (120, [0.2, 0.2, 0.8]),
        (-120, [0.2, 0.8, 0.2]),
        (30, [0.8, 0.8, 0.2]),
    ):
        changed = apply(red, ColorShift(), 1, {"shift": torch.tensor([units])})
        assert changed.flatten().tolist() == pytest.approx(wanted, abs=1e-6)
    narrow, wide = (
        one.draw(Random(keys(ids(4000), "h", 5)), 5, 1, 1)["shift"].abs() for one in (ColorShift(True), ColorShift())
    )
    assert (narrow.max(), wide.max()) == (90, 180)


def test_the_differentiable_jpeg_is_near_the_real_one_and_passes_gradients():
    images = gaussian(faces(2, 64, 64), 1.0)
    real = apply(images, JpegCompression(), 1, {})
    images.requires_grad_(True)
    soft = distort(images, JpegCompression("differentiable"), 1, keys(ids(2), "j", 1))
    assert -10 * torch.log10((real - soft).square().mean()) > 30
    soft.sum().backward()
    assert images.grad.abs().sum() > 0


@pytest.mark.parametrize("name", ["shot_noise", "pixelate"])
def test_neither_compiler_nor_autocast_changes_a_scenario(name):
    images, drawn = faces(2, 32, 32), keys(ids(2), name, 1)
    wanted = distort(images, name, 1, drawn)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(distort(images, name, 1, drawn), wanted)
    compiled = torch.compile(lambda batch: distort(batch * 1, name, 1, drawn) + 0, backend="eager")
    for size in (2, 1):  # another shape is compiled anew
        drawn = keys(ids(size), name, 1)
        assert torch.equal(compiled(images[:size]), wanted[:size])
    augment = RandomScenario(name, (1, 3))
    torch.manual_seed(1)
    first = augment(images)
    torch.manual_seed(1)
    assert torch.equal(torch.compile(augment, backend="eager")(images), first)


def test_jpeg_cuts_what_lies_outside_the_range():
    images = faces(2, 32, 32) * 3 - 1
    inside = images.clamp(0, 1)
    drawn = keys(ids(2), "bit_depth", 0)
    assert torch.equal(jpeg(images, 80), jpeg(inside, 80))
    assert torch.equal(*(distort(one, "jpeg_compression", 1, keys(ids(2), "j", 1)) for one in (images, inside)))
    assert torch.equal(*(defended(one, "bit_depth", drawn)[0] for one in (images, inside)))


def test_a_scenario_is_a_kornia_augmentation():
    images = faces(8)
    augment = K.AugmentationSequential(RandomScenario("gaussian_noise", (1, 3)), RandomScenario("fog", p=0.5))
    torch.manual_seed(1)
    first = augment(images)
    again = augment(images, params=augment._params)
    assert torch.equal(first, again)
    torch.manual_seed(1)
    assert torch.equal(augment(images), first)
    same = RandomScenario("gaussian_noise", 3, same_on_batch=True)(faces(1).expand(4, -1, -1, -1))
    assert torch.equal(same[0], same[3])
    with pytest.raises(UserError, match="severity 9"):
        RandomScenario("fog", 9)


@pytest.mark.parametrize("name", SCENARIOS)
def test_draws_are_replayed_alike_under_autocast(name):
    one, images = find(name), faces(3, 112, 112)
    drawn = keys(ids(3), name, 4)
    wanted = apply(images, one, 4, one.draw(Random(drawn), 4, 112, 112))
    with torch.autocast("cpu", torch.bfloat16):
        found = apply(images, one, 4, one.draw(Random(drawn), 4, 112, 112))
    assert found.dtype == torch.float32
    assert torch.equal(found, wanted)


@pytest.mark.parametrize(("name", "severity"), [("jpeg_compression", 3), ("spatter", 2)])
def test_threads_change_nothing(name, severity):
    images, drawn = faces(21), keys(ids(21), name, severity)
    alone = distort(images, name, severity, drawn)
    use_threads(4)
    try:
        assert torch.equal(distort(images, name, severity, drawn), alone)
    finally:
        use_threads(1)
