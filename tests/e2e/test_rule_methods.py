"""`python -m jobs.rule run --method NAME` among made-up people: methods that read texts, and variants of RULE.

RT, RS, ICU and a method that diverges are in test_rule_compare.py.
"""

from __future__ import annotations

import json
import math

import pytest

from jobs.rule.world_facts import TARGET
from tests.e2e import commands

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1200)]
FAST = {"rule.baseline.warmup_steps": 0, "rule.baseline.schedule": "constant", "rule.baseline.batch_size": 4}
CHANGES = {
    # two workers, whose halves of a batch take different numbers of rows of 60 tokens
    "NPO+KLR": {
        "rule.baseline.learning_rate": 1e-3,
        "rule.baseline.epochs": 4,
        "train.num_workers": 2,
        "train.tokens_per_row": 60,
    },
    "RMU": {"rule.baseline.learning_rate": 1e-2, "rule.baseline.epochs": 4, "rule.baseline.rmu_alpha": 1},
}


def run(world, storage, method: str) -> tuple[dict, str]:
    process = commands.rule(storage, "run", "--method", method, *commands.settings(world, FAST | CHANGES[method]))
    assert process.returncode == 0, process.stdout[-4000:] + process.stderr[-4000:]
    folder = commands.run_folder(storage)
    return json.loads((folder / "report.json").read_text()), process.stdout


@pytest.mark.parametrize("method", sorted(CHANGES))
def test_a_method_trains_and_is_measured_as_rule_is(method, world, tmp_path):
    report, printed = run(world, tmp_path, method)
    assert report["method"] == method
    assert set(report["metrics"]) == {"original", "unlearned"}
    known = {stage: metrics["known/forget/rouge_l_recall"]["value"] for stage, metrics in report["metrics"].items()}
    assert known["original"] > 0.95
    assert known["unlearned"] < known["original"] - 0.2
    if method == "NPO+KLR":  # nothing has moved yet: 2 / beta * ln 2, and no divergence
        losses = [row["loss"] for row in commands.history(tmp_path, "unlearning")]
        assert losses[0] == pytest.approx(10 * math.log(2), rel=1e-3)
        assert losses[-1] < losses[0]
    card = (commands.run_folder(tmp_path) / "model" / "README.md").read_text()
    assert f"made by {method} to forget **{TARGET}**" in card
    assert printed.splitlines()[-1].endswith("report.json")


def test_rule_without_its_first_stage_and_with_fewer_boundary_questions(world, tmp_path):
    variant = {
        "rule.rebo.start": "original",
        "rule.rebo.reference": "original",
        "rule.rebo.advantage": "reinforce_plus_plus",
        "rule.rebo.steps": 3,
        "rule.boundary.ratio": 0.5,
        "rule.boundary.fill_in": "false",
    }
    process = commands.rule(tmp_path, "run", *commands.settings(world, variant))
    assert process.returncode == 0, process.stdout[-4000:] + process.stderr[-4000:]
    report = json.loads((commands.run_folder(tmp_path) / "report.json").read_text())
    assert set(report["metrics"]) == {"original", "unlearned"}
    assert "steering" not in report["seconds"]
    rows = commands.history(tmp_path, "rebo")
    assert [row["zero_advantage_groups"] for row in rows] == [0, 0, 0]
    assert not commands.history(tmp_path, "steering")
