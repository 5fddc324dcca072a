"""Data sets on disk: parquet shards that many processes write, each whole or not at all, and a manifest over them.

A shard `part-00012.parquet` is followed by its entry `_part-00012.json`; without an entry that agrees with it, it does
not count. So a writer may die at any point, and a restart writes what is missing. Readers of a folder (Ray Data, Spark,
pyarrow) skip names that begin with an underscore or a dot; `datasets.load_dataset` does not, and has to be told
data_files="FOLDER/part-*.parquet".
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import re
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO

from cluster.errors import JobFailure, UserError
from cluster.report import digest

if TYPE_CHECKING:
    import pyarrow as pa

MANIFEST = "_manifest.json"
CONFIGURATION = "_configuration.json"
BLOCK = 1 << 20  # bytes read at a time
SYNCS = 16  # files that are brought to the disk at a time
_TEMPORARY = ".writing-"
_ENTRY = re.compile(r"_part-\d+\.json")
_FILE = re.compile(r"part-(\d+)\.parquet")


@dataclass(frozen=True)
class Shard:
    """A finished parquet file: its name, rows, bytes and SHA-256.

    schema: its columns as (name, Arrow type). note: what the writer wants to find again, such as counts of its losses.
    """

    file: str
    rows: int
    size: int
    sha256: str
    schema: tuple[tuple[str, str], ...]
    note: Mapping = field(default_factory=dict)

    @property
    def index(self) -> int:
        """The number in its name."""
        return int(_FILE.fullmatch(self.file)[1])


@dataclass(frozen=True)
class Manifest:
    """A finished data set: columns as (name, Arrow type), rows, shards in order, and the configuration that made it."""

    schema: tuple[tuple[str, str], ...]
    rows: int
    shards: tuple[Shard, ...]
    configuration: Mapping

    @property
    def digest(self) -> str:
        """16 hexadecimal digits that stand for the content: equal for equal shards in equal order."""
        return digest([shard.sha256 for shard in self.shards])

    def files(self, folder: Path) -> list[Path]:
        """The shards in order."""
        return [folder / shard.file for shard in self.shards]


def prepare(folder: Path, configuration: Mapping) -> dict[int, Shard]:
    """Makes `folder` ready for writers and gives the shards that are done already, by index.

    Call it once, before any writer runs: it removes what dead ones left, and the manifest until all is done again.

    Args:
        configuration: what decides the content, as JSON; a folder holds one data set only.

    Raises:
        UserError: the folder holds a data set of another configuration, or shards of none.
        JobFailure: the disk is full.
    """
    folder.mkdir(parents=True, exist_ok=True)
    wanted = json.loads(json.dumps(configuration))
    path = folder / CONFIGURATION
    present = _load(path)
    if present is None and _parts(folder):
        raise UserError(f"{folder} holds parquet files whose making is not known; name another folder or remove them")
    if present is None:
        _replace(path, lambda file: file.write(_encoded(wanted)))
    elif present != wanted:
        changed = sorted(key for key in {*present, *wanted} if present.get(key) != wanted.get(key))
        raise UserError(
            f"{folder} holds a data set made with other settings ({', '.join(changed)}); name another folder or "
            "remove this one"
        )
    sweep(folder)
    (folder / MANIFEST).unlink(missing_ok=True)
    shards = finished(folder)
    for part in _parts(folder):
        if part.name not in {shard.file for shard in shards.values()}:
            part.unlink()
    return shards


def sweep(folder: Path) -> None:
    """Removes what writers that died left in a folder and below it; no writer may be at work there."""
    for leftover in folder.rglob(f"{_TEMPORARY}*"):
        leftover.unlink(missing_ok=True)


def clear(folder: Path) -> None:
    """Removes the data set in a folder, whatever made it; what else lies there stays."""
    if (folder / CONFIGURATION).exists():
        (folder / MANIFEST).unlink(missing_ok=True)
        for part in _parts(folder):
            part.unlink()
        for entry in [path for path in folder.iterdir() if _ENTRY.fullmatch(path.name)]:
            entry.unlink()
        (folder / CONFIGURATION).unlink()


def write_shard(
    folder: Path, index: int, table: pa.Table, note: Mapping | None = None, row_group_size: int | None = None
) -> Shard:
    """Writes one shard, and then its entry, each under a temporary name first; any process may call it at any time.

    Args:
        index: the place in the data set, from 0; what stood there is replaced.
        note: kept in the shard's entry, as JSON.
        row_group_size: rows that a reader of one must read; None is pyarrow's own.

    Raises:
        JobFailure: the disk is full, or the folder cannot be written; no part of the shard is left.
    """
    import pyarrow.parquet as pq

    path = folder / f"part-{index:05d}.parquet"
    seen = hashlib.sha256()

    def write(file: BinaryIO) -> None:
        pq.write_table(table, _Digesting(file, seen), compression="zstd", row_group_size=row_group_size)

    size = _replace(path, write)
    schema = tuple((column.name, str(column.type)) for column in table.schema)
    shard = Shard(path.name, table.num_rows, size, seen.hexdigest(), schema, dict(note or {}))
    _replace(_entry(path), lambda file: file.write(_encoded(asdict(shard))))
    return shard


def write_file(path: Path, content: bytes) -> str:
    """Writes a file beside the shards, whole or not at all, into a folder of `make_folders`; its SHA-256.

    Unlike a shard it is lost when the machine loses power before `settle` has returned, for waiting for the disk after
    each file would take longer than making it.

    Raises: as `write_shard`.
    """
    _replace(path, lambda file: file.write(content), durable=False)
    return hashlib.sha256(content).hexdigest()


def make_folders(folders: Iterable[Path]) -> None:
    """Makes the folders of files beside the shards, and those above them; some may be there already.

    Raises: as `write_shard`.
    """
    for folder in folders:
        with _failures(folder):
            folder.mkdir(parents=True, exist_ok=True)


def settle(files: Iterable[Path], root: Path) -> None:
    """Returns when files that `write_file` has put below `root`, and all folders that lead there, are on the disk.

    Raises: as `write_shard`.
    """
    files = list(files)
    parents = {file.parent for file in files}
    folders = {above for one in parents for above in (one, *one.parents) if above.is_relative_to(root.parent)}
    with ThreadPoolExecutor(SYNCS) as pool:  # that wait for the disk together, which takes them together
        list(pool.map(_sync, files))
        list(pool.map(_sync, folders))


def finished(folder: Path, read: bool = True) -> dict[int, Shard]:
    """The shards whose file has the size and, where all are to be read, SHA-256 of its entry, by index in order."""
    entries = [path for path in folder.iterdir() if _ENTRY.fullmatch(path.name)] if folder.is_dir() else []
    shards = [shard for shard in map(_shard, map(_load, entries)) if shard]
    with ThreadPoolExecutor() as pool:
        faults = list(pool.map(lambda shard: _fault(folder / shard.file, shard, read), shards))
    sound = [shard for shard, fault in zip(shards, faults, strict=True) if not fault]
    return {shard.index: shard for shard in sorted(sound, key=lambda shard: shard.index)}


def finish(folder: Path, configuration: Mapping, indices: Iterable[int]) -> Manifest:
    """Puts the manifest together from the entries, once all writers are done.

    Args:
        configuration: as in `prepare`.
        indices: of the shards that the data set must have: all of them and no other.

    Raises:
        JobFailure: a shard is missing or damaged, one is too many, or two differ in their columns.
    """
    # those that were there were read by `prepare`, the others have been written since
    shards, wanted = finished(folder, read=False), sorted(set(indices))
    for told, numbers in (("lacks", set(wanted) - set(shards)), ("has an unknown", set(shards) - set(wanted))):
        if numbers:
            raise JobFailure(f"{folder} {told} shard {min(numbers)} ({len(numbers)} in all); run the command again")
    for shard in shards.values():
        if shard.schema != shards[wanted[0]].schema:
            raise JobFailure(f"{folder}: {shard.file} has other columns than part {wanted[0]}; remove the folder")
    schema = shards[wanted[0]].schema if wanted else ()
    rows = sum(shard.rows for shard in shards.values())
    manifest = Manifest(schema, rows, tuple(shards.values()), json.loads(json.dumps(configuration)))
    _replace(folder / MANIFEST, lambda file: file.write(_encoded(asdict(manifest))))
    return manifest


def read_manifest(folder: Path) -> Manifest | None:
    """The manifest of a finished data set, or None where there is none; does not look at the shards.

    Raises:
        UserError: the manifest is damaged.
    """
    path = folder / MANIFEST
    if not path.is_file():
        return None
    content = _load(path) or {}
    shards = tuple(_shard(entry) for entry in content.get("shards", ()))
    if not {"schema", "rows", "configuration"} <= set(content) or None in shards:
        raise UserError(f"{path} is damaged; remove {folder} and make the data set again")
    return Manifest(_columns(content["schema"]), content["rows"], shards, content["configuration"])


def verify(folder: Path) -> Manifest:
    """The manifest, after every shard was read and found as it says.

    Raises:
        UserError: no finished data set is there, or a shard is missing or has changed.
    """
    manifest = read_manifest(folder)
    if manifest is None:
        raise UserError(f"{folder} holds no finished data set ({MANIFEST} is missing); make it first")
    for shard in manifest.shards:
        fault = _fault(folder / shard.file, shard)
        if fault:
            raise UserError(f"{folder / shard.file} {fault}; make the data set again")
    return manifest


class _Digesting:
    """A file for pyarrow that hashes what passes."""

    closed = False

    def __init__(self, file: BinaryIO, seen: hashlib._Hash) -> None:
        self._file, self._seen = file, seen

    def write(self, data: bytes) -> int:
        self._seen.update(data)
        return self._file.write(data)

    def flush(self) -> None:
        self._file.flush()

    def close(self) -> None:
        self.closed = True


def _replace(path: Path, write: Callable[[BinaryIO], object], durable: bool = True) -> int:
    """Fills `path` with what `write` writes, if `durable` on the disk when this returns; the number of bytes."""
    temporary = None
    try:
        with _failures(path):
            handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=_TEMPORARY)
            with os.fdopen(handle, "wb") as file:
                write(file)
                file.flush()
                if durable:
                    os.fsync(file.fileno())
                size = file.tell()
            os.chmod(temporary, 0o644)
            os.replace(temporary, path)
        if durable:
            _sync(path.parent)
    finally:
        if temporary is not None:
            Path(temporary).unlink(missing_ok=True)
    return size


@contextmanager
def _failures(path: Path) -> Iterator[None]:
    """Tells what the system says of a path that is written."""
    try:
        yield
    except OSError as error:
        full = error.errno in (errno.ENOSPC, errno.EDQUOT)
        remedy = "free some space" if full else "check the folder"
        raise JobFailure(
            f"{path} cannot be written: {os.strerror(error.errno) if error.errno else error}; {remedy} and run the "
            "same command again to continue"
        ) from error


def _sync(path: Path) -> None:
    """Puts a file's content, or what a folder names, on the disk."""
    with _failures(path):
        handle = os.open(path, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def _fault(path: Path, shard: Shard, read: bool = True) -> str:
    """What is wrong with a shard, as the end of a sentence; empty where nothing is, or nothing is seen unread."""
    if not path.is_file():
        return "is missing"
    if path.stat().st_size != shard.size:
        return f"has {path.stat().st_size} bytes, not {shard.size}"
    if not read:
        return ""
    seen = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(BLOCK):
            seen.update(block)
    return "" if seen.hexdigest() == shard.sha256 else "has changed since it was written (its SHA-256 differs)"


def _parts(folder: Path) -> list[Path]:
    return [path for path in folder.iterdir() if _FILE.fullmatch(path.name)]


def _entry(path: Path) -> Path:
    return path.with_name(f"_{path.stem}.json")


def _encoded(content: object) -> bytes:
    return json.dumps(content, indent=1, ensure_ascii=False).encode() + b"\n"


def _load(path: Path) -> dict | None:
    """A JSON object, or None where there is none: after a power cut a file may be there without its content."""
    try:
        content = json.loads(path.read_bytes())
    except (OSError, ValueError):
        return None
    return content if isinstance(content, dict) else None


def _shard(entry: dict | None) -> Shard | None:
    try:
        known = entry is not None and _FILE.fullmatch(entry["file"])
        return Shard(**{**entry, "schema": _columns(entry["schema"])}) if known else None
    except (KeyError, TypeError, ValueError):
        return None


def _columns(pairs: Iterable) -> tuple[tuple[str, str], ...]:
    return tuple((name, kind) for name, kind in pairs)
