"""Image files of any kind made into pixels: upright, 8-bit RGB, or refused in one clear sentence."""

from __future__ import annotations

import io
import warnings
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from cluster.errors import UserError

if TYPE_CHECKING:
    from PIL import Image

FORMATS = ("JPEG", "PNG", "BMP", "WEBP", "TIFF", "GIF", "PPM", "AVIF", "JPEG2000")
LARGEST = 1 << 26  # pixels; a decoded image takes three bytes each, 192 MiB at most
SMALLEST = 16  # pixels of the shorter side; detectors need 20 for a face
_MODES = {"L": "grey", "1": "black and white", "P": "a palette"}
# what brings an image upright, by its EXIF orientation, as names of PIL's transpositions
_TURNS = {
    2: "FLIP_LEFT_RIGHT",
    3: "ROTATE_180",
    4: "FLIP_TOP_BOTTOM",
    5: "TRANSPOSE",
    6: "ROTATE_270",
    7: "TRANSVERSE",
    8: "ROTATE_90",
}


@dataclass(frozen=True)
class Notes:
    """What `decode` found: PIL's mode of the file, and what it changed on the way to 8-bit RGB."""

    mode: str
    changes: tuple[str, ...]


def decode(data: bytes) -> tuple[np.ndarray, Notes]:
    """The pixels of an image file, upright, as 8-bit RGB.

    Grey becomes three equal channels; what is transparent is laid over black, which is also what an aligner puts beside
    a face; 16 bits lose their lower 8; the first frame of an animation is taken; CMYK is converted without its profile.

    Args:
        data: a whole file in one of `FORMATS`.

    Returns: uint8 (height, width, 3), and what was changed.
    Raises:
        UserError: no image, a truncated or damaged one, fewer than `SMALLEST` pixels on a side, more than `LARGEST` in
            all, or pixels of 32 bits, whose range is unknown. The sentence has no subject: the caller knows the file.
    """
    from PIL import Image, UnidentifiedImageError

    if not data:
        raise UserError("is empty")
    try:
        with warnings.catch_warnings():
            # of damaged EXIF, of many pixels: what matters of that is told by a refusal
            warnings.simplefilter("ignore")
            return _decode(data)
    except (UserError, MemoryError):  # for want of memory no image is damaged
        raise
    except UnidentifiedImageError:
        raise UserError(f"is no image in one of the formats {', '.join(FORMATS)}") from None
    except Image.DecompressionBombError:
        raise UserError(f"has far more than {LARGEST} pixels; scale it down") from None
    except Exception as error:
        # decoders of damaged files raise errors of many kinds, some of them without a text
        told = " ".join(str(error).split()) or type(error).__name__
        raise UserError(f"is truncated or damaged ({told})") from None


def _decode(data: bytes) -> tuple[np.ndarray, Notes]:
    from PIL import Image

    image = Image.open(io.BytesIO(data), formats=FORMATS)
    width, height = image.size
    if width * height > LARGEST:
        raise UserError(f"has {width} x {height} pixels; at most {LARGEST} are taken, so scale it down")
    if min(width, height) < SMALLEST:
        raise UserError(f"has {width} x {height} pixels; a side needs at least {SMALLEST}")
    mode, frames = image.mode, getattr(image, "n_frames", 1)
    image.load()
    rgb, changes = _to_rgb(image)
    turn = _turn(image)
    if turn:
        rgb = rgb.transpose(Image.Transpose[turn])
        changes.append("turned as its EXIF says")
    if frames > 1:
        changes.append(f"first of {frames} frames")
    return np.asarray(rgb), Notes(mode, tuple(changes))


def _to_rgb(image: Image.Image) -> tuple[Image.Image, list[str]]:
    from PIL import Image

    changes = []
    if image.mode.startswith("I;16") or (image.mode == "I" and image.format == "PPM"):
        changes.append("16 bits cut to 8")
        image = Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
    elif image.mode in ("I", "F"):
        raise UserError("has pixels of 32 bits, whose range is unknown; save it with 8 or 16 bits")
    if image.has_transparency_data:
        clear = image.convert("RGBA")
        laid = Image.new("RGB", clear.size)
        laid.paste(clear, mask=clear)
        return laid, [*changes, "transparency laid over black"]
    if image.mode != "RGB":
        changes.append(f"from {_MODES.get(image.mode, image.mode)} to RGB")
    return image.convert("RGB"), changes


def _turn(image: Image.Image) -> str | None:
    from PIL.ExifTags import Base

    try:
        return _TURNS.get(image.getexif().get(Base.Orientation))
    except MemoryError:
        raise
    except Exception:
        # an image with damaged EXIF is shown as it is stored, as everywhere else
        return None
