"""The variations: what a sample depends on, where they act, how they grow; and the generator that may replace them."""

from __future__ import annotations

import itertools
from functools import lru_cache
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from cluster.errors import UserError
from jobs.oodface.randomness import Random, keys
from jobs.oodface.scenario import SEVERITIES
from jobs.oodface.variations import VARIATIONS
from jobs.oodface.variations.base import ARCFACE, Face, Variation, fitting, place_template
from jobs.oodface.variations.drawing import luma
from jobs.oodface.variations.face_mask import FaceMask
from jobs.oodface.variations.mouth import find_mouth
from jobs.oodface.variations.rotation import RotateLeft, RotateRight, visible

KNOWN = {one.name: one for one in (*VARIATIONS, FaceMask)}
NAMES = [*KNOWN]
LFW = Path(__file__).parents[3] / "shared/data/oodface/lfw400/images"
needs_lfw = pytest.mark.skipif(not LFW.exists(), reason="../shared/data/oodface is absent")
MIRROR = [1, 0, 2, 4, 3]  # which landmark takes whose place in a mirrored face


def made(name: str) -> Variation:
    return KNOWN[name]()


def drawn_faces(count: int, height: int = 112, width: int = 112) -> tuple[torch.Tensor, torch.Tensor]:
    """Sketches of faces, no two alike, and their landmarks."""
    images, landmarks = sketches(count, height, width)
    return images.clone(), landmarks.clone()


@lru_cache
def sketches(count: int, height: int, width: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Skin, hair, eyes with brows, nose and lips."""
    generator = torch.Generator().manual_seed(3)
    landmarks = place_template(ARCFACE, height, width) + torch.randn(count, 5, 2, generator=generator) * height / 80
    blank = torch.rand(count, 3, 1, 1, generator=generator).expand(-1, 3, height, width)
    face = Face(landmarks, blank)
    u, v = face.fitted()
    images = blank * (0.8 + 0.2 * (v / 2).cos())[:, None]
    tones = 0.6 + 0.4 * torch.rand(count, 1, 1, 1, generator=generator)

    def lay(colour: tuple[float, float, float], where: torch.Tensor) -> None:
        nonlocal images
        shade = torch.tensor(colour)[None, :, None, None] * tones * (0.9 + 0.1 * (9 * u).sin() * (7 * v).cos())[:, None]
        images = images + (shade - images) * where.clamp(0, 1)[:, None]

    lay((0.25, 0.17, 0.1), 12 * (1 - (u / 1.2) ** 2 - ((v + 0.1) / 1.5) ** 2))
    lay((0.9, 0.68, 0.55), 12 * (1 - (u / 1.0) ** 2 - ((v - 0.5) / 1.4) ** 2))
    for side in (-0.5, 0.5):
        lay((0.3, 0.2, 0.15), 6 * (1 - ((u - side) / 0.3) ** 2 - ((v + 0.3) / 0.07) ** 2))
        lay((0.95, 0.95, 0.95), 6 * (1 - ((u - side) / 0.22) ** 2 - (v / 0.09) ** 2))
        lay((0.1, 0.2, 0.3), 6 * (1 - ((u - side) ** 2 + v**2) / 0.08**2))
    lay((0.75, 0.5, 0.4), 3 * (1 - (u / 0.18) ** 2 - ((v - 0.6) / 0.1) ** 2))
    lay((0.8, 0.35, 0.35), 6 * (1 - (u / 0.42) ** 2 - ((v - 1.17) / 0.14) ** 2))
    lay((0.35, 0.12, 0.12), 6 * (1 - (u / 0.38) ** 2 - ((v - 1.16) / 0.025) ** 2))
    return images.clamp(0, 1).contiguous(), landmarks


def varied(one: Variation, images, severity, landmarks=None, seed: int = 0) -> torch.Tensor:
    key = keys([f"person/{at}" for at in range(len(images))], one.name, 1, seed)
    return one.apply(images, severity, one.draw(Random(key), severity, *images.shape[2:]), landmarks).clamp(0, 1)


def reached(one: Variation, images, severity, landmarks=None) -> torch.Tensor:
    """(batch, height, width): where pixels change."""
    return (varied(one, images, severity, landmarks) != images).any(1)


def extent(name: str, images, severity, landmarks=None) -> torch.Tensor:
    """(batch,): by how much values change, but of the mask, whose print may be near the skin, how much it covers."""
    if name == "face_mask":
        return reached(made(name), images, severity, landmarks).float().mean((1, 2))
    return (varied(made(name), images, severity, landmarks) - images).abs().mean((1, 2, 3))


def test_there_are_ten_in_four_categories_all_called_stand_ins():
    assert len({one.name for one in VARIATIONS}) == 10
    assert [one.category for one in VARIATIONS] == sorted(
        (one.category for one in VARIATIONS), key=["Age", "Facial Expression", "Rotation", "Accessories"].index
    )
    for one in KNOWN.values():
        assert len(one.levels) == 5
        assert "procedural stand-in" in one.__doc__
        assert one is FaceMask or "not the paper's generator" in one.__doc__


@pytest.mark.parametrize("name", NAMES)
def test_a_sample_does_not_depend_on_its_batch(name):
    images, landmarks = drawn_faces(7)
    one, drawn = made(name), keys(list("abcdefg"), name, 3)

    def under(members: slice) -> torch.Tensor:
        draws = one.draw(Random(drawn[members]), 3, 112, 112)
        return one.apply(images[members].contiguous(), 3, draws, landmarks[members])

    whole = under(slice(None))
    for size in (1, 3):
        parts = [under(slice(at, at + size)) for at in range(0, 7, size)]
        assert torch.equal(torch.cat(parts), whole), size


@pytest.mark.parametrize("name", NAMES)
def test_a_window_holds_all_that_changes(name, monkeypatch):
    images, landmarks = drawn_faces(5, 80, 90)
    within = varied(made(name), images, 5, landmarks)
    monkeypatch.setattr(Face, "part", lambda self, *_: self)
    assert torch.equal(varied(made(name), images, 5, landmarks), within)


@pytest.mark.parametrize("name", NAMES)
def test_severity_grows(name):
    images, landmarks = drawn_faces(4)
    changes = torch.stack([extent(name, images, s, landmarks) for s in SEVERITIES])
    assert (changes[0] > 0).all()
    assert (changes.diff(dim=0) > 0).all()


@pytest.mark.parametrize("name", NAMES)
def test_what_is_drawn_is_seeded(name):
    images, landmarks = drawn_faces(3)
    first = varied(made(name), images, 4, landmarks)
    assert torch.equal(varied(made(name), images, 4, landmarks), first)
    drawing = bool(made(name).draw(Random(torch.zeros(1, dtype=torch.int64)), 1, 112, 112))
    assert torch.equal(varied(made(name), images, 4, landmarks, seed=1), first) != drawing


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("size", [(64, 64), (112, 96), (97, 131)])
def test_any_size_and_no_landmarks(name, size):
    images, _ = drawn_faces(2, *size)
    result = varied(made(name), images, 5)
    assert result.shape == images.shape
    assert result.isfinite().all()
    assert torch.equal(result, varied(made(name), images, 5, place_template(ARCFACE, *size).expand(2, -1, -1)))


def test_the_template_follows_the_crop():
    points = torch.tensor(ARCFACE)
    torch.testing.assert_close(place_template(ARCFACE, 112, 112), points)
    torch.testing.assert_close(place_template(ARCFACE, 112, 96), points - torch.tensor([8.0, 0]))
    doubled = place_template(ARCFACE, 224, 224)
    torch.testing.assert_close((doubled + 0.5) / 2 - 0.5, points)


@pytest.mark.parametrize("name", NAMES)
def test_the_effect_goes_with_the_face(name):
    """A face elsewhere in a larger picture is changed there, and alike."""
    images, landmarks = drawn_faces(2)
    canvas = torch.full((2, 3, 190, 190), 0.4)
    places = ((20, 30), (50, 60))
    for one, (top, left) in zip((0, 1), places, strict=True):
        canvas[one, :, top : top + 112, left : left + 112] = images[one]
    shifted = landmarks + torch.tensor([[left, top] for top, left in places], dtype=torch.float32)[:, None]
    large = varied(made(name), canvas, 3, shifted)
    small = varied(made(name), images, 3, landmarks)
    radius = made(name).category in ("Age", "Rotation")  # filters and background reach to the crop's edge
    inner = slice(30, 82) if radius else slice(0, 100)
    for one, (top, left) in zip((0, 1), places, strict=True):
        moved = large[one, :, top : top + 112, left : left + 112]
        difference = (moved[:, inner, inner] - small[one][:, inner, inner]).abs()
        assert difference.mean() < (0.03 if radius else 1e-4)


@pytest.mark.parametrize(
    ("name", "box"),
    [
        ("eye_close", (20, 38, 92, 66)),
        ("eye_open", (14, 20, 98, 70)),
        ("mouth_close", (25, 60, 86, 111)),
        ("makeup", (10, 30, 102, 111)),
    ],
)
def test_far_from_its_part_nothing_changes(name, box):
    images, _ = drawn_faces(1)
    left, top, right, bottom = box
    changed = reached(made(name), images, 5)[0]
    outside = changed.clone()
    outside[top : bottom + 1, left : right + 1] = False
    assert changed.any()
    assert not outside.any(), outside.nonzero()[:3]


def test_an_open_mouth_is_dark_and_leaves_the_eyes():
    images, landmarks = drawn_faces(3)
    opened = varied(made("mouth_open"), images, 5, landmarks)
    assert torch.equal(opened[:, :, :60], images[:, :, :60])
    mouth = landmarks[:, 3:].mean(1)
    for one, (x, y) in enumerate(mouth.round().long().tolist()):
        below = opened[one, :, y + 3 : y + 9, x - 2 : x + 3]
        assert below.mean(0).min() < 0.2


def test_a_closed_eye_hides_its_iris():
    images, _ = drawn_faces(2)
    closed = varied(made("eye_close"), images, 5)
    for x, y in ARCFACE[:2]:
        spot = (slice(None), slice(None), slice(round(y) - 1, round(y) + 2), slice(round(x) - 1, round(x) + 2))
        assert (closed[spot][:, 0].mean((1, 2)) - images[spot][:, 0].mean((1, 2)) > 0.2).all()


def test_grey_hair_is_greyer_and_young_skin_smoother():
    images, landmarks = drawn_faces(3)
    old, young = (varied(made(name), images, 5, landmarks) for name in ("age_increase", "age_decrease"))
    hair = (slice(None), slice(None), slice(2, 8), slice(45, 68))
    assert (
        (old[hair].amax(1) - old[hair].amin(1)) < (images[hair].amax(1) - images[hair].amin(1))
    ).float().mean() > 0.9
    cheeks = (slice(None), slice(None), slice(62, 78), slice(30, 42))
    rough = (images + torch.rand(3, 1, 112, 112, generator=torch.Generator().manual_seed(0)) * 0.06).clamp(0, 1)
    smoothed = varied(made("age_decrease"), rough, 5, landmarks)
    steps = [luma(one)[cheeks].diff(dim=3).abs().mean((1, 2, 3)) for one in (rough, smoothed)]
    assert (steps[1] < 0.6 * steps[0]).all()
    assert (young[cheeks].mean((1, 2, 3)) > images[cheeks].mean((1, 2, 3))).all()


@pytest.mark.parametrize("severity", [1, 3])
def test_left_is_right_in_a_mirror(severity):
    images, landmarks = drawn_faces(4)
    mirrored = landmarks[:, MIRROR].clone()
    mirrored[..., 0] = 111 - mirrored[..., 0]
    left = varied(RotateLeft(), images.flip(3), severity, mirrored).flip(3)
    right = varied(RotateRight(), images, severity, landmarks)
    assert ((left - right).abs().amax(1) > 1e-3).float().mean() < 0.01  # at contours a rounding decides


@pytest.mark.parametrize("severity", SEVERITIES)
def test_the_nose_goes_to_its_side_and_the_far_cheek_gets_narrow(severity):
    x = torch.linspace(0, 1, 112).expand(1, 3, 112, 112).contiguous()  # each pixel says from which column it comes
    source = varied(RotateRight(), x, severity)[0, 0] * 111
    assert (source.diff(dim=1) > -0.6).all()  # no row is torn or runs backwards
    nose_x, nose_y = (round(one) for one in ARCFACE[2])
    assert source[nose_y, nose_x] < nose_x - 0.5  # what stands there came from the left
    near, far = source[51, 30:50], source[51, 62:76]
    assert near.diff().mean() < far.diff().mean()


def test_what_is_behind_is_not_seen():
    source = torch.arange(6.0)[None, None]
    projected = torch.tensor([[[0.0, 1, 3, 2, 2.5, 5]]])  # the third hides the fourth and fifth
    seen = visible(projected, source)[0, 0]
    torch.testing.assert_close(seen[:4], torch.tensor([0.0, 1, 1.5, 2]), atol=1e-3, rtol=0)
    assert seen[4] > 4


@pytest.mark.parametrize("name", NAMES)
def test_gradients_flow_to_the_image(name):
    images, landmarks = drawn_faces(2)
    with torch.inference_mode():  # what is kept between calls must be of use with gradients as well
        varied(made(name), images, 2, landmarks)
    images = images.requires_grad_()
    one = made(name)
    result = one.apply(images, 2, one.draw(Random(torch.zeros(2, dtype=torch.int64)), 2, 112, 112), landmarks)
    (flow,) = torch.autograd.grad(result.square().mean(), images)
    assert flow.isfinite().all()
    assert (flow != 0).float().mean() > 0.5


BROKEN = {
    "all equal": torch.full((5, 2), 40.0),
    "none": torch.full((5, 2), torch.nan),
    "eyes exchanged": torch.tensor(ARCFACE)[MIRROR],
    "upside down": torch.tensor(ARCFACE) * torch.tensor([1, -1]) + torch.tensor([0, 112]),
    "tiny": torch.tensor(ARCFACE) / 6,
}


@pytest.mark.parametrize("kind", BROKEN)
@pytest.mark.parametrize("name", NAMES)
def test_landmarks_of_no_face_are_refused(name, kind):
    images, landmarks = drawn_faces(3)
    landmarks[1] = BROKEN[kind]
    with pytest.raises(UserError, match="of image 1 are no face's; give right eye"):
        varied(made(name), images, 1, landmarks)


def test_landmarks_for_other_images_are_refused():
    images, landmarks = drawn_faces(3)
    with pytest.raises(UserError, match=r"\(2, 5, 2\) do not fit 3 images"):
        varied(made("makeup"), images, 1, landmarks[:2])


def test_fitting_replaces_what_is_no_face():
    images, landmarks = drawn_faces(len(BROKEN) + 1)
    landmarks[:-1] = torch.stack(list(BROKEN.values()))
    usable = fitting(landmarks, images)
    assert torch.equal(usable[-1], landmarks[-1])
    assert torch.equal(usable[:-1], place_template(ARCFACE, 112, 112).expand(len(BROKEN), -1, -1))
    varied(made("makeup"), images, 1, usable)


faces_of_any_kind = st.tuples(
    st.floats(-25, 25), st.floats(0.6, 1.3), st.lists(st.floats(-5, 5), min_size=10, max_size=10)
)


@settings(max_examples=12)
@given(faces_of_any_kind, st.sampled_from(NAMES), st.sampled_from(SEVERITIES))
def test_turned_scaled_and_uneven_faces_give_images(kind, name, severity):
    degrees, scale, noise = kind
    turn = torch.deg2rad(torch.tensor(degrees))
    matrix = torch.stack([torch.stack([turn.cos(), turn.sin()]), torch.stack([-turn.sin(), turn.cos()])]) * scale
    landmarks = (torch.tensor(ARCFACE) - 56) @ matrix + 56 + torch.tensor(noise).view(5, 2)
    images = torch.rand(1, 3, 112, 112, generator=torch.Generator().manual_seed(1))
    result = varied(made(name), images, severity, landmarks[None])
    assert result.isfinite().all()
    assert 0 <= result.min() <= result.max() <= 1


def test_the_mouth_is_found_where_it_was_drawn():
    images, landmarks = drawn_faces(6)
    face = Face(landmarks, images)
    mouth = find_mouth(images, face)
    seam = (mouth.v + mouth.seam * mouth.half) * 1.155 / face.mouth[1]
    assert ((seam - 1.16).abs() < 0.06).all()
    assert (mouth.teeth.sure < 0.1).all()


@needs_lfw
@pytest.mark.parametrize("name", NAMES)
def test_photographs_are_changed_a_little_at_1_and_much_more_at_5(name):
    import cv2

    files = sorted(LFW.glob("*/*_0001.jpg"))[:6]
    crops = [cv2.resize(cv2.imread(str(one))[60:200, 55:195, ::-1], (112, 112)) for one in files]
    images = torch.from_numpy(np.stack(crops)).permute(0, 3, 1, 2).float().contiguous() / 255
    extents = [extent(name, images, s).mean() for s in SEVERITIES]
    assert all(later > earlier for earlier, later in itertools.pairwise(extents))
    # loops reach to the ears at any size of the mask
    assert extents[4] > (1.5 if name == "face_mask" else 2) * extents[0]
    assert (varied(made(name), images, 1) - images).abs().mean() < 0.08
