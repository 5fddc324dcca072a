"""A run's phases: what is timed, what a broken-off attempt leaves, and that a folder that is no run stays untouched."""

from __future__ import annotations

import time

import pytest

from cluster.errors import JobFailure
from cluster.report import read_json
from cluster.runs import STATE, Run, publish


@pytest.fixture
def run(tmp_path):
    made = Run()
    made.folder, made.state = tmp_path / "run", {"identity": "mine"}
    return made


def spend(run: Run, seconds: float, fails: bool = False) -> None:
    with run.phase("training"):
        time.sleep(seconds)
        if fails:
            raise RuntimeError("killed")


def test_what_was_broken_off_counts_once(run):
    run.save()
    for _ in range(2):
        with pytest.raises(RuntimeError):
            spend(run, 0.1, fails=True)
    assert "seconds" not in read_json(run.folder / STATE)
    spend(run, 0.1)
    assert 0.3 <= run.state["seconds"]["training"] < 1
    assert run.state["broken_off"] == {}
    spend(run, 0.0)  # done again, as another judge's scoring
    assert run.state["seconds"]["training"] < 0.1


def test_a_phase_that_goes_on_adds_up(run):
    run.save()
    for _ in range(3):
        with run.phase("shards", goes_on=True):
            time.sleep(0.1)
    assert 0.3 <= run.state["seconds"]["shards"] < 1


def test_a_mistake_in_the_first_phase_leaves_no_folder(run):
    with pytest.raises(RuntimeError):
        spend(run, 0.0, fails=True)
    assert not run.folder.exists()


def test_a_report_is_there_once_the_tracking_server_has_it(tmp_path):
    sent = []

    class Tracker:
        fails = True

        def artifact(self, path):
            if self.fails:
                raise JobFailure("no room there")
            sent.append((path.name, read_json(path)))

    tracker = Tracker()
    with pytest.raises(JobFailure, match="no room there"):
        publish({"a": 1}, tmp_path, tracker)
    assert not list(tmp_path.iterdir())
    tracker.fails = False
    (tmp_path / ".report-of-a-killed-driver").mkdir()
    assert publish({"a": 1}, tmp_path, tracker) == tmp_path / "report.json"
    assert sent == [("report.json", {"a": 1})]
    assert list(tmp_path.iterdir()) == [tmp_path / "report.json"]
    assert read_json(tmp_path / "report.json") == {"a": 1}
