"""What a run would take of its machine, and what is refused before anything starts."""

from __future__ import annotations

import re
from types import SimpleNamespace

import pyarrow as pa
import pytest

from cluster import datasets
from cluster.config import load
from cluster.errors import UserError
from cluster.memory import GIB, Node
from jobs.oodface import job, plan
from jobs.oodface.config import OodfaceConfig
from jobs.oodface.run import Run, catalogue_folder, dry_run

MACHINE = Node(24 * GIB, (), 100 * GIB)
EIGHT_GPUS = Node(512 * GIB, (80 * GIB,) * 8, 100 * GIB)


def config(*sets: str, profile: str | None = None) -> OodfaceConfig:
    return load(OodfaceConfig, profile, sets=list(sets), environ={})


def photographs(count: int, width: int, height: int) -> pa.Table:
    ids = [f"{index:06d}" for index in range(count)]
    columns = {"image_id": ids, "identity": ids, "path": ids, "row": pa.nulls(count, pa.int64()), "place": range(count)}
    sizes = {"width": [width] * count, "height": [height] * count}
    return pa.table(columns | sizes | {"readable": [True] * count})


def test_shards_crops_and_bytes_are_counted():
    own = config("oodface.faces_per_shard=30", "oodface.num_workers=4", "oodface.evaluate.defences=[jpeg]")
    found = plan.demand(own, "evaluate", 151, photographs(100, 250, 300))
    assert (found.images, found.shards, found.workers, found.exact) == (100, 4, 4, True)
    assert found.shard == 30 * 250 * 300 * 3
    assert found.crops == "604 crops (151 versions x 2 models x 2 without and behind defences)"
    assert plan.demand(own, "corrupt", 7, photographs(100, 250, 300)).crops == "7 crops"
    reduced = plan.demand(own, "evaluate", 151, photographs(100, 4096, 1024))
    assert reduced.shard == 30 * 2048 * 512 * 3  # as oodface.longest_side says
    few = plan.demand(own, "evaluate", 151, images=40)
    assert (few.shards, few.workers, few.exact) == (2, 2, False)
    assert plan.demand(own, "corrupt", 151).shards is None


def test_a_demand_grows_with_what_makes_it():
    base = ["oodface.num_workers=2"]
    small = plan.demand(config(*base), "corrupt", 151, photographs(1000, 250, 250)).memory(MACHINE)
    assert 2 * GIB < small < 4 * GIB  # two workers of this kind took 1.9 to 2.2 GiB (docs/experiments.md)
    for more in (
        plan.demand(config("oodface.num_workers=3"), "corrupt", 151, photographs(1000, 250, 250)),
        plan.demand(config(*base, "oodface.faces_per_shard=64"), "corrupt", 151, photographs(1000, 250, 250)),
        plan.demand(config(*base), "corrupt", 151, photographs(1000, 1000, 1000)),
    ):
        assert more.memory(MACHINE) > small


def test_what_cannot_fit_is_refused_with_a_remedy():
    huge = ["oodface.faces_per_shard=512", "oodface.num_workers=2"]
    found = plan.demand(config(*huge), "evaluate", 151, photographs(5000, 2048, 2048))
    told = r"oodface.num_workers = 2 needs about \d+\.\d\d GiB of memory, and 19\.80 GiB are usable; lower it, "
    assert re.match(told, found.refusal(MACHINE))
    assert plan.demand(config(*huge), "evaluate", 151, images=5000).refusal(MACHINE) is None  # they may be small
    assert plan.demand(config(*huge), "evaluate", 151, photographs(5000, 250, 250)).refusal(MACHINE) is None
    elsewhere = config(*huge, "cluster.address=10.0.0.1:6379")
    assert plan.demand(elsewhere, "evaluate", 151, photographs(5000, 2048, 2048)).refusal(MACHINE) is None


def test_no_more_tasks_decode_than_there_are_shards():
    own = config("oodface.faces_per_shard=10", "oodface.num_workers=2")

    def beside(count: int | None) -> tuple[str, int]:
        """What a worker's decoding tasks are called, and their bytes."""
        found = plan.demand(own, "evaluate", 3, None if count is None else photographs(count, 100, 100))
        [row] = [(use, size) for use, size, note in found.rows if note == "a shard each"]
        return row

    one = plan.DECODER + 2 * 10 * 100 * 100 * 3
    assert beside(10) == ("1 task that decodes beside it", one)
    assert beside(20) == ("1 task that decodes beside it", one)
    assert beside(30) == ("1.5 tasks that decode beside it", round(1.5 * one))
    assert beside(40) == beside(4000) == ("2 tasks that decode beside it", 2 * one)
    assert beside(None)[0] == "2 tasks that decode beside it"


def test_a_single_worker_is_not_told_to_be_fewer():
    alone = config("oodface.faces_per_shard=2000", "oodface.num_workers=2")
    told = plan.demand(alone, "evaluate", 151, photographs(2000, 2048, 2048)).refusal(MACHINE)
    assert told.startswith("one worker needs about")
    assert told.endswith("usable; lower oodface.faces_per_shard or oodface.longest_side")


def test_only_what_is_missing_has_to_fit(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(plan, "this_node", lambda storage: MACHINE)
    own = config("oodface.faces_per_shard=2000", "oodface.num_workers=2", f"cluster.storage={tmp_path}")
    rows = pa.concat_tables([photographs(2000, 2048, 2048), photographs(2001, 100, 100).slice(2000)])
    run, found = Run(own, tmp_path, "", (("clean", 0),), {}, state={"identity": "1"}), SimpleNamespace(digest="2")
    folder, note = tmp_path / "embeddings", {"lost": []}
    with pytest.raises(UserError, match="usable; lower"):
        job._shards(run, "evaluate", found, rows, folder)
    datasets.write_shard(folder, 0, pa.table({"a": [1]}), note)
    assert [task.index for task in job._shards(run, "evaluate", found, rows, folder).missing] == [1]
    datasets.write_shard(folder, 1, pa.table({"a": [1]}), note)
    monkeypatch.setattr(plan, "this_node", lambda storage: Node(GIB, (), 0))  # in which no worker fits
    assert job._shards(run, "evaluate", found, rows, folder).missing == []
    assert "2 of 2 shards are there already" in capsys.readouterr().out


def test_gpus_are_counted_where_there_are_some():
    own = config(profile="gpu")
    found = plan.demand(own, "evaluate", 151, photographs(20_000, 250, 250))
    assert found.refusal(EIGHT_GPUS) is None
    assert found.refusal(Node(512 * GIB, (), 0)) is None  # not checked
    assert "needs more than the 2 GPUs of this machine" in found.refusal(Node(512 * GIB, (80 * GIB,) * 2, 0))
    crowded = config("oodface.gpus_per_worker=0.1", "oodface.faces_per_shard=2000", "oodface.batch_size=2000")
    crowded = crowded.model_copy(update={"oodface": crowded.oodface.model_copy(update={"num_workers": 10})})
    told = plan.demand(crowded, "evaluate", 151, photographs(20_000, 250, 250)).refusal(EIGHT_GPUS)
    assert told.startswith("a GPU's workers need about")
    assert told.endswith("lower oodface.faces_per_shard or oodface.batch_size, or raise oodface.gpus_per_worker")


def test_a_dry_run_tells_the_plan_and_knows_an_earlier_catalogue(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("RAYWARD_STORAGE", str(tmp_path / "results"))
    monkeypatch.setattr(plan, "this_node", lambda storage: MACHINE)
    (tmp_path / "images").mkdir()
    own = load(OodfaceConfig, sets=[f"oodface.images={tmp_path / 'images'}", "oodface.scenarios=[fog]"])
    dry_run(own, "corrupt")
    shown = capsys.readouterr().out
    assert "shards of 32; the largest decoded: 0.38 GiB (if each photograph has 2048 x 2048 px)" in shown
    assert "a face: 6 crops; a batch: 32 of a shard's faces" in shown
    assert "Checked when the photographs are catalogued: at most" in shown
    folder = catalogue_folder(own)
    datasets.prepare(folder, {})
    datasets.write_shard(folder, 0, photographs(70, 100, 100))
    datasets.finish(folder, {}, [0])
    dry_run(own, "corrupt")
    shown = capsys.readouterr().out
    assert "70 photographs in 3 shards of 32; the largest decoded: 0.00 GiB (as catalogued)" in shown
    assert "Fits: " in shown
    monkeypatch.setattr(plan, "this_node", lambda storage: Node(4 * GIB, (), 0))
    with pytest.raises(UserError, match="one worker needs about"):
        dry_run(own, "corrupt")
    assert "Does not fit: one worker needs about" in capsys.readouterr().out
