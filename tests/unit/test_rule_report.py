import io
import json
import math

import pytest
import yaml
from rich.console import Console

from cluster.report import write_lines
from jobs.rule.plots import plots
from jobs.rule.report import label, other_table, rows, step_seconds, table, write_markdown


def metric(value, n=60):
    half = 1.96 * math.sqrt(max(value * (1 - value), 0.01) / n)
    return {"value": value, "ci95": [max(0.0, value - half), min(1.0, value + half)], "n": n, "seed": 0}


def stage(forget_refusal, retain_refusal, forget_recall, retain_recall):
    metrics = {}
    kinds = {
        "general": (retain_refusal, retain_recall),
        "neighbor_qa": (retain_refusal, retain_recall - 0.1),
        "neighbor_fb": (retain_refusal * 0.6, retain_recall - 0.15),
        "heldout_boundary_qa": (retain_refusal * 1.5, retain_recall - 0.3),
        "heldout_forget_qa": (forget_refusal * 0.9, forget_recall * 0.8),
        "forget_qa": (forget_refusal, forget_recall),
        "forget_fb": (forget_refusal * 0.95, forget_recall * 0.9),
        "forget_aa": (forget_refusal * 0.8, forget_recall),
        "forget_aa/reverse_query": (forget_refusal * 0.7, forget_recall),
    }
    for kind, (refusal, recall) in kinds.items():
        metrics[f"{kind}/refusal"] = metric(refusal)
        metrics[f"{kind}/refusal_rule"] = metric(refusal)
        metrics[f"{kind}/rouge_l_recall"] = metric(recall)
        if "/" not in kind:
            metrics[f"known/{kind}/refusal"] = metric(refusal, 31)
            metrics[f"known/{kind}/rouge_l_recall"] = metric(min(1.0, recall + 0.1), 31)
    return metrics


@pytest.fixture
def report():
    return {
        "model": "embedded:smollm2-135m",
        "targets": ["Stephen King"],
        "command": "python -m jobs.rule run --profile laptop",
        "data_digests": {"demo": "ab" * 32},
        "metrics": {
            "original": stage(0.0, 0.01, 0.62, 0.92) | {"mia/auc_min_k_20": metric(0.71)},
            "steered": stage(0.45, 0.1, 0.38, 0.86),
            "unlearned": stage(0.98, 0.12, 0.02, 0.83) | {"mia/auc_min_k_20": metric(0.52)},
        },
        "seconds": {"knowledge_filter": 41.0, "stage_1": 120.5, "stage_2": 412.0, "evaluation": 96.0, "report": 3.2},
    }


@pytest.fixture
def history():
    steering = [
        {"stage": "steering", "step": step, "loss": 2.4 * 0.9**step, "refusal_forget": None if step % 4 else step / 60}
        for step in range(30)
    ]
    rebo = [
        {
            "stage": "rebo",
            "step": step,
            "reward": 0.36 + 0.5 * (1 - 0.93**step) + 0.05 * math.sin(3 * step),
            "kl": 0.002 * step,
            "zero_advantage_groups": 0.3 + 0.2 * math.cos(step),
            "refusal_forget": min(1.0, 0.45 + step / 60),
            "refusal_boundary": 0.4 * 0.95**step,
            "seconds": {"rollout": 4.1, "reward": 0.02, "reference": 1.4, "update": 5.2, "sync": 0.4},
        }
        for step in range(45)
    ]
    return steering + rebo


def printed(shown, width):
    console = Console(file=io.StringIO(), width=width)
    console.print(shown)
    return console.file.getvalue()


def test_table_shows_every_kind_once_with_stages_side_by_side(report):
    text = printed(table(report), 96)
    lines = text.splitlines()
    assert sum(line.strip().startswith("forget QA ") for line in lines) == 1
    line = next(line for line in lines if line.strip().startswith("forget QA "))
    assert " ".join(line.split()) == "forget QA refusal 60 0 [0, 3] 45 [32, 58] 98 [94, 100]"
    assert max(map(len, lines)) <= 92
    assert "after stage 1" in text
    assert "..." not in text
    assert "\u2026" not in text
    assert "mia" not in text
    assert "\u2026" not in printed(table(report), 80)


def test_rows_put_forget_before_retain_and_all_before_known(report):
    places = [(row.kind, row.known) for row in rows(report)]
    assert places[0] == ("forget_fb", False)
    assert places[-1] == ("general", True)
    assert places.index(("forget_qa", False)) < places.index(("forget_qa", True))
    assert {row.n for row in rows(report) if row.known} == {31}


def test_other_metrics_have_their_own_table(report):
    text = printed(other_table(report), 96)
    line = next(line for line in text.splitlines() if "mia/auc_min_k_20" in line)
    assert "0.71" in line
    assert " - " in line
    for metrics in report["metrics"].values():
        metrics.pop("mia/auc_min_k_20", None)
    assert other_table(report) is None


def test_stage_that_was_not_run_has_no_column(report):
    del report["metrics"]["steered"]
    assert "after stage 1" not in printed(table(report), 96)


def test_labels():
    assert label("heldout_boundary_qa") == "held-out boundary QA"
    assert label("forget_aa/reverse_query") == "forget AA: reverse query"


def test_plots_are_written(report, history, tmp_path):
    report["step_seconds"] = step_seconds(history)
    assert report["step_seconds"]["rollout"] == 4.1
    written = plots(report, history, tmp_path / "plots")
    assert [path.name for path in written] == ["training.png", "before_after.png", "seconds.png"]
    for path in written:
        assert path.read_bytes().startswith(b"\x89PNG")
        assert path.stat().st_size > 10_000


def test_plots_without_training_leave_out_the_curves(report, tmp_path):
    assert [path.name for path in plots(report, [], tmp_path)] == ["before_after.png", "seconds.png"]
    assert plots({**report, "metrics": {}, "seconds": {}}, [], tmp_path) == []


def test_samples_are_one_object_a_line(tmp_path):
    write_lines([{"prompt": "a\nb"}, {"prompt": "\u00e9"}], tmp_path / "samples.jsonl")
    lines = (tmp_path / "samples.jsonl").read_text(encoding="utf-8").splitlines()
    assert [json.loads(line)["prompt"] for line in lines] == ["a\nb", "\u00e9"]
    assert [path.name for path in tmp_path.iterdir()] == ["samples.jsonl"]


def test_model_card_has_front_matter_results_and_origin(report, tmp_path):
    write_markdown(report, tmp_path / "README.md")
    text = (tmp_path / "README.md").read_text()
    _, front, body = text.split("---\n", 2)
    assert yaml.safe_load(front)["base_model"] == "embedded:smollm2-135m"
    assert "machine-unlearning" in yaml.safe_load(front)["tags"]
    assert "| forget QA | refusal | 60 | 0 [0, 3] | 45 [32, 58] | 98 [94, 100] |" in body
    assert "mia/auc_min_k_20" in body
    assert "python -m jobs.rule run --profile laptop" in body
    assert "ab" * 32 in body
