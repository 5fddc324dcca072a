"""`python -m jobs.oodface` on drawn faces and bad files: the same shards whoever makes them, and scores of them."""

from __future__ import annotations

import io
import json
import sys
from pathlib import Path

import psutil
import pyarrow.parquet as pq
import pytest
from PIL import Image

from jobs.oodface.drawn import Person, portrait
from tests.e2e import commands
from tests.e2e.commands import alive, wait

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1200)]
PEOPLE, EACH, FOLDS = 6, 4, 2
SHARDS = 6  # of 4 faces each
DIALS = {
    "oodface.scenarios": "[sensor, gaussian_noise, glass_blur, age]",
    "oodface.severities": "[1, 5]",
    "oodface.faces_per_shard": 4,
}


@pytest.fixture(scope="module")
def faces(tmp_path_factory) -> Path:
    """Twenty-four portraits in LFW's layout, some in unusual modes, and five files that are no portraits."""
    folder = tmp_path_factory.mktemp("faces")
    for person in range(PEOPLE):
        place = folder / f"Person_{person}"
        place.mkdir()
        for shot in range(1, EACH + 1):
            portrait(Person.of(person), 10 * person + shot).save(place / f"Person_{person}_{shot:04d}.png")
    first = folder / "Person_0"
    Image.open(first / "Person_0_0001.png").convert("RGBA").save(first / "Person_0_0001.png")
    Image.open(first / "Person_0_0002.png").convert("L").save(first / "Person_0_0002.png")
    whole = (first / "Person_0_0003.png").read_bytes()
    (first / "Person_0_0005.png").write_bytes(whole[: len(whole) // 2])
    (first / "Person_0_0006.png").write_bytes(b"no image")
    Image.new("RGB", (1, 1)).save(first / "Person_0_0007.png")
    (folder / "Person_5" / "Person_5_0005.png").write_bytes(whole)  # another's picture
    lines = ["fold,same,image_a,image_b"]
    for person in range(PEOPLE):
        names = [f"Person_{person}/Person_{person}_{shot:04d}.png" for shot in range(1, EACH + 1)]
        other = f"Person_{(person + 1) % PEOPLE}/Person_{(person + 1) % PEOPLE}_0001.png"
        lines += [f"{person % FOLDS},1,{names[0]},{one}" for one in names[1:]]
        lines += [f"{person % FOLDS},0,{one},{other}" for one in names[1:]]
    (folder / "pairs.csv").write_text("\n".join(lines) + "\n")
    return folder


@pytest.fixture(scope="module")
def storage(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("oodface")


def oodface(storage: Path, faces: Path, job: str, name: str, **changes: object) -> commands.Running:
    dials = DIALS | {"oodface.images": faces} | {f"oodface.{key}": value for key, value in changes.items()}
    sets = [part for key, value in dials.items() for part in ("--set", f"{key}={value}")]
    command = [sys.executable, "-m", "jobs.oodface", job, *sets, "--out", str(storage / name)]
    return commands.start(command, storage)


def finish(running: commands.Running) -> str:
    try:
        process = running.finish(500)
    finally:
        running.kill()
    assert process.returncode == 0, process.stdout[-4000:] + process.stderr[-4000:]
    return process.stdout


def digests(folder: Path) -> list[str]:
    """SHA-256 of each shard, in order."""
    return [shard["sha256"] for shard in json.loads((folder / "shards" / "_manifest.json").read_text())["shards"]]


@pytest.fixture(scope="module")
def whole(storage, faces) -> Path:
    """The shards of one worker in batches of 16, with what was printed."""
    finish(oodface(storage, faces, "corrupt", "whole", num_workers=1, batch_size=16))
    return storage / "whole"


def test_what_cannot_be_used_is_listed_and_the_rest_is_made(whole):
    report = json.loads((whole / "report.json").read_text())
    assert report["images"] == PEOPLE * EACH + 1
    assert report["catalogue"]["images"] - report["catalogue"]["readable"] == 3
    summary = json.loads((Path(report["catalogue"]["folder"]) / "_summary.json").read_text())
    problems = {image["image_id"].rpartition("_")[2]: image["problem"] for image in summary["unreadable"]["list"]}
    assert set(problems) == {"0005", "0006", "0007"}
    assert summary["conflicts"]["count"] == 1
    assert report["rows"] == report["images"] * report["conditions"] == (PEOPLE * EACH + 1) * (1 + 7 * 2)


def test_a_shard_holds_every_version_of_its_faces(whole):
    table = pq.read_table(whole / "shards" / "part-00000.parquet")
    assert set(table["scenario"].to_pylist()) >= {"clean", "defocus_blur", "facial_distortion", "age_increase"}
    image = Image.open(io.BytesIO(table["image"][0].as_py()["bytes"]))
    assert image.size == (112, 112)


def test_two_workers_killed_in_the_middle_make_the_same_shards(storage, faces, whole):
    running = oodface(storage, faces, "corrupt", "again", num_workers=2, batch_size=128)
    shards = storage / "again" / "shards"
    try:
        wait(lambda: any(shards.glob("_part-*.json")) or running.process.poll() is not None, "the first shard", 400)
        below = running.descendants()
        psutil.Process(running.process.pid).kill()
        running.process.wait(30)
        wait(lambda: not alive(below), "Ray of a killed driver to end", 90)
    finally:
        running.kill()
    done = len(list(shards.glob("_part-*.json")))
    printed = finish(oodface(storage, faces, "corrupt", "again", num_workers=2, batch_size=128))
    assert f"{done} of {SHARDS + 1} shards are there already" in printed
    assert digests(storage / "again") == digests(whole)


def test_models_are_scored_under_every_condition(storage, faces):
    changes = {"evaluate.pairs": faces / "pairs.csv", "evaluate.models": "[sface]", "evaluate.defences": "[bit_depth]"}
    finish(oodface(storage, faces, "evaluate", "scores", **changes))
    report = json.loads((storage / "scores" / "report.json").read_text())
    assert set(report["metrics"]) == {"sface", "sface+bit_depth"}
    metrics = report["metrics"]["sface"]
    assert report["pairs"]["sface"] == PEOPLE * 3 * 2
    for name in ("fixed/acc/clean", "refit/acc/pixelate/5", "ten_fold/acc/clean", "fixed/rce.selected"):
        low, high = metrics[name]["ci95"]
        assert low <= metrics[name]["value"] <= high
    assert metrics["fixed/acc/clean"]["value"] > 0.8
    for name in ("heat_map.png", "severity.png", "grid.png"):
        assert (storage / "scores" / "plots" / name).stat().st_size > 5000


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"scenarios": "[fogg]"}, "there is no scenario 'fogg'; did you mean fog?"),
        ({"severities": "[6]"}, "oodface.severities"),
        ({"images": "/nowhere"}, "/nowhere does not exist"),
        ({"layout": "lfww"}, "oodface.layout"),
    ],
)
def test_a_wrong_setting_ends_in_one_sentence(storage, faces, changes, told):
    running = oodface(storage, faces, "corrupt", "wrong", **changes)
    try:
        process = running.finish(60)
    finally:
        running.kill()
    assert process.returncode == 2
    assert told in process.stderr.strip().splitlines()[-1]
    assert not (storage / "wrong").exists()
