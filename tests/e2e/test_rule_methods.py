"""`python -m jobs.rule run --method NAME` among made-up people, by two workers of unequal work.

Other methods, and a variant of RULE, are in test_rule_compare.py.
"""

from __future__ import annotations

import json
import math

import pytest

from jobs.rule.world_facts import TARGET
from tests.e2e import commands

CHANGES = {
    "rule.baseline.warmup_steps": 0,
    "rule.baseline.schedule": "constant",
    "rule.baseline.batch_size": 4,
    "rule.baseline.learning_rate": 1e-3,
    "rule.baseline.epochs": 4,
    # whose halves of a batch take different numbers of rows
    "train.num_workers": 2,
    "train.tokens_per_row": 60,
}


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_a_method_trains_and_is_measured_as_rule_is(world, tmp_path):
    process = commands.rule(tmp_path, "run", "--method", "NPO+KLR", *commands.settings(world, CHANGES))
    assert process.returncode == 0, process.stdout[-4000:] + process.stderr[-4000:]
    folder = commands.run_folder(tmp_path)
    report = json.loads((folder / "report.json").read_text())
    assert report["method"] == "NPO+KLR"
    assert set(report["metrics"]) == {"original", "unlearned"}
    known = {stage: metrics["known/forget/rouge_l_recall"]["value"] for stage, metrics in report["metrics"].items()}
    assert known["original"] > 0.95
    assert known["unlearned"] < known["original"] - 0.2
    losses = [row["loss"] for row in commands.history(tmp_path, "unlearning")]
    assert losses[0] == pytest.approx(10 * math.log(2), rel=1e-3)  # nothing has moved: 2 / beta ln 2, no divergence
    assert losses[-1] < losses[0]
    card = (folder / "model" / "README.md").read_text()
    assert f"made by NPO+KLR to forget **{TARGET}**" in card
    assert process.stdout.splitlines()[-1].endswith("report.json")
