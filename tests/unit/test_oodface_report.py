"""What a run shows of scenarios inside and outside the paper's thirty."""

from __future__ import annotations

import numpy as np
import pytest

from jobs.oodface import report
from jobs.oodface.robustness import OTHER_VARIATIONS, Scored, evaluate
from jobs.oodface.scenarios import GROUPS, PROCEDURAL, SCENARIOS, selected


def content(*chosen: str, severities: tuple[int, ...] = (1, 2, 3, 4, 5)) -> dict:
    """A report of one model, as `evaluate` writes it."""
    rng, same = np.random.default_rng(0), np.arange(80) < 40
    clean = rng.normal(4.0 * same)
    conditions = {(name, level): clean - rng.random(80) * level for name in selected(chosen) for level in severities}
    categories = {name: one.category for name, one in SCENARIOS.items()}
    found = evaluate(Scored(same, np.arange(80) % 4, clean, conditions), list(conditions), categories, 0, 100)
    metrics = {name: metric.to_json() for name, metric in found.metrics.items()}
    return {"metrics": {"m": metrics}, "no_face": [], "lost": []}


def labels(shown) -> list[str]:
    return list(shown.columns[0].cells)


def test_extensions_have_rows_of_their_own():
    whole = content("corruptions", "variations", "extensions")
    paper = labels(report.table(content("corruptions", "variations")))
    assert labels(report.table(whole)) == [*paper[:-4], "elastic transform", "face mask", *paper[-4:]]
    assert sorted(paper[-4:]) == ["cor", "rce", "rve", "var"]
    few = labels(report.table(content("face_mask", severities=(1, 3))))
    assert few == ["clean", "face mask*"]
    assert [column.header for column in report.table(whole).columns] == ["", "m"]


def test_the_heat_map_has_a_column_a_scenario():
    figure = report.heat_map(content("fog", "makeup", "extensions"))
    shown = [one.get_text() for one in figure.axes[0].get_xticklabels()]
    assert shown == ["Fog", "Makeup*", "Elastic Transform", "Face Mask*"]
    assert "threshold of the clean images" in figure.axes[0].get_title()
    assert figure.get_supxlabel() == report.MARKED
    assert not report.heat_map(content("fog")).get_supxlabel()


def test_a_dollar_in_a_models_name_is_no_formula(tmp_path):
    shown = content("fog")
    shown["metrics"] = {"m$v_$": shown["metrics"]["m"]}
    for number, figure in enumerate((report.heat_map(shown), report.curves(shown))):
        figure.savefig(tmp_path / f"{number}.png")


def test_curves_are_those_of_the_thirty():
    assert report.curves(content("extensions")) is None
    assert len(report.curves(content("fog", "extensions")).axes) == 1


@pytest.mark.parametrize(
    ("chosen", "stand_ins", "masks"),
    [
        (["fog"], False, False),
        (["makeup"], True, False),
        (["extensions"], False, True),
        (["age", "face_mask"], True, True),
    ],
)
def test_what_is_procedural_is_called_so(capsys, chosen, stand_ins, masks):
    report.evaluated(content(*chosen))
    printed = capsys.readouterr().out
    assert ("accessories are procedural stand-ins" in printed) is stand_ins
    assert ("Face masks are procedural too" in printed) is masks


def test_what_changes_the_face_is_procedural_and_falls_as_a_variation():
    assert (*GROUPS["variations"], "face_mask") == PROCEDURAL
    assert {*GROUPS["extensions"]} & {*PROCEDURAL} == {*OTHER_VARIATIONS}


def test_a_model_without_an_error_has_curves():
    """Of thirty accuracies of 1 the mean may come out as 1 + 2e-16, above the end of its interval."""
    same = np.arange(40) < 20
    clean = same.astype(float)
    conditions = {(name, level): clean for name in selected(["corruptions", "variations"]) for level in range(1, 6)}
    categories = {name: one.category for name, one in SCENARIOS.items()}
    found = evaluate(Scored(same, np.arange(40) % 4, clean, conditions), list(conditions), categories, 0, 100)
    assert all(one.value <= 1 and one.ci95[1] <= 1 for one in found.metrics.values())
    metrics = {name: metric.to_json() for name, metric in found.metrics.items()}
    assert len(report.curves({"metrics": {"m": metrics}}).axes) == 2


def test_what_was_left_out_is_told(capsys):
    found = content("fog") | {"several_faces": ["a", "b"], "pairs_dropped": 3, "pairs_left_out": {"m": 2, "n": 0}}
    report.evaluated(found)
    printed = capsys.readouterr().out
    assert "2 images show several faces; the largest near the middle was taken" in printed
    assert "3 pairs were left out, an image of which is not there or cannot be read; 2 more for m\n" in printed
    report.evaluated(content("fog") | {"pairs_dropped": 0, "pairs_left_out": {"m": 0}})
    assert "left out" not in capsys.readouterr().out
