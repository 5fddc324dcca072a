"""RULE under faults: killed workers, a killed driver, Ctrl-C, and what a user can get wrong."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import pytest

from cluster.errors import UserError
from cluster.report import read_json
from cluster.training import SNAPSHOT
from tests.e2e import commands
from tests.e2e.commands import Running, alive, history, last_step, run_folder, wait

# A fixture makes several runs, each with a deadline of its own.
pytestmark = pytest.mark.timeout(1200)
STAGES = ("steering", "rebo")
SAVING_EACH_STEP = {"train.checkpoint_every": 1}


def trajectory(storage: Path) -> dict[tuple[str, int], dict[str, float]]:
    """What training recorded of each stage and step, without how long it took."""
    return {
        (stage, row["step"]): {name: row[name] for name in row if name not in ("stage", "seconds")}
        for stage in STAGES
        for row in history(storage, stage)
    }


def assert_same_trajectory(storage: Path, undisturbed: Path) -> None:
    rows, expected = trajectory(storage), trajectory(undisturbed)
    assert rows.keys() == expected.keys()
    for place, row in rows.items():
        assert row == pytest.approx(expected[place], rel=1e-5, abs=1e-7), place


def mlflow_run(storage: Path):
    """The MLflow client, and the run that the run folder names."""
    from mlflow import MlflowClient

    state = read_json(run_folder(storage) / "state.json")
    client = MlflowClient(state["tracking_uri"])
    return client, client.get_run(state["mlflow_run_id"])


@dataclass(frozen=True)
class Loss:
    """What a killed process cost: the step of a checkpoint that was kept before, and the one training went on from."""

    kept: int
    resumed: int


def kept_step(storage: Path, stage: str) -> int:
    """The step of the newest checkpoint that Ray Train has recorded, 0 before the first and while that is written."""
    try:
        state = read_json(run_folder(storage) / f"train-{stage}" / SNAPSHOT) or {}
    except UserError:
        return 0
    return max((result["metrics"]["step"] for result in state.get("checkpoint_results", ())), default=0)


def wait_for_checkpoint(storage: Path, stage: str, step: int) -> int:
    """Waits until a checkpoint of `step` or later is kept; its step."""
    kept = 0

    def there() -> bool:
        nonlocal kept
        kept = kept_step(storage, stage)
        return kept >= step

    wait(there, f"a checkpoint of step {step} of {stage}", 200)
    return kept


def went_on_from(storage: Path, stage: str, after: str) -> int:
    """Waits for a step of a training that begins again; the one that it went on from."""
    lowest = last_step(storage, stage)

    def went_on() -> bool:
        nonlocal lowest
        lowest = min(lowest, last_step(storage, stage))
        return last_step(storage, stage) > lowest

    wait(went_on, f"{stage} to go on after {after}", 200)
    return lowest


def kill_worker(running: Running, storage: Path, stage: str, after: int) -> Loss:
    """SIGKILL to the training worker once a checkpoint of step `after` or later is kept."""
    wait(lambda: last_step(storage, stage) > 0, f"{stage} to start", 200)
    [victim] = running.training_workers()
    kept = wait_for_checkpoint(storage, stage, after)
    victim.kill()
    victim.wait(30)
    return Loss(kept, went_on_from(storage, stage, "its worker died"))


@dataclass(frozen=True)
class Restarted:
    """One command three times: ended by Ctrl-C, by SIGKILL to the driver in stage 2, by itself.

    The first lost its worker in stage 1 before that, the third in stage 2.
    """

    storage: Path
    losses: dict[str, Loss]  # by stage, and that of the driver
    interrupted: subprocess.CompletedProcess
    status_after_interrupt: str
    left_after_interrupt: list[str]
    left_after_kill: list[str]
    step_at_kill: int  # with those that the killed driver's worker still made
    run_ids: list[str]
    process: subprocess.CompletedProcess


@pytest.fixture(scope="module")
def restarted(world, tmp_path_factory) -> Restarted:
    storage = tmp_path_factory.mktemp("restarted")
    command = ["run", *commands.settings(world, SAVING_EACH_STEP)]
    started: list[Running] = []
    losses: dict[str, Loss] = {}
    try:
        started.append(commands.start_rule(storage, *command))
        losses["steering"] = kill_worker(started[0], storage, "steering", 3)
        below = started[0].descendants()
        started[0].interrupt()
        interrupted = started[0].finish(90)
        left_after_interrupt = remaining(below)
        info = mlflow_run(storage)[1].info

        started.append(commands.start_rule(storage, *command))
        wait(lambda: last_step(storage, "rebo") > 0, "stage 2", 200)
        below = started[1].descendants()
        [orphan] = started[1].training_workers()
        kept = wait_for_checkpoint(storage, "rebo", 2)
        os.kill(started[1].process.pid, signal.SIGKILL)
        started[1].process.wait(30)
        # Its worker trains on until its Ray is gone, a few steps.
        wait(lambda: not alive([orphan]), "the killed driver's worker to end", 60)
        reached = last_step(storage, "rebo")
        run_ids = [info.run_id, mlflow_run(storage)[1].info.run_id]

        started.append(commands.start_rule(storage, *command))
        losses["driver"] = Loss(kept, went_on_from(storage, "rebo", "a new driver took over"))
        losses["rebo"] = kill_worker(started[2], storage, "rebo", reached + 1)
        process = started[2].finish()
        # Ray's agents notice within a minute that their raylet is gone; the third run lasted about as long.
        left_after_kill = remaining(below)
        run_ids.append(mlflow_run(storage)[1].info.run_id)
        return Restarted(
            storage,
            losses,
            interrupted,
            info.status,
            left_after_interrupt,
            left_after_kill,
            reached,
            run_ids,
            process,
        )
    finally:
        for running in started:
            running.kill()


def remaining(processes: list) -> list[str]:
    """The titles of those of `processes` that do not end within 40 s."""
    deadline = time.monotonic() + 40
    while alive(processes) and time.monotonic() < deadline:
        time.sleep(0.2)
    return [" ".join(process.cmdline()) for process in alive(processes)]


@pytest.mark.slow
def test_ctrl_c_ends_everything_and_says_how_to_continue(restarted):
    assert restarted.interrupted.returncode == 130, restarted.interrupted.stderr[-4000:]
    assert "run the same command again" in restarted.interrupted.stderr.splitlines()[-1]
    assert not restarted.left_after_interrupt
    assert restarted.status_after_interrupt == "KILLED"


@pytest.mark.slow
def test_a_killed_driver_takes_its_ray_with_it(restarted):
    assert not restarted.left_after_kill


@pytest.mark.slow
def test_a_killed_worker_costs_a_few_steps(restarted):
    for stage in STAGES:
        loss = restarted.losses[stage]
        assert loss.resumed >= loss.kept, f"{stage} did not start from its newest checkpoint"


@pytest.mark.slow
def test_the_same_command_continues_after_all_that_and_nothing_is_lost(restarted, finished):
    assert restarted.process.returncode == 0, restarted.process.stderr[-4000:]
    assert restarted.losses["driver"].kept <= restarted.losses["driver"].resumed <= restarted.step_at_kill
    assert len(set(restarted.run_ids)) == 1
    assert_same_trajectory(restarted.storage, finished.storage)
    client, run = mlflow_run(restarted.storage)
    assert run.info.status == "FINISHED"
    for stage in STAGES:
        steps = [metric.step for metric in client.get_metric_history(run.info.run_id, f"{stage}/loss")]
        assert steps == [row["step"] for row in history(restarted.storage, stage)]
    rewards = Counter(metric.step for metric in client.get_metric_history(run.info.run_id, "rebo/reward"))
    assert set(rewards.values()) == {1}


def broken_data(world, folder: Path, name: str, change) -> Path:
    """A copy of the world's data with the text of one file changed."""
    shutil.copytree(world.data, folder)
    path = folder / f"{name}.json"
    path.write_text(change(path.read_text()))
    return folder


def only(label: str):
    """Keeps the training questions of one side."""
    return lambda text: json.dumps([row for row in json.loads(text) if row["solution"][0] == label])


def without(index: int, field: str):
    """Drops a field of one row."""

    def change(text: str) -> str:
        rows = json.loads(text)
        del rows[index][field]
        return json.dumps(rows)

    return change


def without_file(world, folder: Path, name: str, instead: str | None = None) -> Path:
    """A copy of the world's model with one file gone, or under another name."""
    shutil.copytree(world.model, folder)
    if instead:
        (folder / name).rename(folder / instead)
    else:
        (folder / name).unlink()
    return folder


MISTAKES = {
    "unknown key": ({"rule.rebo.learning_rat": 1}, ("unknown key rule.rebo.learning_rat", "rule.rebo.learning_rate")),
    "wrong type": ({"rule.rebo.steps": "many"}, ("--set rule.rebo.steps=many", "rule.rebo.steps = 'many'")),
    "group of one": ({"rule.rebo.completions_per_prompt": 1}, ("completions_per_prompt must be at least 2",)),
    "no data folder": ({"rule.data": "nowhere"}, ("rule.data = nowhere", "name one")),
    "no valid JSON": (
        {"rule.data": lambda w, at: broken_data(w, at, "forget_level1", lambda text: text.replace(",", ";", 1))},
        ("forget_level1.json", "line 3"),
    ),
    "row without field": (
        {"rule.data": lambda w, at: broken_data(w, at, "reject_target", without(1, "output"))},
        ("reject_target.json, row 1: output is missing",),
    ),
    "no forget question": (
        {"rule.data": lambda w, at: broken_data(w, at, "rl_rejection_with_fb_neighbor_target", only("<normal>"))},
        ("no forget question",),
    ),
    "no boundary question": (
        {"rule.data": lambda w, at: broken_data(w, at, "rl_rejection_with_fb_neighbor_target", only("<reject>"))},
        ("no boundary question",),
    ),
    "question too long": ({"rule.rebo.max_prompt_tokens": 3}, ("rule.rebo.max_prompt_tokens = 3", "question 0")),
    "sharded weights": ({"train.strategy": "fsdp"}, ("train.strategy = fsdp", "generation.engine = vllm")),
    "no tokenizer": (
        {"rule.model": lambda w, at: without_file(w, at, "tokenizer.json")},
        ("has no tokenizer",),
    ),
    "pickled weights": (
        {"rule.model": lambda w, at: without_file(w, at, "model.safetensors", "pytorch_model.bin")},
        ("pytorch_model.bin", "safetensors"),
    ),
    "hub out of reach": (
        {"rule.model": "somebody/some-model", "rule.revision": "c0ffee00" * 5},
        ("somebody/some-model", "hub cannot be reached"),
    ),
}


@pytest.fixture(scope="module")
def refusals(world, tmp_path_factory) -> dict[str, tuple[subprocess.CompletedProcess, Path]]:
    """What each mistake is answered with, and the storage that it must not touch."""
    folder = tmp_path_factory.mktemp("mistakes")

    def answer(name: str) -> tuple[subprocess.CompletedProcess, Path]:
        place = folder / name.replace(" ", "-")
        place.mkdir()
        changes = MISTAKES[name][0]
        made = {key: value(world, place / "made") if callable(value) else value for key, value in changes.items()}
        storage = place / "storage"
        process = subprocess.run(
            commands.rule_command("run", *commands.settings(world, made)),
            cwd=commands.ROOT,
            env=commands.clean_environment() | {"RAYWARD_STORAGE": str(storage)},
            capture_output=True,
            text=True,
            timeout=200,
            check=False,
        )
        return process, storage

    with ThreadPoolExecutor(2) as pool:
        return dict(zip(MISTAKES, pool.map(answer, MISTAKES), strict=True))


@pytest.mark.parametrize("name", MISTAKES)
def test_a_mistake_is_told_in_one_sentence_before_anything_is_written(refusals, name):
    process, storage = refusals[name]
    assert process.returncode == 2, process.stderr[-3000:]
    told = process.stderr.splitlines()
    assert [line for line in told if line.startswith("error: ")] == told[-1:]
    assert "Traceback" not in process.stderr
    for words in MISTAKES[name][1]:
        assert words in told[-1]
    assert not storage.exists()
