"""Shards of faces through Ray Data: files are read and decoded beside the workers, each of which does whole shards.

Every shard is a block that Ray moves as one row, so that it is neither cut nor merged; what it holds follows from the
catalogue alone, and a finished one is left out after a restart.
"""

import logging
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from cluster import datasets
from cluster.cli import root_cause
from cluster.errors import JobFailure, UserError
from jobs.oodface.config import Oodface
from jobs.oodface.pixels import decode
from jobs.oodface.sources import contents

if TYPE_CHECKING:
    from jobs.oodface.work import Shard

PAUSE_S = 30.0
AHEAD = 2  # shards a worker that are decoded at once: one for it to go on with, one for the next
# Decoded shards that Ray may keep in its object store, a worker: without a bound it fills half of the store. Measured
# with two workers on shards of 6 MiB, 16 shards cost no time, and fewer than one (4 MiB) took twice as long.
STORED, LEAST_STORED = 8, 1 << 26  # shards, bytes
RESTARTS = 2  # of a worker, and of a shard whose worker died
STAGES = ("align", "distort", "embed", "encode", "write")
KERNELS = ("distort", "embed")


@dataclass(frozen=True)
class Task:
    """A shard to be made: `rows` of the catalogue, all readable when it was built."""

    index: int
    rows: pa.Table


def tasks(rows: pa.Table, faces_per_shard: int) -> list[Task]:
    """The catalogue's rows in order of their image_id, or of parquet files as they were listed, cut into shards."""
    # those of one parquet file together, for a group of its rows is read for each
    name = "image_id" if rows["row"].null_count == rows.num_rows else "place"
    ordered = rows.sort_by(name)
    starts = range(0, ordered.num_rows, faces_per_shard)
    return [Task(index, ordered.slice(start, faces_per_shard)) for index, start in enumerate(starts)]


def largest_shard(todo: Sequence[Task], longest: int) -> int:
    """Bytes of the largest shard once it is decoded, its photographs limited to `longest` pixels a side."""
    return max((_decoded_bytes(task.rows, longest) for task in todo), default=0)


def _decoded_bytes(rows: pa.Table, longest: int) -> int:
    sides = np.stack([rows[name].to_numpy().astype(np.int64) for name in ("height", "width")])
    scale = np.minimum(1, longest / sides.max(axis=0))
    return int(np.maximum(1, np.round(sides * scale)).prod(axis=0).sum()) * 3


def store_limit(shard: int, workers: int) -> int:
    """Bytes of Ray's object store that decoded shards may fill: always more than one of the largest, `shard` bytes."""
    return max(LEAST_STORED, STORED * workers * shard)


def run(
    todo: Sequence[Task], folder: Path, maker: Callable[[], Callable[["Shard"], pa.Table]], dials: Oodface
) -> Iterator[dict[str, Any]]:
    """Makes the shards in `folder` and yields a record of each, as they end.

    Args:
        maker: makes what turns a shard into its table, once a worker; it has a `clock`, `empty` and `rows_per_group`.

    Raises:
        JobFailure: the disk is full, a worker died again and again, or a GPU's memory is too small.
        UserError: an image that would be written outside the run's folder.
    """
    import ray

    if not todo:
        return
    workers = min(dials.num_workers, len(todo))
    context = ray.data.DataContext.get_current().copy()
    context.enable_progress_bars = False
    context.print_on_execution_start = False
    context.raise_original_map_exception = True
    stored = store_limit(largest_shard(todo, dials.longest_side), workers)
    context.execution_options.resource_limits = ray.data.ExecutionResources.for_limits(object_store_memory=stored)
    with ray.data.DataContext.current(context):  # this process may have other pipelines, as under a search
        yield from _made(todo, folder, maker, dials, workers)


def _made(
    todo: Sequence[Task], folder: Path, maker: Callable[[], Callable[["Shard"], pa.Table]], dials: Oodface, workers: int
) -> Iterator[dict[str, Any]]:
    import ray

    logging.getLogger("ray.data").setLevel(logging.CRITICAL)  # what fails is told once, by us
    # reading and working take turns where a worker has one core; unequal shares keep Ray from making them one process
    spare = dials.cpus_per_worker - 1
    reading, working = (0.3, 0.7) if not spare else (1, 1 if dials.gpus_per_worker else spare)
    whole = {"batch_size": None, "batch_format": "pyarrow", "zero_copy_batch": True}
    with warnings.catch_warnings():
        # only so can Ray be told how often to try again; its named parameters have no such one
        warnings.filterwarnings("ignore", message="`ray_remote_args` is deprecated")
        stream = (
            ray.data.from_blocks([_block(task) for task in todo])  # from_arrow starts a task for each
            .map_batches(
                _decoded,
                num_cpus=reading,
                # else every processor of the cluster decodes, each with the pixels of a shard in its memory
                compute=ray.data.TaskPoolStrategy(size=min(AHEAD * workers, len(todo))),
                fn_kwargs={"longest": dials.longest_side},
                max_retries=RESTARTS,
                **whole,
            )
            .map_batches(
                _Worker,
                fn_constructor_args=(maker, folder, workers),
                num_cpus=working,
                num_gpus=dials.gpus_per_worker or None,
                compute=ray.data.ActorPoolStrategy(size=workers),
                max_restarts=RESTARTS,
                max_task_retries=RESTARTS,
                **whole,
            )
        )
    try:
        for batch in stream.iter_batches(batch_size=None, batch_format="pyarrow", prefetch_batches=0):
            yield from batch.to_pylist()
    except ray.exceptions.RayActorError as error:
        if error.actor_init_failed:
            told = str(error).strip().splitlines()[-1]
            _, user_error, sentence = told.partition("cluster.errors.UserError: ")
            raise (
                UserError(f"on a worker, {sentence}") if user_error else JobFailure(f"a worker could not start: {told}")
            ) from error
        raise JobFailure(
            f"a worker died {RESTARTS + 1} times ({str(error).splitlines()[0]}); where memory ran out lower "
            "oodface.faces_per_shard or oodface.num_workers, and run the same command again to continue"
        ) from error
    except (JobFailure, UserError) as error:  # of a worker: Ray puts its stack before it and advice behind it
        cause = root_cause(error)
        kind = JobFailure if isinstance(cause, JobFailure) else UserError
        raise kind(str(cause).splitlines()[0]) from None
    except (ray.exceptions.OutOfMemoryError, ray.exceptions.WorkerCrashedError) as error:
        raise JobFailure(
            f"a task that decodes images died {RESTARTS + 1} times ({str(error).splitlines()[0]}); lower "
            "oodface.faces_per_shard or oodface.longest_side, and run the same command again to continue"
        ) from error


def files_present(shard: Path, images: Path) -> bool:
    """Whether the files that a shard's table names are all there: power may have failed before the disk had them."""
    names = pq.read_table(shard, columns=["file"])["file"].to_pylist()
    return all((images / name).is_file() and (images / name).stat().st_size for name in names)


def summary(shards: Sequence[datasets.Shard]) -> dict[str, Any]:
    """Where the time went: seconds a stage, shares of the workers' wall time, processors and GPUs kept busy, images/s.

    The wall time is that in which some worker was at a shard, and pauses between shards; not starts and restarts. It
    counts as often as there were workers then, which may be others after a restart.
    """
    notes = [shard.note for shard in shards]
    spans: dict[int, list[tuple[float, float]]] = {}
    for note in notes:
        spans.setdefault(note["workers"], []).append((note["started"], note["ended"]))
    walls = {workers: _wall(those) for workers, those in spans.items()}
    wall, worked = sum(walls.values()), sum(workers * seconds for workers, seconds in walls.items())
    seconds = {stage: sum(note["seconds"].get(stage, 0.0) for note in notes) for stage in STAGES}
    rows, busy = sum(shard.rows for shard in shards), sum(note["ended"] - note["started"] for note in notes)
    return {
        "wall_seconds": round(wall, 2),
        "stage_seconds": {stage: round(value, 2) for stage, value in seconds.items() if value},
        "decode_seconds": round(sum(note["decode_seconds"] for note in notes), 2),
        "share_in_kernels": round(sum(seconds[stage] for stage in KERNELS) / worked, 4),
        "share_waiting": round(1 - busy / worked, 4),
        "processors_busy": round(sum(note["processor_seconds"] for note in notes) / wall, 2),
        "rows": rows,
        "rows_per_second": round(rows / wall, 1),
        "peak_memory_gib": round(max(note["peak_memory_gib"] for note in notes), 2),
    } | _gpu(notes, worked)


def _gpu(notes: Sequence[Mapping[str, Any]], worked: float) -> dict[str, float]:
    """The share of the workers' time, `worked` seconds, in which their GPUs were busy, and the largest memory.

    Nothing where there were no GPUs. While a worker waits its GPU does nothing for it; a shard that was done before
    NVML was asked counts as busy as the others.
    """
    spans = [(note["ended"] - note["started"], note.get("gpu_busy")) for note in notes if "gpu_peak_memory_gib" in note]
    told = [(seconds, share) for seconds, share in spans if share is not None]
    peaks = [note["gpu_peak_memory_gib"] for note in notes if "gpu_peak_memory_gib" in note]
    found = {}
    if told:
        mean = sum(seconds * share for seconds, share in told) / sum(seconds for seconds, _ in told)
        found["gpu_busy"] = round(mean * sum(seconds for seconds, _ in spans) / worked, 4)
    return found | ({"gpu_peak_memory_gib": round(max(peaks), 2)} if peaks else {})


def _wall(spans: Sequence[tuple[float, float]]) -> float:
    """Seconds that the spans cover together, with gaps of less than `PAUSE_S` between them."""
    total, (start, end) = 0.0, (0.0, 0.0)
    for first, last in sorted(spans):
        if first > end + PAUSE_S:
            total, start = total + end - start, first
        end = max(end, last)
    return total + end - start


class _Worker:
    """A process of Ray Data that makes shards."""

    def __init__(self, maker: Callable[[], Callable[["Shard"], pa.Table]], folder: Path, workers: int) -> None:
        self.make, self.folder, self.workers = maker(), folder, workers

    def __call__(self, batch: pa.Table) -> pa.Table:
        import torch

        from cluster.recorder import peak_memory_gib
        from jobs.oodface.meter import gpu_use
        from jobs.oodface.work import Shard

        records = []
        for row in batch.to_pylist():
            started, processor = time.time(), time.process_time()
            self.make.clock.seconds.clear()
            pixels = [
                np.frombuffer(data, np.uint8).reshape(height, width, 3)
                for data, height, width in zip(row["pixels"], row["heights"], row["widths"], strict=True)
            ]
            shard = Shard(row["index"], row["image_ids"], row["identities"], pixels)
            try:
                with gpu_use(self.make.clock.device) as gpu:
                    table = self.make(shard) if pixels else self.make.empty()
            except torch.OutOfMemoryError as error:
                raise JobFailure(
                    f"the GPU's memory ran out at a shard of {len(pixels)} photographs ({str(error).split('. ')[0]}); "
                    "lower oodface.faces_per_shard or oodface.batch_size, or raise oodface.gpus_per_worker, and run "
                    "the same command again to continue"
                ) from None
            note = {
                "faces": len(pixels),
                "lost": row["lost"],
                "no_face": table.filter(pc.invert(table["found"]))["image_id"].unique().to_pylist(),
                "several_faces": table.filter(pc.greater(table["faces"], 1))["image_id"].unique().to_pylist(),
                "workers": self.workers,
                "started": started,
                "ended": time.time(),
                "processor_seconds": time.process_time() - processor + row["decode_processor_seconds"],
                "decode_seconds": row["decode_seconds"],
                "seconds": dict(self.make.clock.seconds),
                "peak_memory_gib": peak_memory_gib(),
            } | gpu
            written = datasets.write_shard(self.folder, row["index"], table, note, self.make.rows_per_group)
            records.append({"index": row["index"], "rows": written.rows})
        return pa.Table.from_pylist(records)


def _block(task: Task) -> pa.Table:
    columns = {name: [task.rows[name].to_pylist()] for name in ("image_id", "identity", "path", "row")}
    types = {"image_id": pa.string(), "identity": pa.string(), "path": pa.string(), "row": pa.int64()}
    arrays = {name: pa.array(values, pa.list_(types[name])) for name, values in columns.items()}
    return pa.table({"index": pa.array([task.index], pa.int64())} | arrays)


def _decoded(batch: pa.Table, longest: int) -> pa.Table:
    """The pixels of a shard's images, as one row; what cannot be read any more is listed."""
    rows = []
    for row in batch.to_pylist():
        start, processor = time.perf_counter(), time.process_time()
        kept: dict[str, list] = {name: [] for name in ("image_ids", "identities", "pixels", "heights", "widths")}
        lost = []
        places = list(zip(row["path"], row["row"], strict=True))
        for image_id, identity, data in zip(row["image_id"], row["identity"], contents(places), strict=True):
            try:
                if isinstance(data, UserError):
                    raise data
                pixels = limited(decode(data)[0], longest)
            except UserError as error:
                lost.append({"image_id": image_id, "problem": str(error)})
                continue
            one = (image_id, identity, pixels.tobytes(), *pixels.shape[:2])
            for values, value in zip(kept.values(), one, strict=True):
                values.append(value)
        timing = {
            "decode_seconds": time.perf_counter() - start,
            "decode_processor_seconds": time.process_time() - processor,
        }
        rows.append({"index": row["index"], "lost": lost} | kept | timing)
    return pa.Table.from_pylist(rows, schema=_DECODED)


_DECODED = pa.schema(
    {
        "index": pa.int64(),
        "lost": pa.list_(pa.struct({"image_id": pa.string(), "problem": pa.string()})),
        "image_ids": pa.list_(pa.string()),
        "identities": pa.list_(pa.string()),
        "pixels": pa.large_list(pa.large_binary()),
        "heights": pa.list_(pa.int32()),
        "widths": pa.list_(pa.int32()),
        "decode_seconds": pa.float64(),
        "decode_processor_seconds": pa.float64(),
    }
)


def limited(pixels: np.ndarray, longest: int) -> np.ndarray:
    """Photographs of many megapixels are reduced before they are kept: a face in them stays large enough."""
    height, width = pixels.shape[:2]
    if max(height, width) <= longest:
        return pixels
    import cv2

    scale = longest / max(height, width)
    size = (max(1, round(width * scale)), max(1, round(height * scale)))
    return cv2.resize(pixels, size, interpolation=cv2.INTER_AREA)
