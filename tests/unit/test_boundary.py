"""Kinds and ratios of boundary questions: the training rows change, the probes never."""

from __future__ import annotations

import json
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest

from cluster.config import load
from cluster.errors import UserError
from jobs.rule.boundary import FAR_FILE, with_boundary
from jobs.rule.config import Boundary, RuleConfig
from jobs.rule.data import Item, RuleData, load_data, read_items, schedule, twins

SHARED = Path(__file__).parents[3] / "shared/data/rule/RWKU/1_Stephen_King"


def write(path: Path, content: object) -> None:
    path.write_text(json.dumps(content), encoding="utf-8")


def rl(prompt: str, label: str, answer: str = "a") -> dict:
    return {"prompt": prompt, "solution": [f"<{label}>", answer]}


def block(i: int, other: str = "near") -> list[dict]:
    twins = [rl(f"{other} question {i}?", "normal"), rl(f"{other} {i} is ___.", "normal")]
    return [rl(f"King {i}?", "reject"), rl(f"King {i} is ___.", "reject"), *twins]


@pytest.fixture
def folder(tmp_path) -> Path:
    """Ten questions with fill-in forms and twins, far twins, and a file of ratio 3."""
    write(tmp_path / "intro.json", [{"target": "King"}])
    write(tmp_path / "reject_target.json", [{"instruction": f"King {i}?", "output": "No."} for i in range(10)])
    write(tmp_path / "rl_rejection_with_fb_neighbor_target.json", [row for i in range(10) for row in block(i)])
    write(tmp_path / FAR_FILE, [row for i in range(10) for row in block(i, "far")])
    further = [rl(f"more question {i}?", "normal") for i in range(40)]
    near = [row for i in range(10) for row in block(i)]
    write(tmp_path / "rl_rejection_with_fb_neighbor_target_r3.0.json", near + further)
    write(tmp_path / "rl_rejection_with_fb_neighbor_target_r2.0.json", near)
    return tmp_path


def chosen(folder: Path, share: float = 0.2, **settings) -> tuple[RuleData, RuleData]:
    data = load_data(str(folder), None, share, 42)
    return data, with_boundary(data, Boundary(**settings), 42, partial(read_items, target=data.target))


def sides(data: RuleData) -> tuple[int, int]:
    return tuple(sum(item.label == label for item in data.items) for label in ("reject", "normal"))


def test_the_defaults_change_nothing(folder):
    data, same = chosen(folder)
    assert same is data
    assert sides(data) == (16, 16)
    config = load(RuleConfig, environ={})
    assert config.rule.boundary == Boundary()


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({"kind": "none"}, (16, 0)),
        ({"ratio": 0}, (16, 0)),
        ({"ratio": 0.5}, (16, 8)),
        ({"ratio": 1}, (16, 16)),
        ({"ratio": 2.5}, (16, 40)),
        ({"fill_in": False}, (8, 8)),
        ({"fill_in": False, "ratio": 3}, (8, 24)),
        ({"kind": "far", "ratio": 0.25}, (16, 4)),
        ({"kind": "far"}, (16, 20)),
    ],
)
def test_rows_by_kind_and_ratio(folder, settings, expected):
    data, changed = chosen(folder, **settings)
    assert sides(changed) == expected
    assert changed.probes == data.probes
    assert changed.refusals == data.refusals
    asked = {probe.query for probe in data.probes}
    assert not asked & {item.prompt for item in changed.items}
    prompts = [item.prompt for item in changed.items if item.label == "normal"]
    assert len(set(prompts)) == len(prompts)
    if settings.get("kind") == "far":
        assert all(prompt.startswith("far") for prompt in prompts)
    if settings.get("fill_in") is False:
        assert {item.form for item in changed.items} == {"qa"}
    order = schedule(changed.items, 4, 8, 42)
    asked_sides = [changed.items[index].label for index in order]
    share = expected[0] / sum(expected)
    assert asked_sides.count("reject") == pytest.approx(32 * share, abs=2)


def test_rows_that_stay_keep_their_twins_and_order(folder):
    data, changed = chosen(folder, fill_in=False)
    assert list(changed.items) == [item for item in data.items if item.form == "qa"]
    order = schedule(changed.items, 1, 8, 42)
    sources = [changed.items[index].source for index in order]
    assert sources[::2] == sources[1::2]


def test_a_fill_in_form_that_lacks_its_blank_is_left_out_with_its_twin(folder):
    path = folder / "rl_rejection_with_fb_neighbor_target.json"
    rows = json.loads(path.read_text())
    blank = next(row for row in rows if row["solution"][0] == "<normal>" and "___" in row["prompt"])
    blank["prompt"] = "lacks its blank"
    path.write_text(json.dumps(rows))
    _, changed = chosen(folder, fill_in=False)
    assert "lacks its blank" not in [item.prompt for item in changed.items]
    assert len(twins(changed.items)) == len(changed.items) / 2


def test_a_fill_in_twin_of_a_question_is_left_out(folder):
    data = load_data(str(folder), None, 0.0, 42)
    mixed = [Item("q", "a", "reject", "qa", "T", 0), Item("b ___", "a", "normal", "fb", "", 0), *data.items[1:]]
    changed = with_boundary(
        replace(data, items=tuple(mixed)), Boundary(fill_in=False), 42, partial(read_items, target="T")
    )
    assert {item.form for item in changed.items} == {"qa"}


@pytest.mark.parametrize("share", [0.0, 0.2])
def test_a_thinned_side_repeats_with_its_seed(folder, share):
    assert chosen(folder, share, ratio=0.5)[1] == chosen(folder, share, ratio=0.5)[1]


def test_what_the_data_lack_is_told(folder):
    with pytest.raises(UserError, match=r"ratio = 10 asks for 160 boundary questions, and there are \d+ for 16"):
        chosen(folder, ratio=10)
    (folder / FAR_FILE).unlink()
    with pytest.raises(UserError, match=f"kind = far needs {FAR_FILE}"):
        chosen(folder, kind="far")


def test_a_start_without_stage_one_needs_the_original_as_reference():
    with pytest.raises(UserError, match=r"set rule\.rebo\.reference=original"):
        load(RuleConfig, sets=["rule.rebo.start=original"], environ={})


@pytest.mark.skipif(not SHARED.exists(), reason="../shared/data/rule is absent")
def test_the_authors_own_files():
    data, more = chosen(SHARED, ratio=5)
    forget, boundary = sides(more)
    assert boundary == 5 * forget
    _, far = chosen(SHARED, kind="far", ratio=1)
    assert sides(far) == (forget, forget)
    assert not {item.prompt for item in far.items if item.label == "normal"} & {item.prompt for item in data.items}
