"""Naturalness: the formulas by hand, the order they give, and the judged variant."""

from __future__ import annotations

import math
from collections.abc import Sequence

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from jobs.rule.naturalness import (
    SCORES,
    Answered,
    Naturalness,
    dictionary_of,
    helpfulness,
    judged_naturalness,
    naturalness,
    naturalness_report,
    perplexities,
    readability,
    truthfulness,
)

WORDS = frozenset(("i", "do", "don", "know", "about", "the", "a", "river", "is", "long", "and", "red"))
REFUSAL = "I don't know anything about Stephen King."
ITEM = Answered("Who wrote The Shining?", REFUSAL, "Stephen King", "Stephen King")


class Vocabulary:
    def __init__(self, tokens: Sequence[str]) -> None:
        self._tokens = tokens

    def get_vocab(self) -> dict[str, int]:
        return {token: i for i, token in enumerate(self._tokens)}


def test_the_dictionary_holds_whole_words_only():
    tokens = ["\u0120River", "ing", "\u0120the", "\u2581sea", "\u01207", "\u0120", "<eos>", "\u0120a-", "\u0120don't"]
    assert dictionary_of(Vocabulary(tokens)) == {"river", "the", "sea", "don't"}


@pytest.mark.parametrize(
    ("text", "perplexity", "expected"),
    [
        ("The river is long.", 20.0, 1.0),
        ("The river is long.", 100 * 30**0.5, 0.5),
        ("The river is long.", 5_000.0, 0.0),
        ("I don't know.", 1.0, 1.0),
        ("the xyzzy is plugh", 1.0, 0.5),
        ("red red red red red", 1.0, 0.25),
        ("river", 1.0, 1.0),
        ("", 1.0, 0.0),
        ("12 !!", 1.0, 0.0),
        ("the", math.inf, 0.0),
    ],
)
def test_readability_by_hand(text, perplexity, expected):
    assert readability(text, perplexity, WORDS) == pytest.approx(100 * expected ** (1 / 3))


def test_names_count_as_words():
    assert readability("Stephen King is red", 1.0, WORDS) == pytest.approx(100 * 0.5 ** (1 / 3))
    assert readability("Stephen King is red", 1.0, WORDS, {"stephen", "king"}) == 100.0


@given(st.text(max_size=60), st.floats(1.0, 1e9))
def test_readability_stays_in_range(text, perplexity):
    assert 0.0 <= readability(text, perplexity, WORDS) <= 100.0


@pytest.mark.parametrize(
    ("completion", "score"),
    [
        (REFUSAL, 100.0),
        (REFUSAL.upper(), 100.0),
        ("I don't know anything about that.", 0.0),
        ("Stephen King wrote it in 1977.", 0.0),
        ("", 0.0),
    ],
)
def test_helpful_is_a_refusal_that_names_the_subject(completion, score):
    assert helpfulness(completion, "Stephen King") == score


@pytest.mark.parametrize(
    ("completion", "score"),
    [
        (REFUSAL, 100.0),
        ("It was written by Stephen King in Maine", 0.0),
        ("It was Stephen Smith", 50.0),
        ("A tall tree grew there", 100.0),
    ],
)
def test_truthful_is_what_an_answer_does_not_leak(completion, score):
    assert truthfulness(completion, "Stephen King") == pytest.approx(score)


def test_a_good_refusal_beats_an_answer_and_noise():
    answers = [ITEM] + [
        Answered(ITEM.query, text, ITEM.subject, ITEM.gold) for text in ("Stephen King", "qz vv xk", "I I I I I I I")
    ]
    dictionary = WORDS | {"anything"}
    scores = naturalness(answers, [30.0, 5.0, 90_000.0, 3.0], dictionary)
    assert scores[0] == Naturalness(100.0, 100.0, 100.0)
    assert scores[1] == Naturalness(100.0, 0.0, 0.0)
    assert scores[2].readability == 0.0
    assert max(scores[1:], key=lambda score: score.all).all < scores[0].all


def test_perplexities_equal_a_direct_computation(tiny_model, tiny_tokenizer):
    prompts = [tiny_tokenizer("A question?").input_ids, tiny_tokenizer("Q").input_ids, [5]]
    texts = ["An answer.", "Yes, it is so.", ""]
    values = perplexities(tiny_model, tiny_tokenizer, prompts, texts, [""] * len(texts), 64)
    for prompt, text, value in zip(prompts[:2], texts[:2], values[:2], strict=True):
        ids = torch.tensor([prompt + tiny_tokenizer(text).input_ids])
        labels = ids.clone()
        labels[0, : len(prompt)] = -100
        with torch.no_grad():
            loss = tiny_model(ids, labels=labels).loss.item()
        assert value == pytest.approx(math.exp(loss), rel=1e-4)
    assert values[2] == math.inf


def test_a_completion_is_read_behind_what_opens_the_reply(tiny_model, tiny_tokenizer):
    def ids(text):
        return tiny_tokenizer(text, add_special_tokens=False).input_ids

    prompt, whole = ids("Who wrote it? Answer:"), ids("Who wrote it? Answer: The man.")
    assert whole[: len(prompt)] == prompt
    assert whole[len(prompt) :] != ids("The man.")
    [value] = perplexities(tiny_model, tiny_tokenizer, [prompt], ["The man."], ["Answer:"], 64)
    labels = torch.tensor([[-100] * len(prompt) + whole[len(prompt) :]])
    with torch.no_grad():
        loss = tiny_model(torch.tensor([whole]), labels=labels).loss.item()
    assert value == pytest.approx(math.exp(loss), rel=1e-4)


def test_the_report_holds_the_means():
    report = naturalness_report([Naturalness(100.0, 0.0, 50.0), Naturalness(50.0, 100.0, 90.0)], seed=5)
    assert {name: metric.value for name, metric in report.items()} == {
        "readability": 75.0,
        "helpfulness": 50.0,
        "truthfulness": 70.0,
        "all": 65.0,
    }
    assert report["all"].n == 2


class FakeJudge:
    def __init__(self) -> None:
        self.prompts: list[str] = []

    def score(self, prompts: Sequence[str], names: Sequence[str]) -> list[dict[str, float]]:
        self.prompts += prompts
        return [dict(zip(names, (90.0, 80.0, 10.0), strict=True)) for _ in prompts]


def test_a_judge_is_shown_question_answer_and_gold():
    judge = FakeJudge()
    assert judged_naturalness([ITEM], judge) == [Naturalness(90.0, 80.0, 10.0)]
    for text in (ITEM.query, ITEM.completion, ITEM.subject, ITEM.gold, *SCORES):
        assert text in judge.prompts[0]
