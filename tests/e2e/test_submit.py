"""`ray job submit` against `up`: the same command line on two workers, behind a token, ended by itself and by stop."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from cluster.processes import Session
from jobs.rule.world import SETTINGS
from tests.e2e import commands
from tests.e2e.commands import ROOT, clean_environment, cluster, free_ports, history, is_training_worker, options, wait

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1200)]

TWO_WORKERS = {
    "train.num_workers": 2,
    "rule.steering.epochs": 1,
    "rule.steering.stop_at_refusal": "null",
    "rule.rebo.steps": 2,
}


class Submitter:
    """A clean shell after the line that `up` prints."""

    def __init__(self, storage: Path) -> None:
        self.storage = storage
        self.state = json.loads((storage / "cluster.json").read_text())
        self.environment = clean_environment() | {
            "RAY_API_SERVER_ADDRESS": self.state["ray"]["uri"],
            "RAY_AUTH_MODE": "token",
            "RAY_AUTH_TOKEN_PATH": self.state["auth"]["token_path"],
        }

    def job(self, *arguments: str) -> subprocess.CompletedProcess:
        """`ray job ...` to its end."""
        return subprocess.run(
            [str(Path(sys.executable).parent / "ray"), "job", *arguments],
            cwd=ROOT,
            env=self.environment,
            capture_output=True,
            text=True,
            timeout=commands.TIME_LIMIT_S,
            check=False,
        )

    def training_workers(self) -> list:
        """Ray Train's workers on this cluster."""
        members = Session(self.state["ray"]["pid"], self.state["ray"]["born"]).members()
        return [process for process in members if is_training_worker(process)]


@pytest.fixture(scope="module")
def submitter(tmp_path_factory):
    storage = tmp_path_factory.mktemp("cluster")
    started = cluster("up", *options(storage, free_ports()), RAY_AUTH_MODE="token")
    try:
        assert started.returncode == 0, started.stderr
        yield Submitter(storage)
    finally:
        assert cluster("down", "--storage", str(storage)).returncode == 0


@pytest.fixture(scope="module")
def submitted(submitter, world) -> subprocess.CompletedProcess:
    """A job on two workers, followed to its end."""
    command = ["python", "-m", "jobs.rule", "run", *commands.settings(world, TWO_WORKERS)]
    return submitter.job("submit", "--working-dir", ".", "--", *command)


def test_a_submitted_job_shows_progress_and_writes_under_the_storage(submitter, submitted):
    assert submitted.returncode == 0, submitted.stdout[-4000:] + submitted.stderr[-4000:]
    assert "rebo step 2/2" in submitted.stdout
    report = json.loads((commands.run_folder(submitter.storage) / "report.json").read_text())
    assert report["mlflow"]["uri"] == submitter.state["mlflow"]["uri"]
    assert str(commands.run_folder(submitter.storage) / "report.json") in submitted.stdout
    assert set(report["metrics"]) == {"original", "steered", "unlearned"}


def test_two_workers_share_the_batch_of_one(submitter, submitted, finished):
    one, two = (history(storage, "steering") for storage in (finished.storage, submitter.storage))
    # the same questions, dealt to two workers
    assert two[0]["loss"] == pytest.approx(one[0]["loss"], rel=1e-4)
    assert two[0]["grad_norm"] == pytest.approx(one[0]["grad_norm"], rel=1e-3)
    first = history(submitter.storage, "rebo")[0]
    forget_samples = SETTINGS["rule.rebo.prompts_per_step"] * SETTINGS["rule.rebo.completions_per_prompt"] / 2
    assert first["refusal_forget"] * forget_samples == pytest.approx(round(first["refusal_forget"] * forget_samples))
    assert 0 <= first["reward"] <= 1
    assert abs(first["loss"]) < 10


def test_stop_ends_a_submitted_job_and_frees_its_workers(submitter, submitted, world):
    from mlflow import MlflowClient

    before = set((submitter.storage / "rule").iterdir())
    changes = {"rule.seed": 7, "rule.rebo.steps": 400}
    command = ["python", "-m", "jobs.rule", "run", *commands.settings(world, changes)]
    asked = submitter.job("submit", "--no-wait", "--submission-id", "endless", "--working-dir", ".", "--", *command)
    assert asked.returncode == 0, asked.stderr
    wait(submitter.training_workers, "the submitted job to train", 200)
    stopped = submitter.job("stop", "endless")
    assert stopped.returncode == 0, stopped.stderr
    assert "was stopped" in stopped.stdout
    wait(lambda: not submitter.training_workers(), "the training workers to end", 60)
    [folder] = {path for path in (submitter.storage / "rule").iterdir() if path.is_dir()} - before
    state = json.loads((folder / "state.json").read_text())
    assert MlflowClient(state["tracking_uri"]).get_run(state["mlflow_run_id"]).info.status == "KILLED"
    assert not (folder / "report.json").exists()
