"""Where face images come from: folders in the layouts of the benchmarks, parquet files, data sets of the hub.

Every source gives `Located` rows in a fixed order, one an image; `contents` reads the bytes behind them. What a source
cannot use is a row with a problem, so that it is listed and counted.
"""

from __future__ import annotations

import itertools
import os
import platform
import re
import stat
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from cluster.errors import JobFailure, UserError
from jobs.oodface.tables import Table, hub, in_small_groups

SUFFIXES = (".jpg", ".jpeg", ".png", ".bmp", ".webp", ".tif", ".tiff", ".gif", ".ppm", ".pgm", ".avif", ".jp2")
LARGEST_FILE = 1 << 28  # bytes

_LFW = re.compile(r"(?P<name>.+)_\d{4,}")
_DIGITS = re.compile(r"\d+")


@dataclass(frozen=True)
class Located:
    """An image that was found, not yet looked into.

    image_id: stable and meant to be unique: the path below the source without its extension, or what a parquet row
    says. path, row: the file that holds the bytes, and the row in it where that is a parquet file. size, modified:
    bytes of that file, and its time of change in ns. problem: why it cannot be used, as the end of a sentence.
    """

    image_id: str
    identity: str | None
    path: str
    row: int | None
    size: int
    modified: int
    problem: str | None = None


def find(layout: str, location: str, work: Path) -> Iterator[Located]:
    """The images of a source, in an order that depends on names alone.

    Args:
        layout: one of `LAYOUTS`.
        location: a folder, a parquet file or a folder of them; for `hub` owner/name, owner/name:SUBSET or
            owner/name:SUBSET@SPLIT; the split is train where none is named.
        work: where parquet is put that is made of a hub data set, or of files with large groups of rows.

    Raises:
        UserError: unknown layout, no such place, or not one image there.
        JobFailure: the disk of `work` is full.
    """
    if layout not in LAYOUTS:
        raise UserError(f"there is no layout '{layout}' of images; take one of {', '.join(LAYOUTS)}")
    root = hub(location, work) if layout == "hub" else Path(location)
    if not root.exists():
        raise UserError(f"{location} does not exist or is not seen from here; check the path of the images")
    empty = True
    for row in parquet(root.resolve(), work) if layout == "parquet" else LAYOUTS[layout](root.resolve()):
        empty = False
        yield row
    if empty:
        raise UserError(f"{location} holds no image in the layout {layout}; check the path and the layout")


def folder(root: Path) -> Iterator[Located]:
    """Every image file below a folder; its identity is the name of the folder it lies in, none directly in `root`.

    Other files and hidden ones are left alone.
    """
    for path in _images(root):
        yield _located(_below(path, root), None if path.parent == root else path.parent.name, path)


def lfw(root: Path) -> Iterator[Located]:
    """NAME/NAME_0001.jpg. Source: Huang et al., Labeled Faces in the Wild, 2007."""
    for path in _images(root):
        matched = _LFW.fullmatch(path.stem)
        fits = path.parent.parent == root and matched is not None and matched["name"] == path.parent.name
        problem = None if fits else "is not named NAME/NAME_0001.jpg, as the layout lfw has it"
        yield _located(_below(path, root), path.parent.name, path, problem)


def cfp(root: Path) -> Iterator[Located]:
    """Data/Images/001/frontal/01.jpg and .../profile/01.jpg; `root` is the folder above Data, or Images itself.

    An image is 001/frontal/01. Source: Sengupta et al., Frontal to Profile Face Verification in the Wild, 2016.
    """
    root = next((place for place in (root / "Data" / "Images", root / "Images") if place.is_dir()), root)
    for path in _images(root):
        parts = path.relative_to(root).parts
        fits = len(parts) == 3 and parts[1] in ("frontal", "profile")
        problem = None if fits else "is not named 001/frontal/01.jpg or 001/profile/01.jpg, as the layout cfp has it"
        yield _located(_below(path, root), parts[0], path, problem)


def ytf(root: Path) -> Iterator[Located]:
    """NAME/VIDEO/frames: one image a video, its middle frame, called NAME/VIDEO.

    Frames are ordered by the numbers in their names; of n the one at n // 2, counted from 0, is taken. The original
    script names another frame for five videos; we do not have that list, so they have their middle frame here too.
    Source: OODFace, the evaluation script of its repository; Wolf et al., YouTube Faces, 2011.
    """
    for name in _entries(root):
        for video in _entries(name) if name.is_dir() else ():
            if not video.is_dir():
                continue
            frames = sorted(_images(video), key=lambda path: [int(part) for part in _DIGITS.findall(path.stem)])
            image_id = f"{name.name}/{video.name}"
            if frames:
                yield _located(image_id, name.name, frames[len(frames) // 2])
            else:
                yield _located(image_id, name.name, video, "is a video without frames")


def parquet(root: Path, work: Path | None = None) -> Iterator[Located]:
    """The rows of a parquet file, or of all those below a folder, that have an image column.

    The column holds the bytes of a file, or {bytes, path} as the hub's image feature does; where there are several it
    is the first of `tables.IMAGE_COLUMNS`. Identities come from the first of `tables.IDENTITY_COLUMNS`, class numbers
    by their names. An image is called by the column `image_id`, else by its own path (put under its identity where it
    has no folder), else FILE/ROW. Images of a file whose groups of rows are large lie in copies below `work`, where
    that is given.

    Raises:
        UserError: no parquet file, or no image column.
    """
    for path in [root] if root.is_file() else sorted(path for path in root.rglob("*.parquet") if _is_table(path, root)):
        stem = without_suffix(path.name if path == root else path.relative_to(root).as_posix(), (".parquet",))
        found = path.stat()
        table, numbers = Table(path), itertools.count()
        for part in [path] if work is None else in_small_groups(table, work):
            for row, (own, person) in enumerate((table if part == path else Table(part)).labels()):
                number = next(numbers)
                image_id = f"{stem}/{number:06d}" if own is None else without_suffix(own)
                problem = (
                    None if stays_inside(image_id) else f"is called {image_id!r}, which is no plain path below a folder"
                )
                yield Located(image_id, person, str(part), row, found.st_size, found.st_mtime_ns, problem)


def _is_table(path: Path, root: Path) -> bool:
    """Spark writes folders named x.parquet, with parts of its own in `_temporary`; hidden files are nobody's."""
    parts = path.relative_to(root).parts
    return path.is_file() and not any(part.startswith((".", "_")) for part in parts)


LAYOUTS: Mapping[str, Callable[[Path], Iterator[Located]]] = {
    "folder": folder,
    "lfw": lfw,
    "cfp": cfp,
    "ytf": ytf,
    "parquet": parquet,
    "hub": parquet,
}


def contents(places: Iterable[tuple[str, int | None]]) -> Iterator[bytes | UserError]:
    """The bytes of images, given as (path, row) of `Located`; an error stands where there are none.

    Rows of one parquet file should come in order: a group of rows is read from its beginning for one that does not.

    Raises:
        JobFailure: it is not the file that is at fault: a folder that this machine does not see, a failing disk.
    """
    table: Table | None = None
    asked = gone = 0
    for name, row in places:
        asked += 1
        path = Path(name)
        try:
            if row is not None:
                table = table if table is not None and table.path == path else Table(path)
                yield table.image(row)
            elif path.stat().st_size > LARGEST_FILE:
                yield UserError(f"has {path.stat().st_size} bytes; at most {LARGEST_FILE} are read")
            else:
                yield path.read_bytes()
        except FileNotFoundError as error:
            if not path.parent.is_dir():
                raise _unseen(path, error) from None
            gone += 1
            yield UserError(f"cannot be read: {error.strerror}")
        except OSError as error:
            if error.errno is not None:
                raise _unseen(path, error) from None
            yield UserError(f"cannot be read: {str(error).splitlines()[0]}")  # of a damaged page of a parquet file
        except UserError as error:
            yield error
    if gone == asked > 1:
        raise JobFailure(
            f"{platform.node()} sees none of {asked} images, of which {path} is the last; mount what is missing"
        )


def _unseen(path: Path, error: OSError) -> JobFailure:
    return JobFailure(
        f"{path} cannot be read on {platform.node()}: {error.strerror or error}; mend that and run the same command "
        "again to continue"
    )


def without_suffix(name: str, suffixes: Iterable[str] = SUFFIXES) -> str:
    """A path without the extension of an image; other dots belong to the name."""
    suffix = PurePosixPath(name).suffix
    return name.removesuffix(suffix) if suffix.lower() in suffixes else name


def stays_inside(image_id: str) -> bool:
    """Whether a file of that name lies in the folder that it is put in: names come from files of others."""
    parts = PurePosixPath(image_id).parts
    plain = str(PurePosixPath(image_id)) == image_id  # "a" and "./a" would be one file
    return plain and bool(parts) and not image_id.startswith("/") and ".." not in parts and "\0" not in image_id


def _entries(place: Path) -> list[Path]:
    """What is in a folder and not hidden, by name; the folder itself where it cannot be opened."""
    try:
        return sorted(path for path in place.iterdir() if not path.name.startswith("."))
    except OSError:
        return [place]


def _images(root: Path) -> Iterator[Path]:
    """The files below a folder that are named as images, and folders that cannot be opened, depth first by name."""
    if not root.is_dir():
        raise UserError(f"{root} is no folder; name the folder of the images")
    for path in _entries(root):
        if path == root or (path.suffix.lower() in SUFFIXES and not path.is_dir()):
            yield path
        elif path.is_dir() and not (path.is_symlink() and path.resolve() in {one.resolve() for one in path.parents}):
            yield from _images(path)


def _below(path: Path, root: Path) -> str:
    return without_suffix(path.relative_to(root).as_posix())


def _located(image_id: str, identity: str | None, path: Path, problem: str | None = None) -> Located:
    size = modified = 0
    try:
        found = path.stat()
        size, modified = found.st_size, found.st_mtime_ns
        if stat.S_ISDIR(found.st_mode):
            problem = problem or "is a folder that cannot be opened"
        elif not stat.S_ISREG(found.st_mode):
            problem = "is no regular file"
        elif not os.access(path, os.R_OK):
            problem = problem or "may not be read by this user"
    except OSError as error:
        problem = f"cannot be read: {error.strerror}"
    texts = [text and os.fsencode(text).decode("utf-8", "backslashreplace") for text in (image_id, identity, str(path))]
    if texts[2] != str(path):
        problem = "has a name that is not UTF-8"
    return Located(texts[0], texts[1], texts[2], None, size, modified, problem)
