"""`python -m jobs.rule compare` among made-up people: a killed driver, a method that diverges, what is shared."""

from __future__ import annotations

import json

import psutil
import pytest

from tests.e2e import commands
from tests.e2e.commands import alive, wait

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1800)]
METHODS = "ICU,RS,RULE,GA@1e30"
FAST = {"rule.rebo.steps": 6, "train.max_failures": 1}


@pytest.fixture(scope="module")
def compared(world, tmp_path_factory):
    """The folder of a comparison whose driver was killed once, and what the second one printed."""
    storage = tmp_path_factory.mktemp("compare")
    arguments = ("compare", "--methods", METHODS, *commands.settings(world, FAST), "--out", str(storage / "all"))
    first = commands.start_rule(storage, *arguments)
    try:
        report = storage / "all" / "runs" / "ICU" / "report.json"
        wait(lambda: report.exists() or first.process.poll() is not None, "the first method", 300)
        assert report.exists(), first.errors.read_text()
        below = first.descendants()
        psutil.Process(first.process.pid).kill()
        first.process.wait(30)
        wait(lambda: not alive(below), "the runs of a killed driver to end", 90)
    finally:
        first.kill()
    second = commands.start_rule(storage, *arguments)
    try:
        process = second.finish(1200)
    finally:
        second.kill()
    return storage / "all", process


def test_what_was_finished_stays_and_the_rest_is_done(compared):
    folder, process = compared
    assert process.returncode == 0, process.stdout[-4000:] + process.stderr[-4000:]
    assert "[ICU] is finished" in process.stdout
    assert process.stdout.splitlines()[-1] == str(folder / "report.json")
    report = json.loads((folder / "report.json").read_text())
    assert list(report["metrics"]) == ["ICU", "RS", "RULE"]
    assert report["best"] == {"ICU": "ICU", "RS": "RS", "RULE": "RULE"}
    assert report["differences"]["RULE - RS"]["forgotten"]["verdict"] == "better"
    # a model of this size has never followed an instruction, and loses its way behind one
    assert report["differences"]["RULE - ICU"]["retained"]["verdict"] == "better"
    assert "RULE" in report["front"]
    assert "ICU" not in report["front"]
    assert (folder / "plots" / "tradeoff.png").stat().st_size > 10_000


def test_a_method_that_diverges_is_recorded_and_tried_once(compared):
    folder, process = compared
    report = json.loads((folder / "report.json").read_text())
    assert list(report["failures"]) == ["GA@1e+30"]
    assert "GA diverged at step" in report["failures"]["GA@1e+30"]
    assert "GA@1e+30 failed: " in process.stdout
    log = next(path for path in (folder / "runs").glob("GA*.log")).read_text()
    assert log.count("unlearning step 1/") <= 1


def test_stage_one_and_the_original_are_asked_once(compared):
    folder, _ = compared
    shared = sorted(path.name for path in (folder / "shared").iterdir() if not path.name.endswith(".lock"))
    assert len(shared) == 2, shared
    reports = {name: json.loads((folder / "runs" / name / "report.json").read_text()) for name in ("RS", "RULE")}
    assert reports["RS"]["seconds"]["steering"] == reports["RULE"]["seconds"]["steering"]
    same = (folder / "runs" / "RS" / "model" / "model.safetensors").read_bytes()
    assert (folder / "runs" / "RULE" / "steered" / "model.safetensors").read_bytes() == same
    assert (
        "evaluation of original" in reports["RS"]["seconds"]
        or "evaluation of original" in json.loads((folder / "runs" / "ICU" / "report.json").read_text())["seconds"]
    )
    assert "evaluation of original" not in reports["RULE"]["seconds"]
