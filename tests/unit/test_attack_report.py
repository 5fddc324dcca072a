"""Which models are attacked, and what a report of attacks shows."""

from __future__ import annotations

import json
from types import SimpleNamespace

import pytest
from rich.console import Console

from cluster.errors import UserError
from jobs.rule import attack as attacking
from jobs.rule import attack_report, job
from jobs.rule.attack import chosen
from jobs.rule.attacks import PREFILLS, REWORDINGS
from jobs.rule.data import load_data


def test_models_by_name_and_from_a_comparison(tmp_path):
    report = {"job": "compare", "best": {"GA": "GA@1e-6"}, "models": {"GA@1e-6": "/runs/GA/model"}}
    (tmp_path / "report.json").write_text(json.dumps(report))
    found = chosen(["mine=/models/x"], tmp_path)
    assert {name: str(path) for name, path in found.items()} == {"GA@1e-6": "/runs/GA/model", "mine": "/models/x"}


def test_a_comparison_of_another_model_or_of_other_questions_is_refused(tmp_path):
    data = load_data("demo", None, 0.0, 42)
    rule = SimpleNamespace(model="mine", data="demo")
    run = SimpleNamespace(source=SimpleNamespace(version="1"), data=data, config=SimpleNamespace(rule=rule))
    report = {"model": "theirs", "model_version": "1", "data_digests": {"made-up": job.data_digest(data)}}

    def refused() -> str:
        (tmp_path / "report.json").write_text(json.dumps(report))
        with pytest.raises(UserError) as error:
            attacking._require_same_questions(run, tmp_path)
        return str(error.value)

    (tmp_path / "report.json").write_text(json.dumps(report))
    attacking._require_same_questions(run, tmp_path)
    report["data_digests"] = {"made-up": "others"}
    assert "asked the questions of made-up, but rule.data = demo has others; give attack the --profile" in refused()
    report["model_version"] = "2"
    assert "is of the model theirs, but rule.model = mine is another, or has another revision" in refused()


@pytest.mark.parametrize(
    ("named", "comparison", "told"),
    [
        ([], None, "attack needs models"),
        (["/models/x"], None, "--model /models/x is not of the form NAME=DIR"),
        (["a/b=/x"], None, "not of the form"),
        (["..=/x"], None, "not of the form"),
        (["a=/x", "a=/y"], None, "--model a=/y: there is a model a already"),
        (["original=/x"], None, "there is a model original already"),
        ([], "absent", "absent holds no finished comparison"),
    ],
)
def test_models_that_cannot_be_told(tmp_path, named, comparison, told):
    with pytest.raises(UserError, match=told):
        chosen(named, comparison and tmp_path / comparison)


def metric(value: float, low: float, high: float) -> dict:
    return {"value": value, "ci95": [low, high], "n": 7, "seed": 0}


@pytest.fixture
def content() -> dict:
    found = {
        "recall/plain": metric(0.1, 0, 0.2),
        "recall/quantisation/4 bits": metric(0.5, 0.3, 0.7),
        "regained/quantisation/4 bits": metric(0.4, 0.2, 0.6),
        "recall/sampling/best of 2": metric(0.2, 0.1, 0.3),
        "regained/sampling/best of 2": metric(0.1, -0.1, 0.3),
    }
    curve = {"5": {"forget": 0.4, "retain": 0.9}, "10": {"forget": 0.8, "retain": 0.9}}
    return {
        "metrics": {"original": found, "RULE": dict(found)},
        "relearning": {"original": curve, "RULE": curve},
        "facts": 12,
        "failures": {},
    }


def test_the_table_marks_what_is_decided(content):
    text = printed(content)
    [recalls] = [line for line in text.splitlines() if line.strip().startswith("RULE")]
    assert recalls.split() == ["RULE", "10", "[0,", "20]", "20", "[10,", "30]", "50", "[30,", "70]"]
    assert text.split().count("(+40*)") == text.split().count("(+10)") == 2
    content["metrics"]["RULE"]["regained/sampling/best of 2"] = metric(0.3, 0.2, 0.4)
    assert "(+30)" in printed(content)  # the best of two is above one by chance alone
    assert "on 7 forget probes" in text
    assert "(+40*)" not in printed(content | {"facts": 4})  # of which an interval says too little


def test_what_a_model_was_not_asked_is_left_blank(content):
    del content["metrics"]["RULE"]["recall/sampling/best of 2"]
    [line] = [line for line in printed(content).splitlines() if line.strip().startswith("RULE")]
    assert line.split()[4] == "-"


def test_of_several_wordings_only_what_any_brings_back_is_shown(content):
    for name, value in (("quiz", 0.1), ("brief", 0.6), ("any", 0.7)):
        content["metrics"]["RULE"][f"recall/rewording/{name}"] = metric(value, 0, 1)
    text = printed(content)
    assert "70 [0, 100]" in text
    assert "60 [0, 100]" not in text
    assert "quiz" not in text


def printed(content: dict) -> str:
    console = Console(width=120, record=True)
    console.print(attack_report.table(content))
    return console.export_text()


def test_the_curves_begin_at_the_plain_question(content):
    [axes] = attack_report.figure(content).axes
    forget, retain = axes.lines[:2]
    assert forget.get_xydata().tolist() == [[0, 0.1], [5, 0.4], [10, 0.8]]
    assert retain.get_xydata().tolist() == [[5, 0.9], [10, 0.9]]


def test_the_worst_is_taken_probe_by_probe():
    first, second, *others = REWORDINGS
    given = {"plain": [0, 0], f"rewording/{first}": [0.1, 0.9], f"rewording/{second}": [0.5, 0.2]}
    given |= {f"rewording/{name}": [0, 0] for name in others} | {f"prefilling/{next(iter(PREFILLS))}": [0.3, 0.4]}
    assert attack_report.worst_of(given) == {"rewording/any": [0.5, 0.9]}  # not every opening was asked
    assert attack_report.worst_of({"plain": [0, 0]}) == {}
