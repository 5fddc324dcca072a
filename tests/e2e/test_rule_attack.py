"""`python -m jobs.rule attack` on the unlearned model of the tiny world, and on the original beside it."""

from __future__ import annotations

import json

import pytest

from cluster.report import read_lines
from tests.e2e import commands

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]
SETTINGS = {
    "rule.attack.bits": "[4]",
    "rule.attack.samples": 4,
    "rule.attack.relearn_learning_rate": 1e-3,
    "rule.attack.relearn_answers": 2,
    "rule.attack.relearn_steps": 8,
    "rule.attack.relearn_every": 2,
    "rule.trace.probes": 10,
}


@pytest.fixture(scope="module")
def attacked(world, finished, tmp_path_factory):
    """The command, how it ended, and its folder."""
    storage = tmp_path_factory.mktemp("attack")
    model = f"RULE@1e-5={finished.folder / 'model'}"
    arguments = ["attack", "--model", model, *commands.settings(world, SETTINGS), "--out", str(storage / "all")]
    process = commands.rule(storage, *arguments)
    assert process.returncode == 0, process.stdout[-4000:] + process.stderr[-4000:]
    return arguments, process, storage


def test_every_attack_is_reported_with_its_interval(attacked):
    _, process, storage = attacked
    report = json.loads((storage / "all" / "report.json").read_text())
    assert process.stdout.splitlines()[-1] == str(storage / "all" / "report.json")
    assert list(report["metrics"]) == ["original", "RULE@1e-5"]
    for found in report["metrics"].values():
        kinds = {key.split("/")[1] for key in found if key.startswith("regained/")}
        assert kinds == {"rewording", "prefilling", "sampling", "quantisation", "relearning"}
        assert len({metric["n"] for metric in found.values()}) == 1
    original, unlearned = report["metrics"].values()
    assert original["recall/plain"]["value"] > 0.95
    assert unlearned["recall/plain"]["value"] < 0.5
    assert unlearned["recall/sampling/best of 4"]["value"] >= unlearned["recall/plain"]["value"]


def test_relearning_is_a_curve_and_leaves_no_weights(attacked):
    _, _, storage = attacked
    report = json.loads((storage / "all" / "report.json").read_text())
    for name, curve in report["relearning"].items():
        assert list(curve) == ["2", "4", "6", "8"], name
        # asked again of what is saved, as the other attacks are
        assert report["metrics"][name]["recall/relearning/2 answers"]["value"] == pytest.approx(curve["8"]["forget"])
    assert not list((storage / "all").rglob("*.safetensors"))


def test_answers_table_and_plot_stand_beside_the_report(attacked):
    _, _, storage = attacked
    report = json.loads((storage / "all" / "report.json").read_text())
    assert report["failures"] == {}
    for name, metrics in report["metrics"].items():
        rows = read_lines(storage / "all" / "samples" / f"{name}.jsonl")
        drawn = [row["recall"] for row in rows if row["attack"] == "sampling/best of 4"]
        best = [max(drawn[start : start + 4]) for start in range(0, len(drawn), 4)]
        assert sum(best) / len(best) == pytest.approx(metrics["recall/sampling/best of 4"]["value"])
        assert {f"recall/{row['attack']}" for row in rows} <= set(metrics)
    table = read_lines(storage / "all" / "tables" / "attacks.jsonl")
    assert len(table) == sum(key.startswith("recall/") for found in report["metrics"].values() for key in found)
    assert (storage / "all" / "plots" / "attacks.png").stat().st_size > 10_000


def test_a_finished_one_says_so(attacked):
    arguments, _, storage = attacked
    again = commands.rule(storage, *arguments)
    assert again.returncode == 0
    assert "these attacks are finished" in again.stdout
