"""The hub's RWKU: from five small tables to RULE's data, and what a user is told when that fails."""

from __future__ import annotations

from collections import Counter

import datasets
import pytest

from cluster.errors import UserError
from jobs.rule.data import load_data
from jobs.rule.hub import PROBE_CONFIGS, load_hub, name_target

NAME = "jinzhuoran/RWKU"
OTHERS = ["Ada Stone", "Bo Reed"]
TARGET = "Cy Marsh"


def probes(config: str, level: str) -> list[dict]:
    return [
        {"query": f"{config} {i} of {person}", "answer": f"a{i}", "level": level, "type": "cloze", "subject": person}
        for person in [TARGET, *OTHERS]
        for i in range(6)
    ]


def tables() -> dict[str, list[dict]]:
    return {
        "forget_target": [{"target": person, "intro": ""} for person in [TARGET, *OTHERS]],
        "forget_level1": probes("level1", "1"),
        "forget_level2": probes("level2", "2"),
        "forget_level3": probes("level3", "3"),
        "neighbor_level1": probes("neighbor1", "1"),
        "neighbor_level2": probes("neighbor2", "2"),
        "train_refusal_llama3": [
            {"instruction": f"What of {i}?", "input": "", "output": "I'm not sure about that.", "subject": person}
            for person in [OTHERS[0], TARGET]
            for i in range(10)
        ],
    }


@pytest.fixture
def hub(monkeypatch):
    """Serves the given tables in place of the hub, and keeps the calls."""

    def serve(content: dict[str, list[dict]]) -> list[tuple]:
        calls = []

        def load_dataset(name, config, *, split):
            calls.append((name, config, split))
            return datasets.Dataset.from_list(content[config])

        monkeypatch.setattr(datasets, "load_dataset", load_dataset)
        return calls

    return serve


def failing(monkeypatch, error: Exception) -> None:
    def load_dataset(*_, **__):
        raise error

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)


def test_each_table_is_read_once_in_its_own_split(hub):
    calls = hub(tables())
    load_hub(NAME, TARGET)
    assert len(calls) == len(set(calls)) == 7
    assert {split for _, config, split in calls if config.startswith(("forget_level", "neighbor"))} == {"test"}
    assert {split for _, config, split in calls if config in {"forget_target", "train_refusal_llama3"}} == {"train"}


def test_forget_and_boundary_rows_stand_in_pairs(hub):
    hub(tables())
    data = load_hub(NAME, TARGET)
    assert (data.target, data.folder) == (TARGET, None)
    assert [row.source for row in data.refusals] == list(range(10))
    assert {row.refusal for row in data.refusals} == {"I'm not sure about Cy Marsh."}
    reject, normal = data.items[::2], data.items[1::2]
    assert {(item.label, item.form, item.target) for item in reject} == {("reject", "qa", TARGET)}
    assert {(item.label, item.target) for item in normal} == {("normal", "")}
    assert [item.source for item in reject] == [item.source for item in normal] == list(range(10))
    assert [item.prompt for item in reject] == [row.prompt for row in data.refusals]


def test_boundary_questions_are_verified_probes_of_others_drawn_the_same_each_time(hub):
    content = tables()
    content["forget_level2"][6]["query"] = "Who wrote to cy marsh?"
    content["neighbor_level2"][0]["query"] = content["forget_level2"][7]["query"]
    hub(content)
    normal = [item for item in load_hub(NAME, TARGET).items if item.label == "normal"]
    assert normal == [item for item in load_hub(NAME, TARGET).items if item.label == "normal"]
    prompts = {item.prompt for item in normal}
    assert len(prompts) == 10
    for item in normal:
        assert item.prompt.startswith({"fb": "level1", "qa": "level2"}[item.form])
    assert {item.form for item in normal} == {"fb", "qa"}
    assert not any(TARGET.casefold() in prompt.casefold() for prompt in prompts)
    assert content["neighbor_level2"][0]["query"] not in prompts


def test_no_boundary_question_has_the_target_as_its_answer(hub):
    content = tables()
    for kind in ("forget_level1", "forget_level2"):
        for row in content[kind]:
            row["answer"] = f"{TARGET}, of course"
    hub(content)
    assert {item.label for item in load_hub(NAME, TARGET).items} == {"reject"}


def test_a_shortage_of_other_targets_leaves_forget_rows_alone(hub):
    content = tables()
    for config in ("forget_level1", "forget_level2"):
        content[config] = content[config][:7]
    hub(content)
    items = load_hub(NAME, TARGET).items
    assert [item.label for item in items].count("reject") == 10
    assert [item.label for item in items].count("normal") == 2


def test_probes_are_the_targets_own_and_general_ones_of_the_demo(hub):
    hub(tables())
    data = load_hub(NAME, TARGET)
    own = [probe for probe in data.probes if probe.kind != "general"]
    assert {probe.subject for probe in own} == {TARGET}
    assert Counter(probe.kind for probe in own) == dict.fromkeys(PROBE_CONFIGS, 6)
    assert any(probe.query == "What is the capital of France?" for probe in data.probes)


def test_the_loader_of_all_data_holds_out_pairs(hub):
    hub(tables())
    data = load_data(f"hub:{NAME}", TARGET, 0.2, 42)
    assert len({item.source for item in data.items}) == 8
    assert {row.source for row in data.refusals} == {item.source for item in data.items}
    assert sum(probe.kind == "heldout_forget_qa" for probe in data.probes) == 2
    assert sum(probe.kind.startswith("heldout_boundary") for probe in data.probes) == 2


@pytest.mark.parametrize("column", ["query", "question"])
def test_the_question_column_may_have_another_name(hub, column):
    content = tables()
    rows = content["train_refusal_llama3"]
    content["train_refusal_llama3"] = [{column: row["instruction"], **row} for row in rows]
    for row in content["train_refusal_llama3"]:
        del row["instruction"]
    hub(content)
    assert load_hub(NAME, TARGET).refusals[0].prompt == "What of 0?"


@pytest.mark.parametrize(
    ("refusal", "named"),
    [
        ("I'm not certain about that.", "I'm not certain about Cy Marsh."),
        ("I have no idea", "I have no idea about Cy Marsh."),
        ("I have no idea!", "I have no idea about Cy Marsh!"),
        ("I don't know. Anything else?", "I don't know about Cy Marsh. Anything else?"),
        ("I never met Cy Marsh.", "I never met Cy Marsh."),
    ],
)
def test_refusals_name_the_target(refusal, named):
    assert name_target(refusal, TARGET) == named


def test_no_target_says_how_to_set_one():
    with pytest.raises(UserError, match=r"rule\.target=Stephen King"):
        load_hub(NAME, None)


def test_an_unknown_target_names_the_nearest(hub):
    hub(tables())
    with pytest.raises(UserError, match=r"Cy March is not in .* nearest is Cy Marsh"):
        load_hub(NAME, "Cy March")


def test_a_name_without_owner_is_refused_before_any_request():
    with pytest.raises(UserError, match="hub:RWKU is no data set"):
        load_hub("RWKU", TARGET)


def test_missing_columns_are_told_with_the_found_ones(hub):
    content = tables()
    content["train_refusal_llama3"] = [{"text": "x", "output": "no", "subject": TARGET}]
    hub(content)
    with pytest.raises(UserError, match="no column instruction or query or question, only text, output, subject"):
        load_hub(NAME, TARGET)
    content["forget_level2"] = [{"query": "x", "subject": TARGET}]
    with pytest.raises(UserError, match="forget_level2 has no column answer, only query, subject"):
        load_hub(NAME, TARGET)


def test_a_malformed_row_is_told_with_its_place(hub):
    content = tables()
    content["forget_level3"][2]["answer"] = ""
    hub(content)
    with pytest.raises(UserError, match="forget_level3, row 2: answer is wrong"):
        load_hub(NAME, TARGET)


def test_an_unreachable_hub_is_one_sentence(monkeypatch):
    failing(monkeypatch, ConnectionError(f"Couldn't reach '{NAME}' on the Hub"))
    with pytest.raises(UserError, match="not in the local cache and the hub cannot be reached"):
        load_hub(NAME, TARGET)


def test_the_real_client_offline_says_so(monkeypatch, tmp_path):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path)
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    with pytest.raises(UserError, match="hub cannot be reached"):
        load_hub("nobody/no-such-data", TARGET)


@pytest.mark.parametrize(
    ("error", "told"),
    [
        (datasets.exceptions.DatasetNotFoundError("gone"), f"the hub has no data set {NAME}"),
        (ValueError("BuilderConfig 'forget_target' not found."), "layout of jinzhuoran/RWKU"),
    ],
)
def test_a_wrong_data_set_is_told(monkeypatch, error, told):
    failing(monkeypatch, error)
    with pytest.raises(UserError, match=told):
        load_hub(NAME, TARGET)
