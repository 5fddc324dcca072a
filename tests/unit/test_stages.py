"""What runs that share a folder have in common, and how they wait for one another."""

from __future__ import annotations

from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace

import pytest

from cluster.config import Generation, Train, load
from cluster.errors import TryAgain
from cluster.report import digest, write_lines
from jobs.rule import job, stages
from jobs.rule.config import RuleConfig, Steering
from jobs.rule.data import Refusal
from jobs.rule.stages import decisive
from jobs.rule.steering import SteeringTask
from jobs.rule.trial import trained_steps


def task(settings: Steering, check: tuple[str, ...] = (), temperature: float = 1.0, seed: int = 1) -> SteeringTask:
    refusals = (Refusal("Who is he?", "I do not know.", 0),)
    return SteeringTask(
        *(Path("a"), Path("b"), refusals, check, settings, Train(), Generation(), 16, temperature, 1.0, seed)
    )


def test_equal_first_stages_are_trained_once():
    plain, checked = Steering(), Steering(stop_at_refusal=0.5)
    key = {name: digest(decisive(task(settings))) for name, settings in (("plain", plain), ("checked", checked))}
    for name, settings in (("plain", plain), ("checked", checked)):
        assert digest(decisive(task(settings, check=("Who is she?",)))) == key[name]
        assert digest(decisive(task(settings, seed=2))) != key[name]
    assert digest(decisive(task(plain, temperature=0.7))) == key["plain"]  # nothing is sampled
    assert digest(decisive(task(checked, temperature=0.7))) != key["checked"]


@pytest.mark.parametrize(("shared", "seconds"), [(None, 0), (Path("shared"), job.LOCK_WAIT_S)])
def test_a_run_that_shares_waits_for_the_process_of_a_killed_driver(monkeypatch, tmp_path, shared, seconds):
    class Reached(Exception):
        pass

    waited = []

    @contextmanager
    def exclusively(folder, wait_s=0):
        waited.append(wait_s)
        raise Reached
        yield

    monkeypatch.setattr(job, "exclusively", exclusively)
    with pytest.raises(Reached):
        job.main(load(RuleConfig, "laptop", environ={}), tmp_path / "run", shared_folder=shared)
    assert waited == [seconds]


def test_a_full_disk_is_no_fault_of_a_trial(tmp_path, monkeypatch):
    run = job.prepare(load(RuleConfig, "laptop", environ={}), tmp_path / "trial", "")
    stages.require_disk(run)
    full = SimpleNamespace(free=1 << 20)
    monkeypatch.setattr("cluster.memory.shutil.disk_usage", lambda _: full)
    with pytest.raises(TryAgain, match=r"checkpoints of a training need .* but .* are free on the disk of .*trial"):
        stages.require_disk(run)


def test_steps_of_a_trial_are_those_of_stage_two_that_began_a_row(tmp_path):
    assert trained_steps(tmp_path) == 0
    rows = [{"stage": "steering", "step": 12, "loss": 1}, {"stage": "rebo", "step": 1, "loss": 1}]
    # looked at after its second update, and ended before that was logged
    write_lines([*rows, {"stage": "rebo", "step": 2, "forgotten": 0.1}], tmp_path / "history.jsonl")
    assert trained_steps(tmp_path) == 2
