"""The parts of the catalogue that need no Spark: the hash of a picture, the bands, and what a row says of an image."""

from __future__ import annotations

import hashlib
import io
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from scipy.fft import dctn

from cluster.errors import UserError
from jobs.oodface import catalogue, sources
from jobs.oodface.catalogue import look, masks, phash
from jobs.oodface.pixels import decode

SHARED = Path(__file__).parents[3] / "shared/data/oodface"
needs_shared = pytest.mark.skipif(not SHARED.exists(), reason="../shared/data/oodface is absent")
LISTED = {
    "image_id": "ann/1",
    "identity": "ann",
    "path": "ann/1.png",
    "row": None,
    "place": 0,
    "size": 9,
    "modified": 9,
}


def scene(seed: int, height: int = 96, width: int = 80) -> np.ndarray:
    """Random colours with details as in a photograph: (height, width, 3)."""
    coarse = np.random.default_rng(seed).integers(0, 256, (14, 12, 3), dtype=np.uint8)
    return np.asarray(Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC))


def saved(pixels: np.ndarray, format: str = "PNG", **options) -> bytes:
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, format, **options)
    return file.getvalue()


def distance(first: int, second: int) -> int:
    return ((first ^ second) & (2**64 - 1)).bit_count()


@pytest.mark.parametrize("seed", range(5))
def test_the_hash_is_the_one_of_another_librarys_transform(seed):
    pixels = scene(seed, 64, 64)
    grey = np.asarray(Image.fromarray(pixels).convert("L"), dtype=float).reshape(32, 2, 32, 2).mean(axis=(1, 3))
    lowest = dctn(np.round(grey), type=2)[1:9, 1:9].ravel()
    bits = "".join("1" if one > np.median(lowest) else "0" for one in lowest)
    # averaging may round a few pixels otherwise
    assert distance(phash(pixels), int(bits, 2)) <= 2
    assert -(2**63) <= phash(pixels) < 2**63


@pytest.mark.parametrize("seed", range(8))
def test_equal_pictures_have_near_hashes_and_others_far_ones(seed):
    pixels = scene(seed)
    compressed, _ = decode(saved(pixels, "JPEG", quality=70))
    halved = np.asarray(Image.fromarray(pixels).resize((40, 48), Image.Resampling.BOX))
    lighter = np.minimum(pixels.astype(int) + 5, 255).astype(np.uint8)
    for other in (compressed, halved, lighter):
        assert distance(phash(pixels), phash(other)) <= catalogue.NEAR
    assert distance(phash(pixels), phash(scene(seed + 100))) > 12


def test_a_picture_of_one_colour_has_hash_0():
    for colour in (0, 1, 77, 255):
        assert phash(np.full((33, 47, 3), colour, np.uint8)) == 0


@given(st.integers(0, catalogue.FARTHEST), st.integers(0, 2**64 - 1), st.data())
def test_near_hashes_share_a_band_of_some_mask(near, value, data):
    flips = data.draw(st.sets(st.integers(0, 63), max_size=near))
    other = value ^ sum(1 << bit for bit in flips)
    signed = [mask & (2**64 - 1) for mask in masks(near)]
    assert all(-(2**63) <= mask < 2**63 for mask in masks(near))
    assert any(value & mask == other & mask for mask in signed)
    assert min(mask.bit_count() for mask in signed) >= 2 * (64 // (near + 2))
    covered = 0
    for mask in signed:
        covered |= mask
    assert covered == 2**64 - 1


def test_a_row_tells_what_an_image_is():
    data = saved(scene(0)[..., 0], "PNG")
    row = look(LISTED, data)
    assert row == {
        "image_id": "ann/1",
        "identity": "ann",
        "path": "ann/1.png",
        "row": None,
        "place": 0,
        "bytes": len(data),
        "width": 80,
        "height": 96,
        "mode": "L",
        "changes": "from grey to RGB",
        "sha256": hashlib.sha256(data).hexdigest(),
        "phash": phash(decode(data)[0]),
        "readable": True,
        "problem": None,
    }
    assert look(LISTED, saved(scene(0)))["changes"] is None


def test_a_row_tells_why_an_image_cannot_be_read():
    row = look(LISTED, UserError("cannot be read: Permission denied"))
    assert (row["readable"], row["problem"], row["sha256"]) == (False, "cannot be read: Permission denied", None)
    data = saved(scene(0))[:200]
    row = look(LISTED, data)
    assert not row["readable"]
    assert row["problem"].startswith("is truncated or damaged (")
    assert (row["bytes"], row["sha256"]) == (200, hashlib.sha256(data).hexdigest())
    assert row["phash"] is row["width"] is None
    assert set(row) == set(catalogue._looked_columns().names)


def test_the_digest_of_a_listing_is_of_names_sizes_and_times(tmp_path):
    def digest(**changed) -> str:
        row = sources.Located("a", None, "a.png", None, 5, 7)
        rows = [sources.Located(**{**vars(row), **changed}), row]
        return catalogue._list(rows, tmp_path / "listing")[2]

    same = digest()
    assert digest() == same
    changes = [{"image_id": "b"}, {"identity": "b"}, {"path": "b"}, {"row": 1}, {"size": 6}, {"modified": 8}]
    assert len({same, *(digest(**change) for change in changes)}) == 7


def test_a_listing_is_cut_into_chunks(tmp_path, monkeypatch):
    monkeypatch.setattr(catalogue, "CHUNK", 2)
    rows = [sources.Located(str(number), None, "x", None, 1, 1) for number in range(5)]
    folder, count, _ = catalogue._list(iter(rows), tmp_path / "listing")
    assert count == len(list(folder.glob("*.parquet"))) == 3


def test_a_distance_out_of_range_is_refused_before_anything_is_read(tmp_path):
    with pytest.raises(UserError, match="near duplicates at 9 bits cannot be looked for; take 0 to 8 of 64"):
        catalogue.build("folder", str(tmp_path), tmp_path / "out", near=9)
    assert not (tmp_path / "out").exists()


def test_images_that_are_not_there_leave_nothing_behind(tmp_path):
    with pytest.raises(UserError, match="nowhere"):
        catalogue.build("folder", str(tmp_path / "nowhere"), tmp_path / "out")
    assert not (tmp_path / "out").exists()
    (tmp_path / "out" / "_work" / "looked-0").mkdir(parents=True)
    with pytest.raises(UserError, match="nowhere"):
        catalogue.build("folder", str(tmp_path / "nowhere"), tmp_path / "out")
    assert (tmp_path / "out" / "_work" / "looked-0").exists()
    assert not (tmp_path / "out" / "_work" / "listing").exists()


def test_more_pairs_than_can_be_compared_are_refused():
    for near, images in ((8, 300_000), (6, 1_000_000), (4, 5_000_000), (0, 10**9)):
        catalogue.require_few_pairs(near, images)
    told = r"near_duplicates = 8 would compare about 8e\+09 pairs of 1000000 images; set it to 6 or lower"
    with pytest.raises(UserError, match=told):
        catalogue.require_few_pairs(8, 1_000_000)
    with pytest.raises(UserError, match="set it to 4 or lower"):
        catalogue.require_few_pairs(6, 5_000_000)


def test_a_listing_with_too_many_pairs_starts_no_spark(tmp_path, monkeypatch):
    (tmp_path / "images").mkdir()
    for name in ("a.png", "b.png"):
        (tmp_path / "images" / name).write_bytes(saved(scene(0)))
    monkeypatch.setattr(catalogue, "MOST_COMPARED", 0.01)
    monkeypatch.setattr(catalogue.spark, "session", None)
    with pytest.raises(UserError, match="pairs of 2 images; set it to 6 or lower"):
        catalogue.build("folder", str(tmp_path / "images"), tmp_path / "out", near=7)


@needs_shared
def test_a_photograph_saved_again_or_scaled_is_near():
    for path in sorted((SHARED / "lfw400/images").rglob("*.jpg"))[::15]:
        pixels, _ = decode(path.read_bytes())
        again, _ = decode(saved(pixels, "JPEG", quality=60))
        scaled = np.asarray(Image.fromarray(pixels).resize((160, 160), Image.Resampling.BICUBIC))
        assert distance(phash(pixels), phash(again)) <= catalogue.NEAR
        assert distance(phash(pixels), phash(scaled)) <= catalogue.NEAR


@needs_shared
def test_no_two_photographs_of_lfw400_are_near():
    paths = sorted((SHARED / "lfw400/images").rglob("*.jpg"))
    hashes = np.array([phash(decode(path.read_bytes())[0]) for path in paths]).view(np.uint64)
    apart = np.bitwise_count(hashes[:, None] ^ hashes[None, :])[np.triu_indices(614, 1)]
    assert apart.min() > catalogue.FARTHEST
