"""ROUGE-L as the papers' own packages compute it: recall (`rouge`), F1 and stemmed recall (`rouge-score`)."""

from __future__ import annotations

import sys
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rouge_score.rouge_scorer import RougeScorer

_recursion_lock = threading.Lock()


def rouge_l_recall(completion: str, references: str | Sequence[str]) -> float:
    """Summary-level ROUGE-L recall of `completion`, mean over the references.

    The `rouge` package splits sentences at every ".", compares case-sensitively with punctuation attached, and counts
    distinct words. A text without a word (empty, or blanks and dots) scores 0.0; the package fails on it, or counts
    the blanks between dots as words.

    Args:
        completion: the text that is judged.
        references: one reference or several, at least one.
    Returns: recall in [0, 1].
    Raises: ValueError for an empty sequence of references.
    Source: RULE, reward and RWKU, metrics.
    """
    references = [references] if isinstance(references, str) else list(references)
    if not references:
        raise ValueError("ROUGE-L recall needs at least one reference, got none.")
    return sum(_recall(completion, reference) for reference in references) / len(references)


def rouge_l_f1(completion: str, reference: str) -> float:
    """Sentence-level ROUGE-L F1 on lower-cased alphanumeric tokens, without stemming; 0.0 for empty text.

    Args:
        completion: the text that is judged.
        reference: the text it should match.
    Returns: F1 in [0, 1].
    Source: MUSE, metrics (VerbMem, KnowMem).
    """
    return float(_scorer().score(reference, completion)["rougeL"].fmeasure)


def stemmed_rouge_l_recall(completion: str, reference: str) -> float:
    """Sentence-level ROUGE-L recall on lower-cased, stemmed alphanumeric tokens, in [0, 1]; 0.0 for empty text.

    Source: TOFU, section 2.2.1 (its evaluation uses `rouge-score` with the stemmer).
    """
    return float(_scorer(stemmed=True).score(reference, completion)["rougeL"].recall)


def _recall(completion: str, reference: str) -> float:
    from rouge import Rouge

    if not _has_word(completion) or not _has_word(reference):
        return 0.0
    with _recursion_for(len(completion.split()) + len(reference.split())):
        return float(Rouge(metrics=["rouge-l"], stats=["r"]).get_scores(completion, reference)[0]["rouge-l"]["r"])


def _has_word(text: str) -> bool:
    return bool(text.replace(".", " ").split())


@contextmanager
def _recursion_for(words: int) -> Iterator[None]:
    """Room for the package's traceback of a longest common subsequence, which recurses once a word."""
    with _recursion_lock:
        limit = sys.getrecursionlimit()
        sys.setrecursionlimit(limit + words + 100)
        try:
            yield
        finally:
            sys.setrecursionlimit(limit)


@cache
def _scorer(stemmed: bool = False) -> RougeScorer:
    from rouge_score.rouge_scorer import RougeScorer

    return RougeScorer(["rougeL"], use_stemmer=stemmed)
