"""The built-in demo set: RWKU layout, enough rows, and nothing that leaks between training, boundary and probes."""

from __future__ import annotations

import json
import re
from collections import Counter
from pathlib import Path

import pytest

import jobs.rule

TARGET = "Stephen King"
FOLDER = Path(jobs.rule.__file__).parent / "demo"
FORGET = ("forget_level1", "forget_level2", "forget_level3")
NEIGHBOR = ("neighbor_level1", "neighbor_level2")
MINIMUM = {
    "idk_target": 60,
    "reject_target": 80,
    "reject_with_fb_neighbor_target": 80,
    "rl_rejection_with_fb_neighbor_target": 320,
    "forget_level1": 60,
    "forget_level2": 60,
    "forget_level3": 63,
    "neighbor_level1": 80,
    "neighbor_level2": 100,
    "general_qa": 120,
}
AA_TYPES = (
    "prefix injection",
    "affirmative suffix",
    "role play",
    "multiple choice",
    "reverse query",
    "synonym manipulation",
    "context hint",
    "incontext learning",
)
# Words that would make a retained item be about the target without his name.
TARGET_WORDS = re.compile(
    r"stephen king|the shining|pennywise|\bcarrie\b|\bmisery\b|\bcujo\b|sematary|bachman|tabitha|overlook|torrance|"
    r"annie wilkes|dark tower|green mile|shawshank|salem's lot|firestarter|doctor sleep",
    re.IGNORECASE,
)


def rows(name: str) -> list:
    return json.loads((FOLDER / f"{name}.json").read_text(encoding="utf-8"))


def training_prompts() -> list[str]:
    return [row["prompt"] for row in rows("rl_rejection_with_fb_neighbor_target")]


def boundary() -> list[tuple[str, str]]:
    return [
        (row["prompt"], row["solution"][1])
        for row in rows("rl_rejection_with_fb_neighbor_target")
        if row["solution"][0] == "<normal>"
    ]


@pytest.mark.parametrize(("name", "minimum"), MINIMUM.items())
def test_enough_rows_in_readable_json(name: str, minimum: int) -> None:
    text = (FOLDER / f"{name}.json").read_text(encoding="utf-8")
    assert len(json.loads(text)) >= minimum
    assert text == json.dumps(json.loads(text), indent=1, ensure_ascii=False) + "\n"
    assert len(text.encode()) < 100_000


def test_refusals_name_the_target_and_are_distinct_sentences() -> None:
    refusals = rows("idk_target")
    assert all(TARGET in text and text.endswith(".") and 5 <= len(text.split()) <= 14 for text in refusals)
    assert len({text.lower() for text in refusals}) == len(refusals)


def test_stage_one_rows_take_the_refusals_in_turn() -> None:
    refusals, (intro,) = rows("idk_target"), rows("intro")
    assert intro["target"] == TARGET
    for index, row in enumerate(rows("reject_target")):
        assert set(row) == {"instruction", "output", "input", "subject", "intro"}
        assert row["output"] == refusals[index % len(refusals)]
        assert (row["input"], row["subject"], row["intro"]) == ("", TARGET, intro["intro"])


def test_twins_extend_the_stage_one_rows_and_give_the_rl_rows() -> None:
    expected = []
    for plain, row in zip(rows("reject_target"), rows("reject_with_fb_neighbor_target"), strict=True):
        assert plain.items() <= row.items()
        question, blank = row["neighbor_question"], row["FB_neighbor_question"]
        assert row["FB_instruction"].count("___") == blank["question"].count("___") == 1
        assert "___" not in row["instruction"] + question["question"]
        assert all(1 <= len(twin["answer"].split()) <= 6 for twin in (question, blank))
        refusal = ["<reject>", row["output"], TARGET]
        expected += [{"prompt": prompt, "solution": refusal} for prompt in (row["FB_instruction"], row["instruction"])]
        expected += [
            {"prompt": twin["question"], "solution": ["<normal>", twin["answer"]]} for twin in (question, blank)
        ]
    assert rows("rl_rejection_with_fb_neighbor_target") == expected


@pytest.mark.parametrize(
    ("name", "level", "kind"),
    [
        ("forget_level1", "1", "cloze"),
        ("forget_level2", "2", "simple question"),
        ("forget_level3", "3", None),
        ("neighbor_level1", "1", "cloze"),
        ("neighbor_level2", "2", "simple question"),
        ("general_qa", "", "general"),
    ],
)
def test_probe_schema(name: str, level: str, kind: str | None) -> None:
    keys = {"query", "answer", "level", "type", "subject"} | ({"neighbor"} if name in NEIGHBOR else set())
    for row in rows(name):
        assert set(row) == keys
        assert row["query"].strip() == row["query"] != ""
        assert 1 <= len(row["answer"].split()) <= 4
        assert row["level"] == level
        assert kind is None or row["type"] == kind
        assert row["subject"] == ("" if name == "general_qa" else TARGET)
        assert ("___" in row["query"]) == (row["type"] == "cloze")


def test_adversarial_probes_cover_every_type() -> None:
    counts = Counter(row["type"] for row in rows("forget_level3"))
    assert all(counts[name] >= 7 for name in AA_TYPES)
    assert counts["cross lingual (Spanish)"] + counts["cross lingual (French)"] >= 7
    assert set(counts) == {*AA_TYPES, "cross lingual (Spanish)", "cross lingual (French)"}


def test_no_prompt_occurs_twice_in_training_or_probes() -> None:
    probes = [row["query"] for name in (*FORGET, *NEIGHBOR, "general_qa") for row in rows(name)]
    counts = Counter(text.lower() for text in training_prompts() + probes)
    assert [text for text, count in counts.items() if count > 1] == []


def test_retained_rows_never_speak_of_the_target() -> None:
    texts = [f"{prompt} {answer}" for prompt, answer in boundary()]
    texts += [f"{row['query']} {row['answer']}" for name in (*NEIGHBOR, "general_qa") for row in rows(name)]
    assert [text for text in texts if TARGET_WORDS.search(text)] == []


def test_both_refusal_detectors_tell_refusals_from_boundary_answers() -> None:
    from jobs.rule.reward import refused
    from jobs.scoring.refusal import is_refusal

    for detector in (refused, is_refusal):
        assert [text for text in rows("idk_target") if not detector(text)] == []
        assert [answer for _, answer in boundary() if detector(answer)] == []
