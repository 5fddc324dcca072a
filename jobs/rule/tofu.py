"""TOFU's measures: probability, ROUGE-L, truth ratio, model utility, forget quality; with what memorisation they miss.

Questions are asked in the chat template; scores are in [0, 1]; probabilities count the end token, as in TOFU's code.
Source: Maini et al. 2024, TOFU, section 2.2; exact memorisation: Tirumala et al. 2022; extraction strength: Carlini et
al. 2021 as Wang et al. 2025 use it for unlearning.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import numpy as np
from pydantic import Field

from cluster.generation import Generator
from cluster.models import answered_ids, chat_ids, context_length, end_of_turn
from cluster.report import Metric
from jobs.rule.rows import Row, Text, greedy_texts, load_rows
from jobs.scoring.intervals import mean_interval, statistic_interval
from jobs.scoring.rouge import stemmed_rouge_l_recall

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

FILES = {
    "forget": "forget_perturbed.json",
    "retain": "retain_perturbed.json",
    "real_authors": "real_authors_perturbed.json",
    "world_facts": "world_facts_perturbed.json",
}
# Sets whose probability is a share among the answers offered: nothing was trained on their wording.
CHOICES = ("real_authors", "world_facts")
UTILITY = ("retain", "real_authors", "world_facts")
ANSWER_TOKENS = 200
FORGET_QUALITY, MODEL_UTILITY = "tofu/forget_quality", "tofu/model_utility"


class TofuRow(Row):
    """A question with its answer, that answer in other words where there is one, and wrong answers in its form."""

    question: Text
    answer: Text
    paraphrased_answer: Text | None = None
    perturbed_answer: Annotated[list[Text], Field(min_length=1)]


@dataclass(frozen=True)
class Scored:
    """One set: arrays (n,) of length-normalised probability, ROUGE-L recall and truth ratio."""

    probability: np.ndarray
    recall: np.ndarray
    truth_ratio: np.ndarray


def load_tofu(folder: Path) -> dict[str, list[TofuRow]] | None:
    """Rows of every file of FILES that is there, by set; None where none is."""
    found = {name: load_rows(folder / file, TofuRow) for name, file in FILES.items()}
    return {name: rows for name, rows in found.items() if rows is not None} or None


def score_tofu(
    model: PreTrainedModel,
    engine: Generator,
    tokenizer: PreTrainedTokenizerBase,
    data: dict[str, list[TofuRow]],
    *,
    max_batch_tokens: int,
    seed: int,
    stop: tuple[str, ...] = (),
) -> tuple[dict[str, Metric], list[float]]:
    """`tofu/SET/probability`, `rouge_l_recall`, `truth_ratio`; `tofu/model_utility` where its three sets are there.

    On the forget set also `tofu/exact_memorization` and `tofu/extraction_strength` (lower is better). The truth ratio
    R is reported so that 1 is best: max(0, 1 - R) on sets to keep, min(R, 1 / R) on the forget set. `stop` ends an
    answer, beside the end token.

    Returns: the metrics, and the truth ratios of the forget set, which `forget_quality` compares.
    """
    metrics: dict[str, Metric] = {}
    sets = {name: _scored(model, engine, tokenizer, rows, name, max_batch_tokens, stop) for name, rows in data.items()}
    for name, scored in sets.items():
        ratio = scored.truth_ratio
        best = np.minimum(ratio, 1 / ratio) if name == "forget" else np.maximum(0, 1 - ratio)
        for measure, values in (
            ("probability", scored.probability),
            ("rouge_l_recall", scored.recall),
            ("truth_ratio", best),
        ):
            metrics[f"tofu/{name}/{measure}"] = mean_interval(values, seed, bounds=(0.0, 1.0))
    if all(name in sets for name in UTILITY):
        samples = [
            np.stack([s.probability, s.recall, np.maximum(0, 1 - s.truth_ratio)], axis=1)
            for s in (sets[name] for name in UTILITY)
        ]
        metrics[MODEL_UTILITY] = statistic_interval(model_utility, samples, seed, bounds=(0.0, 1.0))
    if "forget" not in data:
        return metrics, []
    matches = _matches(model, tokenizer, data["forget"], max_batch_tokens)
    memorised = {
        "exact_memorization": [float(match.mean()) for match in matches],
        "extraction_strength": [extraction_strength(match) for match in matches],
    }
    metrics |= {f"tofu/{name}": mean_interval(values, seed, bounds=(0.0, 1.0)) for name, values in memorised.items()}
    return metrics, sets["forget"].truth_ratio.tolist()


def truth_ratio(perturbed: Sequence[float], paraphrased: float) -> float:
    """Mean probability of wrong answers over that of the right one in other words (TOFU, equation 1).

    The mean is geometric, as in TOFU's code and in open-unlearning, whose figures are what others compare with; the
    equation has an arithmetic one.

    Args: mean log-probabilities a token, in nats, so that e to their power is P(a | q)^(1 / |a|).
    Returns: the ratio, kept within e^-50 and e^50: a collapsed model gives answers no probability at all.
    """
    return float(np.exp(np.clip(np.mean(perturbed) - paraphrased, -50, 50)))


def model_utility(*sets: np.ndarray) -> float:
    """Harmonic mean of every column's mean; each set is (n, 3): probability, recall, max(0, 1 - truth ratio)."""
    means = np.concatenate([part.mean(axis=0) for part in sets])
    return 0.0 if (means <= 0).any() else float(len(means) / (1 / means).sum())


def forget_quality(ratios: Sequence[float], gold: Sequence[float], seed: int) -> Metric:
    """p-value of the two-sample Kolmogorov-Smirnov test of truth ratios on the forget set (TOFU, forget quality).

    Near 1 the model cannot be told from one that never saw the forget set (`gold`). A p-value says itself how sure it
    is: its interval is that one value, for a bootstrap of it is biased low and may leave the value out.
    """
    from scipy.stats import ks_2samp

    value = float(ks_2samp(ratios, gold).pvalue)
    return Metric(value, (value, value), len(ratios), seed)


def extraction_strength(matches: np.ndarray) -> float:
    """1 - k / |y| for the shortest beginning k of the answer from which the rest is written greedily.

    Args:
        matches: shape (|y|,): whether the likeliest token after question and true beginning is the true one.
    """
    wrong = np.flatnonzero(~matches)
    return 1 - (int(wrong[-1]) + 1) / len(matches) if len(wrong) else 1.0


def _scored(
    model: PreTrainedModel,
    engine: Generator,
    tokenizer: PreTrainedTokenizerBase,
    rows: Sequence[TofuRow],
    name: str,
    max_batch_tokens: int,
    stop: tuple[str, ...],
) -> Scored:
    from jobs.rule.likelihood import token_logprobs

    texts = [[row.answer, row.paraphrased_answer or row.answer, *row.perturbed_answer] for row in rows]
    pairs = [answered_ids(tokenizer, row.question, text) for row, own in zip(rows, texts, strict=True) for text in own]
    end = [] if stop else [end_of_turn(tokenizer)]  # a base model ends its answers with a line
    logprobs = token_logprobs(
        model, [prompt + answer + end for prompt, answer in pairs], [len(p) for p, _ in pairs], max_batch_tokens
    )
    means = iter([float(values.double().mean()) for values in logprobs])
    own_probability, ratios = [], []
    for own in texts:
        answer, paraphrased, *perturbed = (next(means) for _ in own)
        among = np.logaddexp.reduce([answer, *perturbed]) if name in CHOICES else 0.0
        own_probability.append(float(np.exp(answer - among)))
        ratios.append(truth_ratio(perturbed, paraphrased))
    questions = [chat_ids(tokenizer, row.question) for row in rows]
    room = context_length(model) - max(map(len, questions))
    said = greedy_texts(engine, questions, min(ANSWER_TOKENS, room), stop)
    recall = [stemmed_rouge_l_recall(text, row.answer) for text, row in zip(said, rows, strict=True)]
    return Scored(np.array(own_probability), np.array(recall), np.array(ratios))


def _matches(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, rows: Sequence[TofuRow], max_batch_tokens: int
) -> list[np.ndarray]:
    from jobs.rule.likelihood import greedy_matches

    pairs = [answered_ids(tokenizer, row.question, row.answer) for row in rows]
    found = greedy_matches(model, [p + a for p, a in pairs], [len(p) for p, _ in pairs], max_batch_tokens)
    return [match.numpy() for match in found]
