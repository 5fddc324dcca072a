"""Alignment: the similarity against closed forms and Umeyama, the warp against OpenCV, the chip against dlib."""

from __future__ import annotations

import math
import sys

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st

from cluster.errors import UserError
from jobs.oodface.faces import dlib_chip
from jobs.oodface.faces.align import (
    ARCFACE,
    ARCFACE_96,
    DLIB,
    DLIB_YUNET,
    TEMPLATES,
    Template,
    align,
    crop,
    inverse,
    moved,
    similarity,
)
from jobs.oodface.faces.detector import Face


def blobs(height: int, width: int, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    coarse = torch.rand(1, 3, height // 12 + 2, width // 12 + 2, generator=generator)
    image = F.interpolate(coarse, (height, width), mode="bicubic", align_corners=True)[0].clamp(0, 1)
    return (image * 255).round() / 255


def turned(angle: float, scale: float, x: float, y: float) -> torch.Tensor:
    cosine, sine = scale * math.cos(angle), scale * math.sin(angle)
    return torch.tensor([[[cosine, -sine, x], [sine, cosine, y]]], dtype=torch.float64)


def umeyama(src: np.ndarray, dst: np.ndarray) -> np.ndarray:
    """Umeyama 1991, by singular value decomposition, equations 38 to 43."""
    p, q = src - src.mean(0), dst - dst.mean(0)
    u, d, vt = np.linalg.svd(q.T @ p / len(p))
    s = np.diag([1.0, 1.0 if np.linalg.det(u) * np.linalg.det(vt) > 0 else -1.0])
    rotation = u @ s @ vt
    scale = np.trace(np.diag(d) @ s) / p.var(0).sum()
    return np.c_[scale * rotation, dst.mean(0) - scale * rotation @ src.mean(0)]


def psnr(a: torch.Tensor, b: torch.Tensor) -> float:
    """Decibels, of values from 0 to 1."""
    return -10 * math.log10((a.double() - b.double()).square().mean().item() + 1e-12)


def face_of(landmarks: torch.Tensor) -> Face:
    left, top = landmarks.amin(0).tolist()
    right, bottom = landmarks.amax(0).tolist()
    return Face((left, top, right, bottom), 0.9, landmarks)


def points_of(template: Template) -> torch.Tensor:
    return torch.tensor(template.points)


@given(st.floats(-3.1, 3.1), st.floats(0.05, 20), st.floats(-500, 500), st.floats(-500, 500))
def test_a_known_similarity_is_recovered(angle, scale, x, y):
    matrix = turned(angle, scale, x, y)
    src = points_of(ARCFACE).double()[None]
    torch.testing.assert_close(similarity(src, moved(src, matrix)), matrix, rtol=1e-9, atol=1e-7)
    torch.testing.assert_close(moved(moved(src, matrix), inverse(matrix)), src, rtol=1e-9, atol=1e-7)


@given(st.integers(0, 10_000), st.booleans())
def test_the_similarity_is_umeyamas(seed, mirrored):
    generator = np.random.default_rng(seed)
    src, dst = generator.normal(size=(2, 5, 2)) * 50
    if mirrored:
        dst = src * [-1, 1] + generator.normal(size=(5, 2))
    [mine] = similarity(torch.from_numpy(src)[None], torch.from_numpy(dst)[None])
    np.testing.assert_allclose(mine, umeyama(src, dst), atol=1e-7)
    assert torch.linalg.det(mine[:, :2]) > 0


def test_a_batch_is_its_parts_in_single_precision():
    src, dst = torch.randn(2, 7, 5, 2, generator=torch.Generator().manual_seed(0)) * 40 + 100
    together = similarity(src, dst)
    for row in range(7):
        torch.testing.assert_close(together[row], similarity(src[row : row + 1], dst[row : row + 1])[0])
        np.testing.assert_allclose(
            together[row], umeyama(src[row].double().numpy(), dst[row].double().numpy()), atol=0.01
        )


@pytest.mark.parametrize("precision", [torch.float32, torch.float64])
def test_what_says_nothing_is_no_matrix(precision):
    src = points_of(ARCFACE).to(precision)
    one_point = torch.full((5, 2), 123.4, dtype=precision)
    square = torch.tensor([[0, 0], [1, 0], [1, 1], [0, 1.0]], dtype=precision) * 30 + 700
    assert similarity(one_point[None], src[None]).isnan().all()
    assert similarity(src[None], one_point[None]).isnan().all()
    assert similarity(square[None], square[None] * torch.tensor([-1, 1], dtype=precision)).isnan().all()
    for bad in (math.nan, math.inf):
        spoilt = src.clone()
        spoilt[2, 1] = bad
        together = similarity(torch.stack([spoilt, src]), torch.stack([src, src]))
        assert together[0].isnan().all()
        torch.testing.assert_close(together[1], torch.eye(2, 3, dtype=precision), rtol=0, atol=1e-4)


@pytest.mark.parametrize(
    ("height", "width", "matrix"),
    [
        (250, 250, turned(0.2, 0.9, -40, -30)),
        (180, 320, turned(-0.4, 1.7, -150, -60)),
        (600, 400, turned(0.1, 0.2, 10, -5)),
        (90, 90, turned(3.0, 0.6, 90, 100)),
    ],
)
def test_the_warp_is_opencvs(height, width, matrix):
    """Within 2/255 of warpAffine in float32 where the image is; it counts places in 1/32 px, so edges differ more."""
    cv2 = pytest.importorskip("cv2")
    image = blobs(height, width)
    mine = crop(image, matrix[0].float(), (112, 96))
    theirs = cv2.warpAffine(image.permute(1, 2, 0).contiguous().numpy(), matrix[0].numpy(), (96, 112))
    theirs = torch.from_numpy(theirs).permute(2, 0, 1)
    assert mine.shape == (3, 112, 96)
    inside = (crop(torch.ones_like(image), matrix[0].float(), (112, 96)) - 0.5).abs() == 0.5
    assert (mine - theirs)[inside].abs().max() <= 2 / 255
    assert psnr(mine, theirs) >= 45


def test_a_crop_at_whole_pixels_is_a_cut_and_black_outside():
    image = blobs(40, 50)
    cut = crop(image, torch.tensor([[1.0, 0, -45], [0, 1, -7]]), (8, 10))
    torch.testing.assert_close(cut[:, :, :5], image[:, 7:15, 45:50], rtol=0, atol=1e-5)
    assert cut[:, :, 5:].abs().max() < 1e-4


def test_templates():
    assert {name: (t.height, t.width) for name, t in TEMPLATES.items()} == {
        "arcface": (112, 112),
        "arcface_96": (112, 96),
        "dlib": (150, 150),
        "dlib_yunet": (150, 150),
    }
    torch.testing.assert_close(points_of(ARCFACE) - points_of(ARCFACE_96), torch.tensor([[8.0, 0.0]] * 5))
    assert ARCFACE_96.points[0] == (30.2946, 51.6963)
    # Eyes above the mouth, the person's right on the left; dlib begins with the left eye.
    for template in (ARCFACE, DLIB_YUNET):
        assert template.points[0][0] < template.points[2][0] < template.points[1][0]
    assert DLIB.points[0][0] > DLIB.points[4][0] > DLIB.points[2][0]


def test_aligned_landmarks_lie_on_the_template():
    where = inverse(turned(0.3, 0.5, -20, -30).float())
    landmarks = moved(points_of(ARCFACE)[None], where)[0]
    images = [blobs(300, 400), blobs(500, 350)]
    aligned = align(images, [face_of(landmarks), face_of(landmarks + 20)], ARCFACE)
    assert aligned.crops.shape == (2, 3, 112, 112)
    assert aligned.found.tolist() == [True, True]
    torch.testing.assert_close(aligned.landmarks, points_of(ARCFACE).expand(2, -1, -1), rtol=0, atol=1e-3)


def test_turned_scaled_and_moved_faces_give_one_crop():
    """An image and its warped copy, the landmarks warped with it: the crops agree but for interpolation."""
    image, landmarks = blobs(260, 260), points_of(ARCFACE) + 70
    matrix = turned(0.35, 1.3, 60, -90).float()
    warped = crop(image, matrix[0], (420, 460))
    aligned = align([image, warped], [face_of(landmarks), face_of(moved(landmarks[None], matrix)[0])], ARCFACE)
    assert psnr(*aligned.crops) >= 38


@pytest.mark.parametrize("template", TEMPLATES.values(), ids=str)
def test_without_a_face_the_whole_image_is_resized_and_flagged(template):
    image = blobs(90, 200)
    spoilt = Face((0, 0, 10, 10), 0.9, torch.full((5, 2), 4.0))
    faces = [None, None] if template.landmarks == "dlib" else [None, spoilt]
    aligned = align([image, image], faces, template)
    size = (template.height, template.width)
    wanted = F.interpolate(image[None], size, mode="bilinear", align_corners=False)
    torch.testing.assert_close(aligned.crops, wanted.expand(2, -1, -1, -1))
    assert aligned.found.tolist() == [False, False]
    assert aligned.landmarks.isnan().all()


@pytest.mark.parametrize(
    ("side", "box"), [(250, (70, 60, 170, 190)), (500, (100, 150, 300, 400)), (200, (60, 60, 100, 110))]
)
def test_the_chip_is_dlibs(side, box):
    """PSNR of at least 50 dB: dlib drops fractions of a grey level. (At an image's edge it keeps no soft rim.)"""
    dlib = pytest.importorskip("dlib")
    image = blobs(side, side, seed=side)
    found = Face(box, 0.9, torch.zeros(5, 2))
    aligned = align([image], [found], DLIB)
    points = dlib_chip.five_points(image, box)
    shape = dlib.full_object_detection(dlib.rectangle(*box), [dlib.point(int(x), int(y)) for x, y in points])
    pixels = (image * 255).round().byte().permute(1, 2, 0).contiguous().numpy()
    theirs = dlib.get_face_chip(pixels, shape, size=150, padding=0.25)
    mine = (aligned.crops[0] * 255 + 1e-3).floor() / 255
    assert aligned.found.tolist() == [True]
    assert psnr(mine, torch.from_numpy(theirs).permute(2, 0, 1) / 255) >= 50


def test_without_dlib_its_template_is_refused(monkeypatch):
    dlib_chip._predictor.cache_clear()
    monkeypatch.setitem(sys.modules, "dlib", None)
    with pytest.raises(UserError, match="needs the package dlib-bin, which is missing"):
        align([blobs(60, 60)], [Face((5, 5, 50, 50), 0.9, torch.zeros(5, 2))], DLIB)
