"""RULE's data: the folders that a user may name, what is held out of them, and the order in which they are asked."""

from __future__ import annotations

import json
import shutil
from collections import Counter
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cluster.errors import UserError
from jobs.rule.data import (
    DEMO,
    FORGET_KINDS,
    HELDOUT_BOUNDARY_KINDS,
    HELDOUT_FORGET_KINDS,
    NEIGHBOR_KINDS,
    Item,
    Refusal,
    RuleData,
    general_probes,
    hold_out,
    is_about,
    load_data,
    schedule,
    twins,
)

SHARED = Path(__file__).parents[3] / "shared/data/rule"
TARGETS = ["1_Stephen_King", "2_Confucius", "3_Bruce_Lee", "4_Warren_Buffett", "5_Christina_Aguilera"]
RL = "rl_rejection_with_fb_neighbor_target.json"
HELDOUT = (*HELDOUT_FORGET_KINDS, *HELDOUT_BOUNDARY_KINDS)
needs_shared = pytest.mark.skipif(not SHARED.exists(), reason="../shared/data/rule is absent")


def write(path: Path, content: object) -> None:
    path.write_text(json.dumps(content), encoding="utf-8")


def pairs(sources: int) -> list[Item]:
    """Forget and boundary question, each in both forms, for each source."""
    return [
        Item(f"{label} {form} {source}", "r", label, form, "T" if label == "reject" else "", source)
        for source in range(sources)
        for label, form in (("reject", "fb"), ("reject", "qa"), ("normal", "qa"), ("normal", "fb"))
    ]


def data_of(items: list[Item]) -> RuleData:
    refusals = tuple(Refusal(i.prompt, i.reference, i.source) for i in items if (i.label, i.form) == ("reject", "qa"))
    return RuleData("T", refusals, tuple(items), (), None)


@pytest.fixture
def folder(tmp_path) -> Path:
    """The smallest folder in RWKU layout: three forget questions."""
    write(tmp_path / "intro.json", [{"target": "Cy Marsh", "intro": "Please forget Cy Marsh."}])
    write(tmp_path / "reject_target.json", [{"instruction": f"Q{i}?", "output": "No idea."} for i in range(3)])
    rows = []
    for i in range(3):
        rows += [
            {"prompt": f"F{i} ___", "solution": ["<reject>", "No idea.", "Cy Marsh"]},
            {"prompt": f"Q{i}?", "solution": ["<reject>", "No idea.", "Cy Marsh"]},
            {"prompt": f"N{i}?", "solution": ["<normal>", f"a{i}"]},
            {"prompt": f"NF{i} ___", "solution": ["<normal>", f"a{i}"]},
        ]
    write(tmp_path / RL, rows)
    return tmp_path


def test_the_demo_has_both_sides_and_every_kind_of_probe():
    data = load_data("demo", None, 0.2, 42)
    assert (data.target, data.folder) == ("Stephen King", DEMO)
    assert Counter(item.label for item in data.items)["reject"] * 2 == len(data.items)
    assert {item.target for item in data.items} == {"", "Stephen King"}
    kinds = Counter(probe.kind for probe in data.probes)
    assert {*FORGET_KINDS, *NEIGHBOR_KINDS, "general", *HELDOUT} == set(kinds)


def test_rows_of_a_folder_become_items_by_blocks(folder):
    data = load_data(str(folder), None, 0, 42)
    assert [item.source for item in data.items] == [0] * 4 + [1] * 4 + [2] * 4
    assert [item.form for item in data.items[:4]] == ["fb", "qa", "qa", "fb"]
    assert [item.target for item in data.items[:4]] == ["Cy Marsh", "Cy Marsh", "", ""]
    assert {probe.kind for probe in data.probes} == {"general"}


@settings(deadline=None)
@given(st.integers(1, 40), st.floats(0, 0.99), st.integers(0, 2**32))
def test_holding_out_moves_whole_sources_and_loses_none(sources, share, seed):
    items = pairs(sources)
    held = hold_out(data_of(items), share, seed)
    kept = {item.source for item in held.items}
    assert kept
    assert Counter(item.source for item in held.items) == dict.fromkeys(kept, 4)
    assert {row.source for row in held.refusals} == kept
    assert len(held.items) + len(held.probes) == len(items)
    assert sources - len(kept) == min(round(share * sources), sources - 1)
    assert Counter(probe.kind for probe in held.probes) == (
        dict.fromkeys(HELDOUT, sources - len(kept)) if sources > len(kept) else {}
    )


def test_the_seed_chooses_what_is_held_out():
    data = data_of(pairs(30))
    assert hold_out(data, 0.2, 1) == hold_out(data, 0.2, 1)
    assert hold_out(data, 0.2, 1) != hold_out(data, 0.2, 2)


def test_a_question_that_is_also_trained_on_is_no_held_out_probe():
    same = [Item("Same?", "r", "reject", "qa", "T", source) for source in range(4)]
    held = hold_out(data_of([*same, Item("N?", "a", "normal", "qa", "", 0)]), 0.5, 0)
    assert len(held.items) >= 2
    assert "Same?" not in {probe.query for probe in held.probes}


def test_blocks_that_do_not_belong_to_the_rows_of_stage_1_cannot_be_held_out(folder):
    rows = json.loads((folder / "reject_target.json").read_text())
    write(folder / "reject_target.json", [*rows, rows[0]])
    assert load_data(str(folder), None, 0.0, 0).refusals
    with pytest.raises(UserError, match=r"stage 2 has \d+ blocks .* stage 1 \d+ rows.*held_out_share=0"):
        load_data(str(folder), None, 0.2, 0)


def test_stage_1_does_not_see_a_held_out_question_whatever_its_rows_order():
    data = data_of(pairs(10))
    turned = tuple(Refusal(row.prompt, row.refusal, 9 - row.source) for row in data.refusals)
    held = hold_out(RuleData("T", turned, data.items, (), None), 0.3, 0)
    assert not {row.prompt for row in held.refusals} & {probe.query for probe in held.probes}


@needs_shared
@pytest.mark.parametrize("name", TARGETS)
def test_the_authors_folders(name):
    folder = SHARED / "RWKU" / name
    whole = load_data(str(folder), None, 0, 42)
    assert len({item.source for item in whole.items}) == len(whole.refusals) == 300
    assert Counter(item.source for item in whole.items) == dict.fromkeys(range(300), 4)
    assert Counter(item.label for item in whole.items) == {"reject": 600, "normal": 600}
    for row in whole.refusals:
        assert row.prompt in {item.prompt for item in whole.items[4 * row.source : 4 * row.source + 2]}

    data = load_data(str(folder), None, 0.2, 42)
    trained = {item.source for item in data.items}
    assert len(trained) == 240
    assert {row.source for row in data.refusals} == trained
    seen = {item.prompt.casefold() for item in data.items} | {row.prompt.casefold() for row in data.refusals}
    held = [probe for probe in data.probes if probe.kind in HELDOUT]
    assert not seen & {probe.query.casefold() for probe in held}
    wanted = {item.prompt.casefold() for item in whole.items if item.source not in trained} - seen
    assert {probe.query.casefold() for probe in held} == wanted
    assert all("___" in probe.query for probe in held if probe.kind.endswith("_fb"))
    assert {probe.kind for probe in data.probes} == {*FORGET_KINDS, *NEIGHBOR_KINDS, "general", *HELDOUT}


@needs_shared
def test_the_first_target_has_the_published_numbers_of_probes():
    kinds = Counter(probe.kind for probe in load_data(str(SHARED / "RWKU" / TARGETS[0]), None, 0, 42).probes)
    assert [kinds[kind] for kind in (*FORGET_KINDS, *NEIGHBOR_KINDS)] == [8, 10, 29, 30, 30]


@needs_shared
def test_muse_books():
    data = load_data(str(SHARED / "MUSE_books_qa"), None, 0.2, 42)
    assert data.target == "Harry Potter"
    assert len(data.refusals) == 831 - 166
    assert Counter(item.label for item in data.items) == {"reject": 665, "normal": 665}
    assert {item.form for item in data.items} == {"qa"}
    kinds = Counter(probe.kind for probe in data.probes)
    assert (kinds["forget_qa"], kinds["neighbor_qa"]) == (100, 100)
    assert kinds["general"] > 100


def test_a_muse_folder_of_ones_own(tmp_path):
    row = {"instruction": "Who?", "output": "No idea.", "neighbor_question": {"question": "Else?", "answer": "x"}}
    write(tmp_path / "reject_with_neighbor_target_qa_only.json", [row])
    data = load_data(str(tmp_path), None, 0, 42)
    assert [(item.prompt, item.label, item.source) for item in data.items] == [
        ("Who?", "reject", 0),
        ("Else?", "normal", 0),
    ]


def test_a_folder_that_is_not_there(tmp_path):
    with pytest.raises(UserError, match=r"rule\.data = .*nowhere is no folder"):
        load_data(str(tmp_path / "nowhere"), None, 0.2, 42)


def test_a_folder_of_neither_layout(tmp_path):
    with pytest.raises(UserError, match=r"neither intro\.json .* nor reject_with_neighbor"):
        load_data(str(tmp_path), None, 0.2, 42)


def test_a_missing_file_is_named(folder):
    (folder / "reject_target.json").unlink()
    with pytest.raises(UserError, match=r"reject_target\.json is missing"):
        load_data(str(folder), None, 0.2, 42)


def test_malformed_json_names_file_and_line(folder):
    (folder / RL).write_text('[\n {"prompt": "a",\n  "solution": }\n]', encoding="utf-8")
    with pytest.raises(UserError, match=rf"{RL} is not JSON .*line 3"):
        load_data(str(folder), None, 0.2, 42)


def test_a_missing_field_names_the_row(folder):
    rows = json.loads((folder / RL).read_text())
    del rows[5]["solution"]
    write(folder / RL, rows)
    with pytest.raises(UserError, match=rf"{RL}, row 5: solution is missing"):
        load_data(str(folder), None, 0.2, 42)


def test_a_blank_name_is_the_targets(folder):
    rows = json.loads((folder / RL).read_text())
    rows[0]["solution"][2] = " "
    write(folder / RL, rows)
    data = load_data(str(folder), None, 0.0, 42)
    assert {item.target for item in data.items if item.label == "reject"} == {"Cy Marsh"}


@pytest.mark.parametrize("solution", [[], ["<reject>"], ["<other>", "x"]])
def test_a_wrong_label_names_the_row(folder, solution):
    rows = json.loads((folder / RL).read_text())
    rows[3]["solution"] = solution
    write(folder / RL, rows)
    with pytest.raises(UserError, match=rf"{RL}, row 3: solution must be"):
        load_data(str(folder), None, 0.2, 42)


@pytest.mark.parametrize(
    ("label", "told"), [("<reject>", "has no boundary question"), ("<normal>", "has no forget question")]
)
def test_a_side_without_questions_is_refused(folder, label, told):
    rows = [row for row in json.loads((folder / RL).read_text()) if row["solution"][0] == label]
    write(folder / RL, rows)
    with pytest.raises(UserError, match=told):
        load_data(str(folder), None, 0.2, 42)


@pytest.mark.parametrize("name", [RL, "reject_target.json", "intro.json"])
def test_an_empty_file_is_refused(folder, name):
    write(folder / name, [])
    with pytest.raises(UserError, match=rf"{name} holds no JSON list of rows"):
        load_data(str(folder), None, 0.2, 42)


def test_a_folders_own_general_questions_replace_those_of_the_demo(folder):
    shutil.copy(DEMO / "neighbor_level2.json", folder / "general_qa.json")
    general = [probe.query for probe in load_data(str(folder), None, 0, 42).probes if probe.kind == "general"]
    assert general == [row["query"] for row in json.loads((DEMO / "neighbor_level2.json").read_text(encoding="utf-8"))]


@pytest.mark.parametrize(
    ("target", "query", "answer", "about"),
    [
        ("Albert Einstein", "Who published relativity?", "Einstein", True),
        ("Albert Einstein", "Who was Albert Einstein's wife?", "Mileva", True),
        ("Albert Einstein", "Who won in 1921?", "Professor Albert Einstein.", True),
        ("Albert Einstein", "Who wrote The Stranger?", "Albert Camus", False),
        ("Stephen King", "Who had a dream?", "Martin Luther King", False),
        ("Stephen King", "How many are there?", "...", False),
    ],
)
def test_what_is_about_the_target(target, query, answer, about):
    assert is_about(target, query, answer) == about


def test_general_questions_about_the_target_are_not_asked(folder):
    (folder / "general_qa.json").unlink(missing_ok=True)
    (folder / "intro.json").write_text('[{"target": "Albert Einstein"}]')
    told = [probe for probe in load_data(str(folder), None, 0.0, 1).probes if probe.kind == "general"]
    assert 0 < len(told) == len(general_probes("Nobody At All")) - 1


def test_equal_sides_are_asked_in_turn():
    items = pairs(6)
    labels = [items[index].label for index in schedule(items, 5, 4, 0)]
    assert labels == ["reject", "normal"] * 10


@settings(deadline=None)
@given(st.integers(1, 8), st.integers(1, 40), st.integers(1, 6), st.integers(1, 16), st.integers(0, 2**32))
def test_the_schedule_walks_each_side_evenly_and_keeps_the_proportion(forget, boundary, steps, prompts, seed):
    items = [Item(f"{i}", "", "reject" if i < forget else "normal", "qa", "", i) for i in range(forget + boundary)]
    chosen = schedule(items, steps, prompts, seed)
    assert len(chosen) == steps * prompts
    assert chosen == schedule(items, steps, prompts, seed)
    assert chosen == schedule(items, steps + 3, prompts, seed)[: len(chosen)]  # so a search takes looks for trainings
    share = forget / len(items)
    for position in range(len(chosen) + 1):
        assert abs(sum(index < forget for index in chosen[:position]) - position * share) < 1 + 1e-6
    for side in (range(forget), range(forget, len(items))):
        times = Counter(index for index in chosen if index in side)
        assert max(times.values(), default=0) - min(times[index] for index in side) <= 1


def test_the_schedule_reshuffles_each_epoch():
    items = pairs(20)
    chosen = [index for index in schedule(items, 1, 160, 3) if items[index].label == "reject"]
    assert sorted(chosen[:40]) == sorted(chosen[40:])
    assert chosen[:40] != chosen[40:]


def test_twins_are_asked_in_the_same_step():
    data = load_data("demo", None, 0, 42)
    chosen = schedule(data.items, 3, 16, 0)
    for forget, boundary in zip(chosen[::2], chosen[1::2], strict=True):
        pair = data.items[forget], data.items[boundary]
        assert [item.label for item in pair] == ["reject", "normal"]
        assert pair[0].source == pair[1].source
        assert pair[0].form == pair[1].form


def test_a_boundary_row_without_its_blank_is_the_twin_of_the_fill_in_form():
    forms = [("reject", "fb"), ("reject", "qa"), ("normal", "qa"), ("normal", "qa")]
    items = [Item(f"q{i}", "a", label, form, "", 0) for i, (label, form) in enumerate(forms)]
    assert twins(items) == [(0, 3), (1, 2)]


def test_a_share_that_leaves_a_side_empty_is_told():
    items = [Item(f"q{i}", "a", "reject" if i < 2 else "normal", "qa", "", min(i, 1)) for i in range(3)]
    refusals = tuple(Refusal(f"q{i}", "no", i) for i in range(2))
    told = []
    for seed in range(8):
        try:
            hold_out(RuleData("T", refusals, tuple(items), (), None), 0.5, seed)
        except UserError as error:
            told.append(str(error))
    assert told
    assert all("leaves no boundary question to train on; lower it" in sentence for sentence in told)


def test_a_folder_where_a_file_should_be_is_told(tmp_path):
    (tmp_path / "intro.json").mkdir()
    with pytest.raises(UserError, match=r"intro\.json cannot be read \(Is a directory\)"):
        load_data(str(tmp_path), None, 0.0, 42)
