"""ROUGE-L against the packages that the papers call, and by hand."""

import sys
from concurrent.futures import ThreadPoolExecutor

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rouge import Rouge
from rouge_score.rouge_scorer import RougeScorer

from jobs.scoring.rouge import rouge_l_f1, rouge_l_recall

WORDS = st.sampled_from(["the", "The", "king", "wrote", "Carrie,", "in", "1974", "U.S", "a", "caf\u00e9"])
TEXTS = st.lists(st.lists(WORDS, min_size=1, max_size=6).map(" ".join), min_size=1, max_size=3).map(". ".join)
ANYTHING = st.text(alphabet="ab. \n'", max_size=30)


@pytest.mark.parametrize(
    ("completion", "reference", "recall"),
    [
        ("Paris", "Paris", 1.0),
        ("It is Paris", "Paris", 1.0),
        ("It is Paris,", "Paris", 0.0),  # punctuation stays attached
        ("It is Paris.", "Paris", 1.0),  # a dot ends a sentence
        ("paris", "Paris", 0.0),  # case-sensitive
        ("the novel Carrie", "Carrie the novel", 2 / 3),
        ("the the the", "the the cat", 1 / 2),  # distinct words: {the} of {the, cat}
        ("w1 w2 w6 w7 w8. w1 w3 w8 w9 w5", "w1 w2 w3 w4 w5", 4 / 5),  # union over sentences, Lin 2004
        ("", "Paris", 0.0),
        ("...", "Paris", 0.0),
        ("Paris", "", 0.0),
        ("   ", "Paris. ", 0.0),
    ],
)
def test_recall_by_hand(completion, reference, recall):
    assert rouge_l_recall(completion, reference) == pytest.approx(recall)


def test_recall_is_the_mean_over_references():
    assert rouge_l_recall("Carrie", ["Carrie", "The Shining"]) == pytest.approx(0.5)
    assert rouge_l_recall("Carrie", ["Carrie", ""]) == pytest.approx(0.5)
    with pytest.raises(ValueError, match="at least one reference"):
        rouge_l_recall("Carrie", [])


@given(TEXTS, TEXTS)
def test_recall_equals_the_rouge_package(completion, reference):
    assert rouge_l_recall(completion, reference) == Rouge().get_scores(completion, reference)[0]["rouge-l"]["r"]


@given(TEXTS, TEXTS)
def test_f1_equals_the_rouge_score_package(completion, reference):
    peer = RougeScorer(["rougeL"], use_stemmer=False).score(reference, completion)["rougeL"].fmeasure
    assert rouge_l_f1(completion, reference) == peer


@given(ANYTHING, ANYTHING)
def test_scores_stay_in_range(completion, reference):
    assert 0.0 <= rouge_l_recall(completion, reference) <= 1.0
    assert 0.0 <= rouge_l_f1(completion, reference) <= 1.0


@given(TEXTS)
def test_a_text_recalls_itself(text):
    assert rouge_l_recall(text, text) == pytest.approx(1.0)
    assert rouge_l_f1(text, text) == pytest.approx(1.0)


@pytest.mark.parametrize(
    ("completion", "reference", "f1"),
    [
        ("Paris!", "paris", 1.0),  # lower-cased, punctuation dropped
        ("the cat sat", "the cat", 0.8),  # precision 2/3, recall 1
        ("running", "run", 0.0),  # no stemming
        ("", "Paris", 0.0),
        ("Paris", "", 0.0),
    ],
)
def test_f1_by_hand(completion, reference, f1):
    assert rouge_l_f1(completion, reference) == pytest.approx(f1)


def test_recall_of_a_text_longer_than_the_recursion_limit():
    limit = sys.getrecursionlimit()
    endless = " ".join(f"w{i}" for i in range(3 * limit))
    with pytest.raises(RecursionError):
        Rouge(metrics=["rouge-l"]).get_scores(endless, "w1 w2")
    with ThreadPoolExecutor(2) as pool:
        assert list(pool.map(lambda reference: rouge_l_recall(endless, reference), ["w1 w2", "w1 x"])) == [1.0, 0.5]
    assert sys.getrecursionlimit() == limit
