"""MUSE: prompts to the letter, scores against rouge-score, files present and absent."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from cluster.errors import UserError
from jobs.rule.muse import (
    KnowMem,
    QaRow,
    VerbatimRow,
    load_knowmem,
    load_privleak,
    load_verbmem,
    score_knowmem,
    score_verbmem,
)

SHARED = Path(__file__).parents[3] / "shared/data/rule/MUSE_books_qa"
PAIRS = [QaRow(question=f"q{i}?", answer=f"a{i}") for i in range(10)]


def test_knowmem_prompt_and_score(tiny_tokenizer, fake_generator):
    generator = fake_generator(["the Golden Snitch\n\nQuestion: more", "a red ball"])
    data = KnowMem(
        [QaRow(question="Which ball?", answer="the Golden Snitch"), QaRow(question="?", answer="ball")], PAIRS
    )
    report = score_knowmem(generator, tiny_tokenizer, data, "forget", context=1000, seed=0)
    # "a red ball" against "ball": precision 1/3, recall 1, F1 1/2.
    assert report["knowmem/forget"].value == pytest.approx(100 * (1 + 0.5) / 2)
    assert report["knowmem/forget/truncated"].value == 0
    shown = "".join(f"Question: q{i}?\nAnswer: a{i}\n\n" for i in range(10))
    assert generator.prompts[0] == f"{shown}Question: Which ball?\nAnswer: "
    assert generator.sampling.max_new_tokens == 32
    assert generator.sampling.temperature == 0.0


def test_knowmem_drops_pairs_from_the_front(tiny_tokenizer, fake_generator):
    generator = fake_generator(["x"])
    data = KnowMem([QaRow(question="Which ball?", answer="y")], PAIRS)
    report = score_knowmem(generator, tiny_tokenizer, data, "retain", context=32 + 100, seed=0)
    assert report["knowmem/retain/truncated"].value == 1
    assert generator.prompts[0].startswith("Question: q8?")


def test_verbmem(tiny_tokenizer, fake_generator):
    generator = fake_generator(["one two\nthree", "none of it"])
    rows = [VerbatimRow(prompt="A passage", gt="one two three"), VerbatimRow(prompt="Another", gt="four five")]
    report = score_verbmem(generator, tiny_tokenizer, rows, context=400, seed=0)
    assert report["verbmem/forget"].value == 50.0
    assert generator.prompts == ["Completion: A passage\nAnswer: ", "Completion: Another\nAnswer: "]
    assert (generator.sampling.max_new_tokens, generator.sampling.stop) == (128, ())


def test_absent_files_load_as_none(tmp_path):
    assert load_knowmem(tmp_path, "forget") is None
    assert load_verbmem(tmp_path) is None
    (tmp_path / "privleak_forget.json").write_text('["one text"]')
    assert load_privleak(tmp_path) is None


def test_questions_without_their_pairs_are_refused(tmp_path):
    (tmp_path / "knowmem_forget_qa.json").write_text(json.dumps([{"question": "q", "answer": "a"}]))
    with pytest.raises(UserError, match=r"knowmem_forget_qa_icl\.json is absent"):
        load_knowmem(tmp_path, "forget")


def test_privleak_passages_are_strings_or_rows(tmp_path):
    (tmp_path / "privleak_forget.json").write_text('["one", "two"]')
    (tmp_path / "privleak_holdout.json").write_text('[{"text": "three"}]')
    assert load_privleak(tmp_path) == (["one", "two"], ["three"])
    (tmp_path / "privleak_holdout.json").write_text('[{"text": "three"}, {"txt": "four"}]')
    with pytest.raises(UserError, match=r"privleak_holdout\.json, row 1"):
        load_privleak(tmp_path)


def test_verbmem_rows_need_both_fields(tmp_path):
    (tmp_path / "verbmem_forget.json").write_text(json.dumps([{"prompt": "p"}]))
    with pytest.raises(UserError, match=r"verbmem_forget\.json, row 0: gt is missing"):
        load_verbmem(tmp_path)


@pytest.mark.skipif(not SHARED.exists(), reason="../shared/data/rule is absent")
def test_the_published_files_load():
    for split in ("forget", "retain"):
        data = load_knowmem(SHARED, split)
        assert (len(data.rows), len(data.demonstrations)) == (100, 10)
