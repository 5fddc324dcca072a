"""The catalogue of a source of images, made by Spark: what each image is, whether it can be read, and its duplicates.

Images are listed, looked into a chunk at a time, and compared by their perceptual hashes without comparing all pairs.
The driver holds no list of them but the names in one folder; a run that was cut off looks only into the chunks that
are missing.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import shutil
from collections.abc import Iterable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from jaxtyping import UInt8

from cluster import datasets, spark
from cluster.errors import UserError
from cluster.report import read_json, write_json
from jobs.oodface import sources
from jobs.oodface.pixels import decode

if TYPE_CHECKING:
    import pyarrow as pa
    from pyspark.sql import DataFrame, SparkSession

VERSION = 3  # of what `look` finds: another number looks into everything again
SUMMARY = "_summary.json"
CHUNK = 256  # images a Spark task, about half a second of work
SHARD = 50_000  # rows of a catalogue's file
NEAR = 4  # bits of 64: a photograph saved again or scaled differs by 0 to 4, the nearest two of lfw400 by 10
FARTHEST = 8
# by `near`, the share of all pairs of images that share a bucket and are compared: measured on lfw400, none below 4
COMPARED = {4: 2.7e-5, 5: 3.4e-4, 6: 1.7e-3, 7: 5.7e-3, 8: 1.6e-2}
MOST_COMPARED = 10**9  # pairs; ten times as many for three times the images
LISTED = 1_000  # entries of each list in the summary; the catalogue itself has them all
_SIDE = 32
_DCT = np.cos(np.pi / (2 * _SIDE) * np.outer(np.arange(1, 9), 2 * np.arange(_SIDE) + 1))


@dataclass(frozen=True)
class Catalogue:
    """A finished catalogue: its folder of parquet files, their manifest, and counts and lists of what was found.

    Columns: image_id, identity, path and row (of a parquet file, else null) as in `sources.Located`; bytes, width,
    height (upright, pixels), mode (PIL's), changes (what `pixels.decode` did), sha256, phash (signed 64 bits);
    readable, and problem where it is not; duplicate (exact: the same bytes, near: a near hash, or null), group (the
    first image_id of the duplicates of one picture), conflict (they are of more than one identity).
    """

    folder: Path
    manifest: datasets.Manifest
    summary: Mapping

    @property
    def digest(self) -> str:
        """16 hexadecimal digits that stand for the images: names, identities, bytes, and which of them can be read."""
        return self.summary["digest"]


def build(
    layout: str, location: str, folder: Path, near: int = NEAR, cores: int = 2, master: str | None = None
) -> Catalogue:
    """The catalogue of a source, or the one already in `folder` where no path, size or time of change differs.

    Args:
        layout, location: as in `sources.find`.
        folder: where it is put; a catalogue of other images there is replaced.
        near: bits by which the perceptual hashes of near duplicates may differ, 0 to 8.
        cores, master: as in `spark.session`.

    Raises:
        UserError: a source that cannot be listed, no readable image in it, a `near` out of range or too large for so
            many images, no Java.
        JobFailure: a full disk, or a failure of Spark.
    """
    if not 0 <= near <= FARTHEST:
        raise UserError(f"near duplicates at {near} bits cannot be looked for; take 0 to {FARTHEST} of 64")
    work = folder / "_work"
    try:
        listing, count, digest = _list(sources.find(layout, location, folder / "_source"), work / "listing")
    except UserError:  # what is wrong with the images leaves nothing behind
        shutil.rmtree(work / "listing", ignore_errors=True)
        with suppress(OSError):  # an earlier catalogue stays, and so does what a cut-off one has looked into
            work.rmdir()
            folder.rmdir()
        raise
    configuration = {"catalogue": VERSION, "layout": layout, "near": near, "images": digest}
    present = _present(folder, configuration)
    if present is None:
        require_few_pairs(near, sum(shard.rows for shard in datasets.finished(listing, read=False).values()))
        with spark.session("oodface catalogue", cores, master) as session:
            looked = _look_into(session, listing, work / f"looked-{digest}", count, digest)
            frame = with_duplicates(session.read.parquet(spark.local(looked)), near)
            rows = sum(shard.rows for shard in datasets.finished(looked, read=False).values())
            (folder / SUMMARY).unlink(missing_ok=True)  # else a driver that dies now would leave that of other images
            manifest = spark.save(frame, folder, configuration, -(-rows // SHARD), ("image_id", "path", "row"))
            summary = summarise(session.read.parquet(*map(spark.local, manifest.files(folder))))
        write_json(summary, folder / SUMMARY)
        present = Catalogue(folder, manifest, summary)
    shutil.rmtree(work)
    if not present.summary["readable"]:
        first = present.summary["unreadable"]["list"][0]
        raise UserError(
            f"none of the {present.summary['images']} images of {location} can be read; the first, {first['path']}, "
            f"{first['problem']}"
        )
    return present


def require_few_pairs(near: int, images: int) -> None:
    """Sees to it that no more pairs of images would be compared than can be.

    Raises:
        UserError: too many pairs of images would be compared.
    """
    pairs = {bits: COMPARED.get(bits, 0.0) * images**2 / 2 for bits in range(near + 1)}
    if pairs[near] > MOST_COMPARED:
        feasible = max(bits for bits, count in pairs.items() if count <= MOST_COMPARED)
        raise UserError(
            f"oodface.near_duplicates = {near} would compare about {pairs[near]:.0e} pairs of {images} images; set it "
            f"to {feasible} or lower"
        )


def look(row: Mapping, data: bytes | UserError) -> dict:
    """A row of the catalogue, duplicates apart, for a listed image and its bytes or what stands in their place."""
    found = {name: row[name] for name in ("image_id", "identity", "path", "row", "place")}
    found |= dict.fromkeys(("bytes", "width", "height", "mode", "changes", "sha256", "phash"))
    try:
        if isinstance(data, UserError):
            raise data
        found |= {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
        pixels, notes = decode(data)
    except UserError as error:
        return found | {"readable": False, "problem": str(error)}
    height, width, _ = pixels.shape
    found |= {"width": width, "height": height, "mode": notes.mode, "changes": "; ".join(notes.changes) or None}
    return found | {"phash": phash(pixels), "readable": True, "problem": None}


def phash(pixels: UInt8[np.ndarray, "height width 3"]) -> int:
    """The 64-bit DCT hash of a picture, as a signed integer; equal pictures of any size have near hashes.

    The grey image averaged to 32 x 32, the 8 x 8 lowest frequencies of its DCT-II without those that are constant along
    a side, each compared with their median; a picture of one colour has hash 0.
    Source: Zauner, Implementation and Benchmarking of Perceptual Image Hash Functions, 2010, 3.2.1.
    """
    from PIL import Image

    grey = Image.fromarray(pixels).convert("L").resize((_SIDE, _SIDE), Image.Resampling.BOX)
    # rounded, so that what is equal but for floating-point noise counts as equal
    lowest = np.round(_DCT @ np.asarray(grey, dtype=np.float64) @ _DCT.T, 6).ravel()
    return int(np.packbits(lowest > np.median(lowest)).view(">i8")[0])


def masks(near: int) -> list[int]:
    """Masks, as signed integers, of which two hashes that differ in at most `near` bits agree on at least one.

    The 64 bits are cut into near + 2 bands; `near` differing bits touch at most `near` of these, so that two bands are
    equal. A mask is two bands, 64 / (near + 2) bits each: buckets of their values hold few hashes that are not near.
    """
    edges = np.linspace(0, 64, near + 3).round().astype(int)
    bands = [(1 << int(high)) - (1 << int(low)) for low, high in itertools.pairwise(edges)]
    return [(a | b) - (1 << 64) * ((a | b) >> 63) for a, b in itertools.combinations(bands, 2)]


def with_duplicates(looked: DataFrame, near: int) -> DataFrame:
    """Adds duplicate, group and conflict; of several readable rows with one image_id the first by path is kept."""
    from pyspark.sql import Window
    from pyspark.sql import functions as F

    same_id = Window.partitionBy("image_id").orderBy(F.col("readable").desc(), "path", "row")
    told = F.concat(F.lit("has the same image_id as "), F.first("path").over(same_id))
    taken = (F.row_number().over(same_id) > 1) & F.col("readable")
    rows = looked.withColumn("told", F.when(taken, told))
    rows = rows.withColumn("problem", F.coalesce("told", "problem"))
    rows = rows.withColumn("readable", F.col("readable") & F.col("told").isNull()).drop("told").localCheckpoint()

    good = rows.where("readable").join(_components(rows.where("readable"), near), "phash", "left")
    good = good.withColumn("picture", F.coalesce("component", "phash"))
    copies = good.groupBy("sha256").agg(F.count("*").alias("copies"))
    pictures = good.groupBy("picture").agg(
        F.count("*").alias("members"),
        F.min("image_id").alias("first"),
        (F.count_distinct("identity") > 1).alias("torn"),
    )
    kind = F.when(F.col("copies") > 1, "exact").when(F.col("members") > 1, "near")
    marked = (
        good.join(copies, "sha256")
        .join(pictures, "picture")
        .select(
            "image_id",
            kind.alias("duplicate"),
            F.when(F.col("members") > 1, F.col("first")).alias("group"),
            ((F.col("members") > 1) & F.col("torn")).alias("conflict"),
        )
    )
    marked = marked.withColumn("readable", F.lit(True))
    joined = rows.join(marked, ["image_id", "readable"], "left")
    return joined.withColumn("conflict", F.coalesce("conflict", F.lit(False))).select(
        *looked.columns, "duplicate", "group", "conflict"
    )


def summarise(rows: DataFrame) -> dict:
    """Counts, and lists of at most `LISTED` entries each, of a catalogue; and a digest of what its images are."""
    from pyspark.sql import functions as F

    seen = hashlib.sha256()
    for row in (
        rows.select("image_id", "identity", "sha256", "readable").orderBy("image_id", "path", "row").toLocalIterator()
    ):
        seen.update(json.dumps(list(row)).encode())

    totals = rows.agg(
        F.count("*").alias("images"),
        F.count_if("readable").alias("readable"),
        F.count_distinct(F.when(F.col("readable"), F.col("identity"))).alias("identities"),
        F.count_if(F.col("duplicate") == "exact").alias("exact"),
        F.count_if(F.col("duplicate") == "near").alias("near"),
        F.count_distinct("group").alias("groups"),
        F.count_distinct(F.when(F.col("conflict"), F.col("group"))).alias("conflicts"),
    ).first()
    changes = rows.where("changes is not null").groupBy("changes").count().orderBy("changes").limit(LISTED).collect()
    unreadable = rows.where(~F.col("readable")).select("image_id", "path", "row", "problem")
    groups = (
        rows.where("group is not null")
        .groupBy("group")
        .agg(
            F.slice(F.array_sort(F.collect_list("image_id")), 1, LISTED).alias("images"),
            F.array_sort(F.collect_set("identity")).alias("identities"),
            F.max("conflict").alias("conflict"),
        )
    )

    def listed(frame: DataFrame, order: str, columns: Iterable[str]) -> list[dict]:
        return [row.asDict() for row in frame.orderBy(order).select(*columns).limit(LISTED).collect()]

    return {
        "digest": seen.hexdigest()[:16],
        "images": totals["images"],
        "readable": totals["readable"],
        "identities": totals["identities"],
        "changes": {row["changes"]: row["count"] for row in changes},
        "unreadable": {
            "count": totals["images"] - totals["readable"],
            "list": listed(unreadable, "image_id", unreadable.columns),
        },
        "duplicates": {
            "groups": totals["groups"],
            "exact": totals["exact"],
            "near": totals["near"],
            "list": listed(groups, "group", ["images"]),
        },
        "conflicts": {
            "count": totals["conflicts"],
            "list": listed(groups.where("conflict"), "group", ["images", "identities"]),
        },
    }


def _list(found: Iterable[sources.Located], folder: Path) -> tuple[Path, int, str]:
    """Puts the rows into chunks; the folder, the number of chunks, and a digest of all that was listed."""
    import pyarrow as pa

    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    seen, count = hashlib.sha256(), 0
    rows = enumerate(found)
    while chunk := [vars(row) | {"place": place} for place, row in itertools.islice(rows, CHUNK)]:
        for row in chunk:
            seen.update(json.dumps(list(row.values())).encode())
        datasets.write_shard(folder, count, pa.Table.from_pylist(chunk, _listed_columns()))
        count += 1
    return folder, count, seen.hexdigest()[:16]


def _look_into(session: SparkSession, listing: Path, folder: Path, count: int, digest: str) -> Path:
    """Looks into all chunks that an earlier run did not finish."""
    configuration = {"looked": VERSION, "images": digest}
    done = datasets.prepare(folder, configuration)
    todo = [chunk for chunk in range(count) if chunk not in done]

    def work(batches: Iterator[pa.RecordBatch]) -> Iterator[pa.RecordBatch]:
        import pyarrow as pa
        import pyarrow.parquet as pq

        for batch in batches:
            for place in batch["id"].to_pylist():
                chunk = todo[place]
                rows = pq.read_table(listing / f"part-{chunk:05d}.parquet").to_pylist()
                data = sources.contents((row["path"], row["row"]) for row in rows if not row["problem"])
                found = [look(row, UserError(row["problem"]) if row["problem"] else next(data)) for row in rows]
                next(data, None)  # which says in the end whether this machine sees any of them
                datasets.write_shard(folder, chunk, pa.Table.from_pylist(found, _looked_columns()))
            yield batch

    if todo:
        session.range(0, len(todo), 1, len(todo)).mapInArrow(work, "id long").count()
    datasets.finish(folder, configuration, range(count))
    return folder


def _components(good: DataFrame, near: int) -> DataFrame:
    """(phash, component) of all hashes that have a near one: those that a chain of near ones joins share the component.

    A hash takes the least label among its neighbours' and, in the same round, the label of its label, so that the
    number of rounds grows with the logarithm of a chain's length.
    """
    from pyspark.sql import functions as F

    hashes = good.select("phash").distinct()
    buckets = [
        F.struct(F.lit(band).alias("band"), F.col("phash").bitwiseAND(F.lit(mask)).alias("value"))
        for band, mask in enumerate(masks(near))
    ]
    keyed = hashes.select("phash", F.explode(F.array(*buckets)).alias("bucket"))
    pairs = keyed.join(keyed.select(F.col("phash").alias("other"), "bucket"), "bucket").where("phash != other")
    links = pairs.where(F.bit_count(F.col("phash").bitwiseXOR(F.col("other"))) <= near)
    links = links.select("phash", "other").distinct().localCheckpoint()
    labels = links.select("phash", F.col("phash").alias("component")).distinct()
    changed = not links.isEmpty()
    while changed:
        theirs = labels.select(F.col("phash").alias("other"), F.col("component").alias("theirs"))
        heard = links.join(theirs, "other").groupBy("phash").agg(F.min("theirs").alias("heard"))
        told = labels.join(heard, "phash").select("phash", F.least("component", "heard").alias("component"))
        jump = told.select(F.col("phash").alias("component"), F.col("component").alias("further"))
        better = told.join(jump, "component").select("phash", F.col("further").alias("component")).localCheckpoint()
        before = labels.select("phash", F.col("component").alias("before"))
        changed = not better.join(before, "phash").where("component < before").isEmpty()
        labels = better
    return labels


def _present(folder: Path, configuration: Mapping) -> Catalogue | None:
    try:
        if (summary := read_json(folder / SUMMARY)) is None:
            return None
        manifest = datasets.verify(folder)
    except UserError:
        return None
    return Catalogue(folder, manifest, summary) if manifest.configuration == configuration else None


def _listed_columns() -> pa.Schema:
    import pyarrow as pa

    text, number = pa.string(), pa.int64()
    columns = {"image_id": text, "identity": text, "path": text, "row": number, "place": number}
    return pa.schema(columns | {"size": number, "modified": number, "problem": text})


def _looked_columns() -> pa.Schema:
    import pyarrow as pa

    text, number = pa.string(), pa.int64()
    columns = {"image_id": text, "identity": text, "path": text, "row": number, "place": number, "bytes": number}
    columns |= {"width": number, "height": number, "mode": text, "changes": text, "sha256": text, "phash": number}
    return pa.schema(columns | {"readable": pa.bool_(), "problem": text})
