"""`python -m tune.rule` among made-up people: a killed driver, a trial that diverges, what comes out of it."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import mlflow
import psutil
import pytest
import yaml

from tests.e2e import commands
from tests.e2e.commands import alive, wait

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1500)]
TRIALS = 3
SPACE = {
    **dict.fromkeys(("rule.rebo.kl_coefficient", "rule.rebo.advantage", "rule.rebo.reward.rouge_threshold")),
    **dict.fromkeys(("rule.rebo.reward.target_bonus", "steering_epochs", "boundary")),
    "rule.rebo.learning_rate": {"choice": [1e-8, 1e30]},  # too small to learn anything, and too large for any number
    "rule.rebo.completions_per_prompt": None,
}
SETTINGS = {
    "rule.steering.stop_at_refusal": 0.2,  # so early that four steps of learning show
    "rule.rebo.steps": 8,
    "rule.trace.every": 2,
    "rule.trace.probes": 24,
    "train.max_failures": 0,
    "tune.rule.trials": TRIALS,
    "tune.rule.max_concurrent": 1,
    "tune.rule.grace_steps": 4,
    "tune.rule.space": json.dumps(SPACE),
}


def searching(storage: Path, *arguments: str) -> commands.Running:
    return commands.start([sys.executable, "-m", "tune.rule", *arguments], storage)


@pytest.fixture(scope="module")
def searched(world, tmp_path_factory):
    """The folder of a search whose driver was killed in its second trial, what was on record then, and the end."""
    storage = tmp_path_factory.mktemp("tune")
    folder = storage / "search"
    first = searching(storage, *commands.settings(world, SETTINGS), "--out", str(folder))
    try:
        second = folder / "trials" / "001.json"
        wait(lambda: second.exists() or first.process.poll() is not None, "the second trial", 400)
        assert second.exists(), first.errors.read_text()[-4000:]
        assert state(folder, 0) == "complete"
        below = first.descendants()
        psutil.Process(first.process.pid).kill()
        first.process.wait(30)
        wait(lambda: not alive(below), "Ray of a killed driver to end", 90)
    finally:
        first.kill()
    kept = {path.name: path.read_text() for path in (folder / "trials").glob("00?.json")}
    again = searching(storage, "--resume", str(folder), "--set", "tune.rule.max_concurrent=null")
    try:
        process = again.finish(1000)
    finally:
        again.kill()
    return folder, kept, process


def state(folder: Path, number: int) -> str | None:
    record = folder / "trials" / f"{number:03d}.json"
    return json.loads(record.read_text())["state"] if record.exists() else None


@pytest.fixture(scope="module")
def report(searched) -> dict:
    folder, _, process = searched
    assert process.returncode == 0, process.stdout[-4000:] + process.stderr[-4000:]
    assert process.stdout.splitlines()[-1] == str(folder / "report.json")
    return json.loads((folder / "report.json").read_text())


def test_no_trial_is_lost_and_no_finished_one_runs_twice(searched, report):
    folder, kept, process = searched
    assert [trial["number"] for trial in report["trials"]] == list(range(TRIALS))
    assert {trial["state"] for trial in report["trials"]} <= {"complete", "stopped", "failed"}
    for name, text in kept.items():
        if json.loads(text)["state"] != "running":
            assert (folder / "trials" / name).read_text() == text
            assert f"trial {int(name[:3])}: " not in process.stdout


def test_a_trial_that_diverges_is_recorded_and_ends_nothing(report):
    failed = [trial for trial in report["trials"] if trial["state"] == "failed"]
    assert failed
    assert len(failed) < TRIALS - 1
    for trial in report["trials"]:
        diverges = trial["values"].get("rule.rebo.learning_rate") == 1e30
        assert (trial["state"] == "failed") == diverges, trial
    assert all("lower the learning rate" in message for message in report["failures"].values())


def test_what_falls_behind_is_ended_early(report):
    stopped = [trial for trial in report["trials"] if trial["state"] == "stopped"]
    assert stopped
    assert all(trial["values"]["rule.rebo.learning_rate"] == 1e-8 for trial in stopped)
    assert report["trials"][0]["looks"][-1]["step"] == 8
    assert report["steps"]["saved"] > 0
    for name, found in report["metrics"].items():
        number, _, step = name.partition("@")
        by_step = {str(look["step"]): look for look in report["trials"][int(number)]["looks"]}
        step = step or max(by_step, key=int, default="")
        assert not found or found["forgotten"]["value"] == pytest.approx(by_step[step]["forgotten"])


def test_the_best_configuration_is_a_file_that_a_run_takes(searched, report):
    folder, _, _ = searched
    assert report["hypervolume"]["all"] >= report["hypervolume"]["configuration_as_it_is"] > 0.3
    best = yaml.safe_load((folder / "best.yaml").read_text())
    values = report["trials"][report["best"]["trial"]]["values"]
    assert best["rule"]["rebo"]["learning_rate"] == values.get("rule.rebo.learning_rate", 3e-4)
    assert best["rule"]["rebo"]["steps"] == report["best"]["step"]
    command = [sys.executable, "-m", "jobs.rule", "run", "--config", str(folder / "best.yaml"), "--dry-run"]
    shown = subprocess.run(command, cwd=commands.ROOT, capture_output=True, text=True, check=True)
    assert "Fits:" in shown.stdout
    names = {f"{place['trial']:03d}-at-{place['step']:03d}.yaml" for place in report["front"]}
    assert {path.name for path in (folder / "front").iterdir()} == names


def test_trials_share_stage_one_and_leave_no_weights(searched):
    folder, _, _ = searched
    shared = [path.name.partition("-")[0] for path in (folder / "shared").iterdir() if path.suffix != ".lock"]
    assert sorted(shared) == ["answers", "steering"]
    assert not list((folder / "trials").rglob("*.safetensors"))
    assert not (folder / "ray").exists()


def test_every_trial_is_a_child_of_the_search(searched, report):
    folder, _, _ = searched
    client = mlflow.MlflowClient(f"sqlite:///{folder.parent / 'mlflow.db'}")
    experiment = client.get_experiment_by_name("rayward")
    parent = report["mlflow"]["run_id"]
    assert client.get_run(parent).info.status == "FINISHED"
    query = f"tags.`mlflow.parentRunId` = '{parent}'"
    statuses = sorted(run.info.status for run in client.search_runs([experiment.experiment_id], query))
    expected = {"complete": "FINISHED", "stopped": "KILLED", "failed": "FAILED"}
    assert statuses == sorted(expected[trial["state"]] for trial in report["trials"])


def test_a_finished_search_says_so(searched, report):
    folder, _, _ = searched
    again = searching(folder.parent, "--resume", str(folder))
    try:
        assert "this search is finished" in again.finish(120).stdout
    finally:
        again.kill()
