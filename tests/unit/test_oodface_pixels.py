"""What becomes of every odd kind of image file: pixels with a note, or one sentence."""

from __future__ import annotations

import io
import random
import struct
import zlib

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from cluster.errors import UserError
from jobs.oodface.pixels import LARGEST, decode

PIXELS = np.random.default_rng(0).integers(0, 256, (24, 32, 3), dtype=np.uint8)


def encoded(pixels: np.ndarray | Image.Image, format: str = "PNG", **options) -> bytes:
    image = pixels if isinstance(pixels, Image.Image) else Image.fromarray(pixels)
    file = io.BytesIO()
    image.save(file, format, **options)
    return file.getvalue()


def test_colour_stays_as_it_is():
    pixels, notes = decode(encoded(PIXELS))
    assert pixels.dtype == np.uint8
    assert (pixels == PIXELS).all()
    assert (notes.mode, notes.changes) == ("RGB", ())


def test_grey_and_black_and_white():
    pixels, notes = decode(encoded(PIXELS[..., 0]))
    assert (pixels == PIXELS[..., :1]).all()
    assert (notes.mode, notes.changes) == ("L", ("from grey to RGB",))
    pixels, notes = decode(encoded(Image.fromarray(PIXELS[..., 0] > 99)))
    assert (pixels == 255 * (PIXELS[..., :1] > 99)).all()
    assert notes.changes == ("from black and white to RGB",)


def test_transparency_is_laid_over_black():
    alpha = np.full((24, 32, 1), 255, np.uint8)
    alpha[:, :8], alpha[:, 8:16] = 0, 128
    pixels, notes = decode(encoded(np.concatenate([PIXELS, alpha], axis=2)))
    assert (pixels[:, :8] == 0).all()
    assert np.abs(pixels[:, 8:16] - PIXELS[:, 8:16] * (128 / 255)).max() < 1
    assert (pixels[:, 16:] == PIXELS[:, 16:]).all()
    assert (notes.mode, notes.changes) == ("RGBA", ("transparency laid over black",))
    pixels, notes = decode(encoded(np.concatenate([PIXELS[..., :1], alpha], axis=2)))
    assert (notes.mode, pixels[0, 0].tolist()) == ("LA", [0, 0, 0])


def test_palettes_with_and_without_a_transparent_colour():
    image = Image.fromarray(PIXELS // 128 * 128).quantize(8)
    pixels, notes = decode(encoded(image))
    assert (pixels == np.asarray(image.convert("RGB"))).all()
    assert notes.changes == ("from a palette to RGB",)
    pixels, _ = decode(encoded(image, transparency=0))
    assert (pixels[np.asarray(image) == 0] == 0).all()


def test_cmyk():
    colour = np.zeros((24, 32, 4), np.uint8)
    colour[..., 0] = 255
    pixels, notes = decode(encoded(Image.fromarray(colour, "CMYK"), "JPEG"))
    assert np.abs(pixels.astype(int) - [0, 255, 255]).max() < 6
    assert notes.changes == ("from CMYK to RGB",)


@pytest.mark.parametrize("format", ["PNG", "TIFF", "PPM"])
def test_16_bits_keep_their_upper_8(format):
    values = np.random.default_rng(1).integers(0, 1 << 16, (20, 30)).astype(np.uint16)
    data = encoded(values, format)
    pixels, notes = decode(data)
    assert (pixels == (values >> 8)[..., None]).all()
    assert notes.changes == ("16 bits cut to 8", "from grey to RGB")


@pytest.mark.parametrize("kind", [np.float32, np.int32])
def test_32_bits_are_refused(kind):
    with pytest.raises(UserError, match="has pixels of 32 bits, whose range is unknown"):
        decode(encoded(np.ones((20, 20), kind), "TIFF"))


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("format", ["JPEG", "PNG", "TIFF", "WEBP"])
def test_exif_turns_an_image_upright(orientation, format):
    upright = np.zeros((32, 48, 3), np.uint8)
    upright[:16, :24] = 255
    # how a camera stores it, by the meaning of the eight values: what row 0 and column 0 of the file show
    stored = {
        1: upright,
        2: upright[:, ::-1],
        3: upright[::-1, ::-1],
        4: upright[::-1],
        5: upright.transpose(1, 0, 2),
        6: upright.transpose(1, 0, 2)[::-1],
        7: upright.transpose(1, 0, 2)[::-1, ::-1],
        8: upright.transpose(1, 0, 2)[:, ::-1],
    }[orientation]
    exif = Image.Exif()
    exif[0x0112] = orientation
    pixels, notes = decode(encoded(stored, format, exif=exif, quality=100))
    assert pixels.shape == upright.shape
    assert np.abs(pixels.astype(int) - upright).mean() < 3
    # PIL turns a TIFF file itself
    assert ("turned as its EXIF says" in notes.changes) == (orientation > 1 and format != "TIFF")


def test_the_first_frame_of_an_animation():
    frames = [Image.fromarray(np.full((20, 20, 3), value, np.uint8)) for value in (10, 200, 90)]
    for format in ("GIF", "WEBP", "PNG", "TIFF"):
        data = encoded(frames[0], format, save_all=True, append_images=frames[1:], lossless=True)
        pixels, notes = decode(data)
        assert (pixels == 10).all()
        assert "first of 3 frames" in notes.changes


@pytest.mark.parametrize("format", ["JPEG", "PNG", "BMP", "WEBP", "TIFF", "GIF", "PPM", "AVIF", "JPEG2000"])
@pytest.mark.parametrize("share", [0.02, 0.3, 0.6, 0.9])
def test_truncated_files_are_refused(format, share):
    data = encoded(np.random.default_rng(2).integers(0, 256, (64, 64, 3), dtype=np.uint8), format)
    with pytest.raises(UserError, match=r"truncated or damaged|no image"):
        decode(data[: int(share * len(data))])


def test_small_and_empty_files_are_refused():
    with pytest.raises(UserError, match="is empty"):
        decode(b"")
    with pytest.raises(UserError, match="is no image in one of the formats JPEG"):
        decode(b"hello world, this is no image")
    with pytest.raises(UserError, match="has 1 x 1 pixels; a side needs at least 16"):
        decode(encoded(PIXELS[:1, :1]))


@pytest.mark.parametrize("side", [9_000, 30_000, 400_000])
def test_a_bomb_is_refused_before_it_unfolds(side):
    head = struct.pack(">IIBBBBB", side, side, 8, 2, 0, 0, 0)
    chunk = b"IHDR" + head
    png = b"\x89PNG\r\n\x1a\n" + struct.pack(">I", 13) + chunk + struct.pack(">I", zlib.crc32(chunk))
    rows = zlib.compress(bytes(10_000))
    data = b"IDAT" + rows
    png += struct.pack(">I", len(rows)) + data + struct.pack(">I", zlib.crc32(data))
    with pytest.raises(UserError, match=rf"has .*pixels|far more than {LARGEST} pixels"):
        decode(png)


def test_files_that_are_programs_are_no_images():
    postscript = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 64 64\n%%EndComments\nshowpage\n"
    with pytest.raises(UserError, match="is no image in one of the formats"):
        decode(postscript)


@settings(max_examples=150)
@given(st.sampled_from(["JPEG", "PNG", "WEBP", "TIFF", "GIF", "BMP", "PPM", "AVIF", "JPEG2000"]), st.integers(0, 2**32))
def test_a_damaged_file_is_an_image_or_one_sentence(format, seed):
    rng = random.Random(seed)
    exif = Image.Exif()
    exif[0x0112] = 6
    options = {} if format in ("GIF", "BMP", "PPM") else {"exif": exif}
    data = bytearray(encoded(PIXELS, format, **options))
    for _ in range(rng.randint(1, 8)):
        data[rng.randrange(len(data))] = rng.randrange(256)
    refusal = None
    try:
        pixels, _ = decode(bytes(data))
    except UserError as error:
        refusal = str(error)
    assert "\n" not in refusal if refusal else (pixels.dtype, pixels.ndim) == (np.uint8, 3)
