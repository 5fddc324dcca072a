"""Parquet files with a column of images; copies in small groups of rows of those with large ones, and of the hub."""

from __future__ import annotations

import itertools
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from cluster import datasets as stored
from cluster.errors import UserError
from cluster.hub import load_table
from cluster.report import digest

if TYPE_CHECKING:
    from datasets import Dataset

IMAGE_COLUMNS = ("image", "img", "jpg", "face")
IDENTITY_COLUMNS = ("identity", "name", "person", "label")
ROWS_PER_SHARD = 2_000
ROWS_PER_GROUP = 64  # that are read for one image
LARGEST_GROUP = 256  # rows: for each shard of faces a group is read up to its faces, from the first row on
ROWS_AT_ONCE = 16
_HUB = re.compile(r"(?P<name>[\w.-]+/[\w.-]+)(:(?P<subset>[^:@]+))?(@(?P<split>[^:@]+))?")


class Table:
    """A parquet file with a column of images, of which a few rows are kept at a time.

    Raises:
        UserError: it is no parquet file, or has no column of images that stands out.
    """

    def __init__(self, path: Path) -> None:
        import pyarrow as pa
        import pyarrow.parquet as pq

        self.path = path
        try:
            # pages are read as they are wanted; else all of a group would lie in memory, which may be all of the file
            self.file = pq.ParquetFile(path, pre_buffer=False, buffer_size=stored.BLOCK)
        except (pa.ArrowInvalid, OSError) as error:
            if getattr(error, "errno", None) is not None:  # of the machine; what pyarrow says of a file has none
                raise
            told = str(error).splitlines()[0]
            raise UserError(f"{path} cannot be read as parquet ({told}); remove or replace it") from None
        counts = [self.file.metadata.row_group(group).num_rows for group in range(self.file.num_row_groups)]
        self.starts = np.concatenate([[0], np.cumsum(counts)]).astype(int)
        self.column = self._image_column()
        self.group, self.first, self.images = -1, 0, []
        self.batches: Iterator[Any] = iter(())

    def _image_column(self) -> str:
        from pyarrow import types

        schema = self.file.schema_arrow
        fit = [
            field.name
            for field in schema
            if types.is_binary(field.type)
            or types.is_large_binary(field.type)
            or (types.is_struct(field.type) and "bytes" in {inner.name for inner in field.type})
        ]
        named = [name for name in IMAGE_COLUMNS if name in fit]
        if not (named or len(fit) == 1):
            raise UserError(
                f"{self.path} has {len(fit)} columns that could hold images ({', '.join(schema.names)}); call the "
                f"right one {IMAGE_COLUMNS[0]}, with the bytes of a file in each row"
            )
        return (named or fit)[0]

    def labels(self) -> Iterator[tuple[str | None, str | None]]:
        """What each row calls its image and its person."""
        from pyarrow import types

        schema = self.file.schema_arrow
        named = {field.name for field in schema if not types.is_nested(field.type)}  # a row's list names nobody
        identity = next((name for name in IDENTITY_COLUMNS if name in named), None)
        classes = _class_names(schema, identity)
        columns = [name for name in (identity, "image_id", f"{self.column}.path") if name]
        for group in range(self.file.num_row_groups):
            count = int(self.starts[group + 1] - self.starts[group])
            for row in self.file.read_row_group(group, columns=columns).to_pylist() or [{}] * count:
                person = row.get(identity)
                person = None if person is None else classes.get(person, str(person))
                own = (row.get(self.column) or {}).get("path")
                if own and person is not None and "/" not in own:
                    own = f"{person}/{own}"
                called = row.get("image_id")
                yield own if called is None else str(called), person

    def image(self, row: int) -> bytes | UserError:
        """The bytes of an image, or why there are none."""
        group = int(np.searchsorted(self.starts, row, side="right")) - 1
        if not 0 <= group < self.file.num_row_groups:
            return UserError(f"has no row {row}")
        at = row - int(self.starts[group])
        if group != self.group or at < self.first:
            self.first, self.images = 0, []
            self.batches = self.file.iter_batches(ROWS_AT_ONCE, row_groups=[group], columns=[self.column])
        self.group = -1  # until its rows are here: after a damaged page there are no more
        while at >= self.first + len(self.images):
            self.first += len(self.images)
            self.images = next(self.batches).column(0)
        self.group = group
        value = self.images[at - self.first].as_py()
        data = value.get("bytes") if isinstance(value, dict) else value
        return UserError(f"holds no image in row {row}") if data is None else data


def in_small_groups(table: Table, work: Path) -> list[Path]:
    """The file, or copies of its rows in their order, where a group of its rows is larger than `LARGEST_GROUP`.

    Args:
        work: the files are put below it; those of an earlier call are kept while the table's file does not change.

    Raises:
        JobFailure: the disk is full.
    """
    import pyarrow as pa

    largest = int(np.diff(table.starts).max(initial=0))
    if largest <= LARGEST_GROUP:
        return [table.path]
    found = table.path.stat()
    configuration = {"file": str(table.path), "size": found.st_size, "modified": found.st_mtime_ns}
    configuration |= {"rows_per_shard": ROWS_PER_SHARD, "rows_per_group": ROWS_PER_GROUP}
    target = work / f"groups-{digest(str(table.path))}"
    manifest = stored.read_manifest(target)
    known = manifest is not None and manifest.configuration == configuration
    if known and len(stored.finished(target, read=False)) == len(manifest.shards):
        return manifest.files(target)
    print(
        f"{table.path} has groups of up to {largest} rows; its images are copied to {target} in small ones", flush=True
    )
    stored.clear(target)
    stored.prepare(target, configuration)
    kept = [name for name in table.file.schema_arrow.names if name in {table.column, "image_id", *IDENTITY_COLUMNS}]
    count, batches = 0, table.file.iter_batches(ROWS_AT_ONCE, columns=kept)
    try:
        while part := list(itertools.islice(batches, ROWS_PER_SHARD // ROWS_AT_ONCE)):
            stored.write_shard(target, count, pa.Table.from_batches(part), row_group_size=ROWS_PER_GROUP)
            count += 1
    except (pa.ArrowException, OSError) as error:
        if getattr(error, "errno", None) is not None:
            raise
        stored.clear(target)
        return [table.path]  # a damaged page: told of the images that are in it when they are read
    return stored.finish(target, configuration, range(count)).files(target)


def hub(location: str, work: Path) -> Path:
    """A folder of parquet files with the image data set `location` of the Hugging Face hub, or of its local cache.

    Args:
        location: owner/name, owner/name:SUBSET, owner/name@SPLIT or both.
        work: the files are put below it; those of an earlier call are kept.

    Raises:
        UserError: no such data set, subset or split, no column of images in it, or the hub cannot be reached and the
            data set is not cached.
    """
    import datasets
    from datasets.table import embed_table_storage

    table = _hub_table(location)
    column = next((name for name, kind in table.features.items() if isinstance(kind, datasets.Image)), None)
    if column is None:
        raise UserError(f"data set {location} has no column of images, only {', '.join(table.column_names)}")
    kept = [name for name in table.column_names if name in {column, "image_id", *IDENTITY_COLUMNS}]
    table = table.select_columns(kept).cast_column(column, datasets.Image(decode=False)).with_format("arrow")
    configuration = {"data_set": location, "fingerprint": table._fingerprint, "rows_per_shard": ROWS_PER_SHARD}
    target = work / f"hub-{digest(configuration)}"
    starts = range(0, len(table), ROWS_PER_SHARD)
    done = stored.prepare(target, configuration)
    for index, start in enumerate(starts):
        if index not in done:
            part = embed_table_storage(table[start : start + ROWS_PER_SHARD])
            stored.write_shard(target, index, part, row_group_size=ROWS_PER_GROUP)
    stored.finish(target, configuration, range(len(starts)))
    return target


def _hub_table(location: str) -> Dataset:
    asked = _HUB.fullmatch(location)
    if asked is None:
        raise UserError(f"hub:{location} is no data set of the hub; write owner/name, owner/name:SUBSET or with @SPLIT")
    remedy = "write owner/name:SUBSET@SPLIT of what it has"
    return load_table(asked["name"], asked["subset"], asked["split"] or "train", "oodface.images", remedy)


def _class_names(schema: Any, identity: str | None) -> dict[int, str]:
    """The names of the numbers in a column of classes, as the library datasets keeps them beside a table's schema."""
    try:
        about = json.loads((schema.metadata or {}).get(b"huggingface", b"{}"))
        return dict(enumerate(about["info"]["features"][identity]["names"]))
    except (ValueError, KeyError, TypeError):  # none, or somebody else's
        return {}
