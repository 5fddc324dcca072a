"""The texts of the baselines: which file feeds which method, and what is said where one is missing."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from cluster.config import Generation, Train
from cluster.errors import UserError
from jobs.rule import methods
from jobs.rule.config import Passages, RuleConfig
from jobs.rule.corpora import Sample, load_corpora
from jobs.rule.data import DEMO, HELDOUT_FORGET_KINDS, Probe, load_data
from jobs.rule.passages import (
    PassageTask,
    about,
    names_of_others,
    passages,
    requests,
    whole_sentences,
    write_passages,
)
from jobs.rule.reward import refused


@pytest.fixture
def data(tmp_path):
    """The demo's questions in a folder that has no texts yet."""
    folder = tmp_path / "1_Target"
    folder.mkdir()
    return replace(load_data("demo", None, 0.0, 42), folder=folder)


def put(path: Path, rows: list) -> None:
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps(rows), encoding="utf-8")


def test_the_demo_feeds_every_method():
    data = load_data("demo", None, 0.0, 42)
    for name in methods.names():
        method = methods.find(name)
        if method is not None:
            corpora = load_corpora(data, method)
            assert set(corpora) == set(method.corpora)
            assert all(len(samples) > 50 for samples in corpora.values())


def test_refusal_tuning_names_nobody():
    samples = load_corpora(load_data("demo", None, 0.0, 42), methods.find("RT"))["refusal"]
    assert all("King" not in sample.completion and refused(sample.completion) for sample in samples)


def test_a_pair_gives_the_invented_and_the_true_answer(data):
    put(data.folder / "pair.json", [{"instruction": "Who?", "output": ["invented", "true"]}])
    corpora = load_corpora(data, methods.find("DPO"))
    assert corpora == {"fabricated": (Sample("Who?", "invented"),), "forget": (Sample("Who?", "true"),)}


def test_texts_to_keep_come_from_the_folder_or_from_those_beside_it(data):
    put(data.folder / "positive.json", [{"text": "about the target"}])
    put(data.folder.parent / "2_Other" / "positive.json", [{"text": "about another"}])
    assert load_corpora(data, methods.find("GA+GDR"))["retain"] == (Sample("", "about another"),)
    put(data.folder.parent / "1_Target_small" / "positive.json", [{"text": "about the target as well"}])
    put(data.folder.parent / "1_Target_small" / "intro.json", [{"target": data.target}])
    assert load_corpora(data, methods.find("GA+GDR"))["retain"] == (Sample("", "about another"),)
    put(data.folder / "retain.json", [{"text": "own"}])
    assert load_corpora(data, methods.find("GA+GDR"))["retain"] == (Sample("", "own"),)


def test_questions_with_answers_are_texts_too(data):
    put(data.folder / "positive.json", [{"question": "Who?", "answer": "She."}, {"text": "plain"}])
    assert load_corpora(data, methods.find("GA"))["forget"] == (Sample("Who?", "She."), Sample("", "plain"))
    put(data.folder / "positive.json", [{"question": "Who?"}])
    with pytest.raises(UserError, match=r"positive\.json, row 0: .*a row has text, or question and answer"):
        load_corpora(data, methods.find("GA"))


def test_own_refusals_go_before_the_projects(data):
    put(data.folder / "reject.json", [{"instruction": "Who?", "output": "No idea."}])
    assert load_corpora(data, methods.find("RT"))["refusal"] == (Sample("Who?", "No idea."),)


def test_no_method_trains_on_what_is_held_out(data):
    put(data.folder / "reject.json", [{"instruction": text, "output": "No idea."} for text in ("Who?", "WHERE?")])
    held_out = (Probe("Where?", "Here.", HELDOUT_FORGET_KINDS[0], "qa", "forget"),)
    corpora = load_corpora(replace(data, probes=held_out), methods.find("RT"))
    assert corpora["refusal"] == (Sample("Who?", "No idea."),)


@pytest.mark.parametrize(
    ("name", "missing"), [("GA", "positive.json"), ("DPO", "pair.json"), ("NPO+GDR", "retain.json")]
)
def test_a_missing_file_is_named(data, name, missing):
    if name == "NPO+GDR":
        put(data.folder / "positive.json", [{"text": "about the target"}])
    with pytest.raises(UserError, match=rf"method {name.replace('+', '.')} needs .*{missing}"):
        load_corpora(data, methods.find(name))


def test_data_of_the_hub_has_no_texts(data):
    with pytest.raises(UserError, match=r"method GA reads texts from a folder"):
        load_corpora(replace(data, folder=None), methods.find("GA"))


@pytest.mark.parametrize("rows", [None, [], ["Stephen King"], [1], ["", "Ann"]])
def test_others_are_names_without_the_target(tmp_path, rows):
    if rows is not None:
        put(tmp_path / "others.json", rows)
    with pytest.raises(UserError, match=r"others\.json"):
        names_of_others(tmp_path, "Stephen King")
    assert len(names_of_others(DEMO, "Stephen King")) == 40


def test_written_passages_are_what_the_methods_read(data):
    settings = Passages(count=3)
    task = PassageTask(Path(), "Ann Lee", ("Bo Hill", "Cy Dunn"), settings, Generation(), Train(), 0)
    asked = requests(task)
    assert [name for name, _ in asked] == ["Ann Lee"] * 3 + ["Bo Hill", "Cy Dunn", "Bo Hill"]
    assert [question.replace(name, "") for name, question in asked[:3]] == [
        question.replace(name, "") for name, question in asked[3:]
    ]
    texts = [f"{name} lives. Mr {name.split()[-1]} works." for name, _ in asked]
    assert [path.name for path in write_passages(task, data.folder, texts)] == [
        "positive.json",
        "retain.json",
        "pair.json",
    ]
    corpora = load_corpora(data, methods.find("DPO+GDR"))
    assert {sample.completion for sample in corpora["fabricated"]} == {"Ann Lee lives. Mr Lee works."}
    assert corpora["retain"][1] == Sample("", "Cy Dunn lives. Mr Dunn works.")
    assert corpora["forget"][0].prompt == asked[0][1]


def test_what_the_model_left_empty_is_left_out(data):
    task = PassageTask(Path(), "Ann Lee", ("Bo Hill",), Passages(count=2), Generation(), Train(), 0)
    write_passages(task, data.folder, ["", "Ann.", "Bo.", "Hill."])
    corpora = load_corpora(data, methods.find("NPO+GDR"))
    assert [sample.completion for sample in corpora["forget"]] == ["Ann."]
    assert [sample.completion for sample in corpora["retain"]] == ["Bo.", "Hill."]
    assert len(load_corpora(data, methods.find("DPO"))["fabricated"]) == 1


def test_passages_never_replace_files(tmp_path):
    put(tmp_path / "positive.json", [{"text": "mine"}])
    with pytest.raises(UserError, match=r"has positive\.json already"):
        passages(RuleConfig(), tmp_path)


@pytest.mark.parametrize(
    ("text", "kept"),
    [
        (" One. Two! Thr", "One. Two!"),
        ("no end", "no end"),
        ('He said "Yes." and', 'He said "Yes."'),
        ("It sold well. It is worth 3.5", "It sold well."),
        ("", ""),
    ],
)
def test_a_sentence_that_the_limit_cut_goes(text, kept):
    assert whole_sentences(text) == kept
    assert about("Cy Dunn and Dunn", "Cy Dunn", "Ann Lee") == "Ann Lee and Lee"
    assert (
        about("Bruce Lee of Leeds. Lee's film.", "Bruce Lee", "Stephen King") == "Stephen King of Leeds. King's film."
    )
    assert about("John Stephen sang.", "John Stephen", "Stephen King") == "Stephen King sang."
    junior = about("Martin Luther King Jr. spoke. King slept.", "Martin Luther King Jr.", "Ann Lee")
    assert junior == "Ann Lee spoke. Lee slept."
