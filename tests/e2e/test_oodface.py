"""`python -m jobs.oodface` on drawn faces and bad files: the same shards whoever makes them, and scores of them."""

from __future__ import annotations

import base64
import io
import json
import sys
from pathlib import Path

import mlflow
import numpy as np
import psutil
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image
from safetensors.torch import save_model
from torchvision.models import resnet18

from cluster import datasets
from jobs.oodface import pipeline
from jobs.oodface.config import Corrupt
from jobs.oodface.drawn import Person, portrait
from jobs.oodface.scenarios import selected
from jobs.oodface.work import CLEAN, Plan, Shard, Writer
from tests.chat_endpoint import completion, serving
from tests.e2e import commands
from tests.e2e.commands import alive, wait

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1200)]
PEOPLE, EACH, FOLDS = 6, 4, 2
SHARDS = 6  # of 4 faces each
FACES, CHOSEN = 4, ["sensor", "gaussian_noise", "glass_blur", "age"]
DIALS = {
    "oodface.scenarios": f"[{', '.join(CHOSEN)}]",
    "oodface.severities": "[1, 5]",
    "oodface.faces_per_shard": FACES,
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


@pytest.fixture(scope="module")
def made(storage, faces) -> tuple[Path, str, int]:
    """The run of two workers that was killed after its first shard; what the second driver printed; shards it found."""
    running = oodface(storage, faces, "corrupt", "made", num_workers=2, batch_size=128)
    shards = storage / "made" / "shards"
    try:
        wait(lambda: any(shards.glob("_part-*.json")) or running.process.poll() is not None, "the first shard", 400)
        below = running.descendants()
        psutil.Process(running.process.pid).kill()
        running.process.wait(30)
        wait(lambda: not alive(below), "Ray of a killed driver to end", 90)
    finally:
        running.kill()
    done = len(list(shards.glob("_part-*.json")))
    return storage / "made", finish(oodface(storage, faces, "corrupt", "made", num_workers=2, batch_size=128)), done


def test_what_cannot_be_used_is_listed_and_the_rest_is_made(made):
    report = json.loads((made[0] / "report.json").read_text())
    assert report["images"] == PEOPLE * EACH + 1
    assert report["catalogue"]["images"] - report["catalogue"]["readable"] == 3
    summary = json.loads((Path(report["catalogue"]["folder"]) / "_summary.json").read_text())
    problems = {image["image_id"].rpartition("_")[2]: image["problem"] for image in summary["unreadable"]["list"]}
    assert set(problems) == {"0005", "0006", "0007"}
    assert summary["conflicts"]["count"] == 1
    assert report["rows"] == report["images"] * report["conditions"] == (PEOPLE * EACH + 1) * (1 + 7 * 2)


def test_a_shard_holds_every_version_of_its_faces(made):
    table = pq.read_table(made[0] / "shards" / "part-00000.parquet")
    assert set(table["scenario"].to_pylist()) >= {"clean", "defocus_blur", "facial_distortion", "age_increase"}
    image = Image.open(io.BytesIO(table["image"][0].as_py()["bytes"]))
    assert image.size == (112, 112)


def test_shards_are_those_of_one_process_in_small_batches(made, tmp_path):
    folder, printed, done = made
    assert f"{done} of {SHARDS + 1} shards are there already" in printed
    report = json.loads((folder / "report.json").read_text())
    files = sorted(Path(report["catalogue"]["folder"]).glob("part-*.parquet"))
    rows = pa.concat_tables(pq.read_table(file) for file in files)
    conditions = [CLEAN, *((name, level) for name in selected(CHOSEN) for level in (1, 5))]
    write = Writer(Plan(tuple(conditions), 0, True, None, batch_size=3), Corrupt(), tmp_path)
    found = []
    for task in pipeline.tasks(rows.filter(rows["readable"]), FACES):
        [row] = pipeline._decoded(pipeline._block(task), 2048).to_pylist()
        pixels = [
            np.frombuffer(data, np.uint8).reshape(height, width, 3)
            for data, height, width in zip(row["pixels"], row["heights"], row["widths"], strict=True)
        ]
        table = write(Shard(task.index, row["image_ids"], row["identities"], pixels))
        found.append(datasets.write_shard(tmp_path, task.index, table).sha256)
    assert found == [
        shard["sha256"] for shard in json.loads((folder / "shards" / "_manifest.json").read_text())["shards"]
    ]


def assert_within_their_intervals(metrics: dict, names: tuple[str, ...]) -> None:
    for name in names:
        low, high = metrics[name]["ci95"]
        assert low <= metrics[name]["value"] <= high


def assert_plots(folder: Path) -> None:
    for name in ("heat_map.png", "severity.png", "grid.png"):
        assert (folder / "plots" / name).stat().st_size > 5000


def test_models_are_scored_under_every_condition(storage, faces):
    module = resnet18(num_classes=32)
    save_model(module, storage / "own.safetensors")
    own = {"name": "own", "path": str(storage / "own.safetensors"), "factory": "torchvision.models:resnet18"}
    models = json.dumps(["sface", own | {"options": {"num_classes": 32}}])
    changes = {"evaluate.pairs": faces / "pairs.csv", "evaluate.models": models, "evaluate.defences": "[bit_depth]"}
    changes |= {"scenarios": "[sensor, age]", "severities": "[5]"}
    finish(oodface(storage, faces, "evaluate", "scores", **changes))
    report = json.loads((storage / "scores" / "report.json").read_text())
    assert set(report["metrics"]) == {"sface", "sface+bit_depth", "own", "own+bit_depth"}
    metrics = report["metrics"]["sface"]
    assert report["pairs"]["sface"] == PEOPLE * 3 * 2
    assert_within_their_intervals(
        metrics, ("fixed/acc/clean", "refit/acc/pixelate/5", "ten_fold/acc/clean", "fixed/rce.selected")
    )
    assert metrics["fixed/acc/clean"]["value"] > 0.8
    assert_plots(storage / "scores")


def test_a_model_behind_an_endpoint_is_asked_about_every_pair_once(storage, faces):
    def by_colour(body: dict) -> tuple[int, dict[str, str], str]:
        urls = [part["image_url"]["url"] for part in body["messages"][0]["content"][1:]]
        pixels = [Image.open(io.BytesIO(base64.b64decode(url.partition(",")[2]))).convert("RGB") for url in urls]
        assert [one.size for one in pixels] == [(150, 150)] * 2
        means = [np.asarray(one, np.float32).mean(axis=(0, 1)) for one in pixels]
        return 200, {}, completion("Yes." if np.abs(means[0] - means[1]).max() < 12 else "No.")

    with serving() as endpoint:
        endpoint.answer = by_colour
        changes = {
            "evaluate.pairs": faces / "pairs.csv",
            "ask.endpoints": f"[{{base_url: {endpoint.base_url}, model: eyes}}]",
            "ask.template": "dlib",
            "scenarios": "[sensor]",
            "severities": "[5]",
        }
        finish(oodface(storage, faces, "ask", "asked", **changes))
        asked = len(endpoint.requests)
        printed = finish(oodface(storage, faces, "ask", "asked", **changes))
        assert len(endpoint.requests) == asked == PEOPLE * 3 * 2 * (1 + 3)
        # a longer answer may be another answer
        longer = {"ask.endpoints": f"[{{base_url: {endpoint.base_url}, model: eyes, max_tokens: 400}}]"}
        endpoint.answer = lambda body: (200, {}, completion("Yes."))
        finish(oodface(storage, faces, "ask", "asked", **changes | longer))
        assert len(endpoint.requests) == 2 * asked
        again = json.loads((storage / "asked" / "report.json").read_text())
        assert again["metrics"]["eyes"]["answer/acc/clean"]["value"] == 0.5
        client = mlflow.MlflowClient(f"sqlite:///{storage / 'mlflow.db'}")
        history = client.get_metric_history(again["mlflow"]["run_id"], "evaluation/eyes/answer/acc/clean")
        assert [(one.step, one.value) for one in history][1:] == [(1, 0.5)]
        endpoint.answer = by_colour
        finish(oodface(storage, faces, "ask", "asked", **changes))
        assert len(endpoint.requests) == 2 * asked
    assert "eyes answered 100% of the clean pairs" in printed
    report = json.loads((storage / "asked" / "report.json").read_text())
    assert report["models"] == {"eyes": endpoint.base_url}
    metrics = report["metrics"]["eyes"]
    assert_within_their_intervals(
        metrics, ("answer/acc/clean", "answer/acc/pixelate/5", "answer/rce.selected", "false_accept/color_shift/5")
    )
    assert metrics["answer/acc/clean"]["value"] > 0.5
    assert_plots(storage / "asked")


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
