"""Shards through Ray Data, without Ray: how they are cut and decoded, what a worker notes, and what is made of it."""

from __future__ import annotations

import threading

import numpy as np
import pyarrow as pa
import pytest
import ray.data
import torch
from PIL import Image

from cluster import datasets
from cluster.config import load
from cluster.datasets import Shard as Written
from cluster.errors import JobFailure
from jobs.oodface import drawn, meter, pipeline, work
from jobs.oodface.config import Corrupt, OodfaceConfig
from jobs.oodface.work import CLEAN, Plan, Shard, Writer


def test_shards_follow_the_image_ids_alone():
    none = pa.nulls(5, pa.int64())
    rows = pa.table({"image_id": ["c", "a", "b", "e", "d"], "path": list("12345"), "row": none})
    cut = pipeline.tasks(rows, 2)
    assert [task.index for task in cut] == [0, 1, 2]
    assert [task.rows["image_id"].to_pylist() for task in cut] == [["a", "b"], ["c", "d"], ["e"]]


def test_rows_of_one_parquet_file_stay_together():
    rows = pa.table({"image_id": ["a", "b", "c", "d"], "row": [11, 2, 9, 1], "place": [1, 3, 0, 2]})
    cut = pipeline.tasks(rows, 2)
    assert [task.rows["image_id"].to_pylist() for task in cut] == [["c", "a"], ["d", "b"]]


@pytest.mark.parametrize(("workers", "shards", "at_once"), [(1, 9, 2), (3, 9, 6), (8, 2, 2)])
def test_two_shards_a_worker_are_decoded_at_once(tmp_path, monkeypatch, workers, shards, at_once):
    stages = []

    class Stream:
        def map_batches(self, function, **settings):
            stages.append(settings["compute"].size if function is pipeline._decoded else settings["compute"].max_size)
            return self

        def iter_batches(self, **_):
            limits = ray.data.DataContext.get_current().execution_options.resource_limits
            assert limits.object_store_memory == max(1 << 26, 8 * min(workers, shards) * 2048 * 512 * 3)
            assert limits.cpu == float("inf")
            return iter([pa.table({"rows": [1]})])

    monkeypatch.setattr(ray.data, "from_blocks", lambda blocks: Stream())
    rows = pa.table({"image_id": ["a"], "identity": ["A"], "path": ["a"], "row": pa.nulls(1, pa.int64())})
    rows = rows.append_column("width", pa.array([4000])).append_column("height", pa.array([1000]))
    todo = [pipeline.Task(index, rows) for index in range(shards)]
    dials = load(OodfaceConfig, sets=[f"oodface.num_workers={workers}"], environ={}).oodface
    assert list(pipeline.run(todo, tmp_path, lambda: None, dials)) == [{"rows": 1}]
    assert stages == [at_once, min(workers, shards)]
    limits = ray.data.DataContext.get_current().execution_options.resource_limits
    assert limits.object_store_memory == float("inf")  # of other pipelines in this process


def test_what_may_wait_in_the_object_store_is_more_than_a_shard():
    sizes = {"width": [100, 5000, 30], "height": [100, 1000, 10]}
    rows = pa.table({"image_id": ["a", "b", "c"], "row": pa.nulls(3, pa.int64())} | sizes)
    cut = pipeline.tasks(rows, 2)
    assert pipeline.largest_shard(cut, 1000) == 3 * (100 * 100 + 1000 * 200)
    assert pipeline.largest_shard([], 1000) == 0
    for shard in (1, 10 << 20, 30 << 30):
        assert pipeline.store_limit(shard, 1) >= max(shard + 1, 1 << 26)


def test_what_cannot_be_read_any_more_is_listed_and_large_photographs_are_reduced(tmp_path):
    Image.new("RGB", (400, 100), (10, 20, 30)).save(tmp_path / "a.png")
    rows = {
        "image_id": ["a", "gone"],
        "identity": ["A", None],
        "path": [str(tmp_path / "a.png"), str(tmp_path / "gone.png")],
        "row": [None, None],
    }
    block = pipeline._block(pipeline.Task(7, pa.table(rows)))
    [row] = pipeline._decoded(block, 200).to_pylist()
    assert (row["index"], row["image_ids"], row["heights"], row["widths"]) == (7, ["a"], [50], [200])
    assert [one["image_id"] for one in row["lost"]] == ["gone"]
    assert row["pixels"][0][:3] == bytes([10, 20, 30])


def test_the_wall_time_leaves_out_the_hours_between_two_drivers():
    def note(started: float, ended: float, workers: int = 1) -> Written:
        made = {"started": started, "ended": ended, "seconds": {"distort": 1.0, "embed": 2.0}, "decode_seconds": 0.5}
        made["workers"] = workers
        return Written("part-00000.parquet", 10, 1, "", (), made | {"processor_seconds": 4.0, "peak_memory_gib": 1.0})

    found = pipeline.summary([note(0, 5), note(6, 10), note(5000, 5010)])
    assert found["wall_seconds"] == 20
    assert found["share_in_kernels"] == pytest.approx(9 / 20)
    assert found["share_waiting"] == pytest.approx(1 / 20)
    assert found["rows_per_second"] == 1.5
    resumed = pipeline.summary([note(0, 5), note(5, 10), note(5000, 5010, 2), note(5000, 5010, 2)])
    assert resumed["wall_seconds"] == 20
    assert resumed["share_in_kernels"] == pytest.approx(12 / 30)
    assert resumed["share_waiting"] == 0


def test_a_gpu_is_looked_at_while_a_shard_is_made(monkeypatch):
    looks = iter([20, 100])
    ended = threading.Event()

    def utilization(device: torch.device) -> int:
        value = next(looks, None)
        if value is None:
            ended.set()
        return 60 if value is None else value

    monkeypatch.setattr(meter, "EVERY_S", 0.001)
    monkeypatch.setattr(torch.cuda, "utilization", utilization)
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", lambda device: None)
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda device: 3 << 30)
    with meter.gpu_use(torch.device("cuda", 0)) as found:
        ended.wait(10)
    assert found == {"gpu_busy": pytest.approx(0.6), "gpu_peak_memory_gib": 3}
    with meter.gpu_use(torch.device("cpu")) as found:
        pass
    assert found == {}
    spans = [{"gpu_busy": 0.5, "started": 0, "ended": 3}, {"gpu_busy": 0.9, "started": 0, "ended": 1}]
    spans.append({"started": 0, "ended": 0.5})  # which NVML was not asked about
    notes = [one | {"gpu_peak_memory_gib": 2.0} for one in spans]
    assert pipeline._gpu(notes, 6) == {"gpu_busy": 0.45, "gpu_peak_memory_gib": 2.0}
    assert pipeline._gpu([{"started": 0, "ended": 1}], 6) == {}


def test_several_faces_in_a_photograph_are_counted(tmp_path):
    two = [np.asarray(drawn.portrait(drawn.Person.of(one), one)) for one in range(2)]
    together = Shard(0, ["a", "ab", "none"], [None] * 3, [two[0], np.concatenate(two, axis=1), two[0] * 0])
    table = Writer(Plan((CLEAN,), 0, True, None, 16), Corrupt(), tmp_path)(together)
    assert table["faces"].to_pylist() == [1, 2, 0]
    assert table["found"].to_pylist() == [True, True, False]

    class Maker:
        clock, rows_per_group = work.Clock(torch.device("cpu")), None
        empty = table.schema.empty_table

        def __call__(self, shard: Shard) -> pa.Table:
            return table

    datasets.prepare(tmp_path, {})
    decoded = {"index": 0, "lost": [], "decode_seconds": 0.0, "decode_processor_seconds": 0.0}
    decoded |= {"image_ids": together.image_ids, "identities": together.identities}
    decoded |= {"pixels": [one.tobytes() for one in together.pixels]}
    decoded |= {name: [one.shape[at] for one in together.pixels] for at, name in enumerate(("heights", "widths"))}
    worker = pipeline._Worker(Maker, tmp_path, 3)
    worker(pa.Table.from_pylist([decoded], schema=pipeline._DECODED))
    note = datasets.finished(tmp_path)[0].note
    assert (note["several_faces"], note["no_face"], note["workers"]) == (["ab"], ["none"], 3)

    def too_large(self, shard: Shard) -> pa.Table:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has")

    Maker.__call__ = too_large
    dials = "oodface.faces_per_shard or oodface.batch_size, or raise oodface.gpus_per_worker"
    with pytest.raises(JobFailure, match=rf"ran out at a shard of 3 photographs \(CUDA out of memory\); lower {dials}"):
        pipeline._Worker(Maker, tmp_path, 3)(pa.Table.from_pylist([decoded], schema=pipeline._DECODED))
