"""Membership inference on passages, and MUSE's PrivLeak."""

from __future__ import annotations

import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from cluster.report import Metric
from jobs.rule.rows import Row, Text, count, encode, load_rows
from jobs.scoring.intervals import mean_interval, statistic_interval

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from jobs.rule.likelihood import TokenScores

K_PERCENT = tuple(range(10, 101, 10))

# MUSE-Books: AUC of Min-40 % of the model retrained without the forget set, forget against holdout passages.
AUC_RETRAIN_BOOKS = 0.5393
PRIV_LEAK = "priv_leak"
AUC = f"{PRIV_LEAK}/auc"


class Passage(Row):
    """One row of `forget_mia.json` or `retain_mia.json`."""

    text: Text


@dataclass(frozen=True)
class MiaScores:
    """Scores of N passages, each array of shape (N,), in the order of the passages.

    loss: mean negative log-likelihood a token, nats, >= 0; the first token, which nothing predicts, is left out.
    zlib: loss / bytes of the zlib-compressed passage (Carlini et al. 2021; lower = more likely a member).
    min_k: by K percent, `min_k` below (Shi et al. 2024).
    min_k_plus_plus: by K percent, `min_k_plus_plus` below (Zhang et al. 2024).
    cut: how many passages were longer than the model's context and were scored on what fits.
    """

    loss: np.ndarray
    zlib: np.ndarray
    min_k: dict[int, np.ndarray]
    min_k_plus_plus: dict[int, np.ndarray]
    cut: int

    def by_name(self) -> dict[str, np.ndarray]:
        """Every score under its stable name."""
        named = {"loss": self.loss, "zlib": self.zlib}
        named |= {f"min_{k}": values for k, values in self.min_k.items()}
        return named | {f"min_{k}_plus_plus": values for k, values in self.min_k_plus_plus.items()}


def load_passages(folder: Path, split: str) -> list[str] | None:
    """Texts of `<split>_mia.json` ("forget" or "retain") of an RWKU target's folder, None where it is absent."""
    rows = load_rows(folder / f"{split}_mia.json", Passage)
    return None if rows is None else [row.text for row in rows]


def min_k(logprobs: np.ndarray, k: int) -> float:
    """Min-K%: mean of the K % lowest token log-probabilities, higher = more likely a member.

    Args:
        logprobs: shape (T,), T >= 1, nats.
        k: percent, 1 to 100; floor(T k / 100) tokens are taken, at least one.
    Source: Shi et al. 2024, Detecting Pretraining Data from Large Language Models.
    """
    return _mean_of_lowest(logprobs, k)


def min_k_plus_plus(logprobs: np.ndarray, mean: np.ndarray, std: np.ndarray, k: int) -> float:
    """Min-K%++: mean of the K % lowest (log p(x_t) - mu_t) / sigma_t, higher = more likely a member.

    Args:
        logprobs, mean, std: shape (T,): log p(x_t), and mean and standard deviation of log p(z) for z ~ p at t.
            Where sigma is 0 the token was certain and its score is 0.
        k: as in `min_k`.
    Source: Zhang et al. 2024, Min-K%++: Improved Baseline for Detecting Pre-Training Data from LLMs.
    """
    normalised = np.divide(logprobs - mean, std, out=np.zeros_like(logprobs), where=std > 0)
    return _mean_of_lowest(normalised, k)


def auc(positives: np.ndarray, negatives: np.ndarray) -> float:
    """Probability that a positive scores above a negative, ties counted half (Mann-Whitney U / nm), in [0, 1]."""
    ordered = np.sort(negatives)
    wins = np.searchsorted(ordered, positives, "left") + np.searchsorted(ordered, positives, "right")
    return float(wins.sum()) / (2 * len(positives) * len(negatives))


def mia_scores(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    texts: Sequence[str],
    *,
    max_batch_tokens: int,
    percents: Sequence[int] = K_PERCENT,
) -> MiaScores:
    """Score passages under a model; a passage beyond the model's context is cut to it and counted.

    Raises: ValueError for a passage of fewer than two tokens, or no passages.
    """
    from jobs.rule.likelihood import token_scores

    context = model.config.get_text_config().max_position_embeddings
    whole = [encode(tokenizer, text) for text in texts]
    for row, ids in enumerate(whole):
        if len(ids) < 2:
            raise ValueError(f"Passage {row} has {len(ids)} tokens; membership inference needs at least two.")
    sequences = [ids[:context] for ids in whole]
    # zlib measures the text that was scored, so a cut passage is compressed as cut.
    scored = [
        text if len(ids) <= context else tokenizer.decode(ids[:context], skip_special_tokens=True)
        for text, ids in zip(texts, whole, strict=True)
    ]
    tokens = [_numpy(scores) for scores in token_scores(model, sequences, [1] * len(sequences), max_batch_tokens)]
    loss = np.array([-logprobs.mean() for logprobs, _, _ in tokens])
    sizes = np.array([len(zlib.compress(text.encode("utf-8"))) for text in scored])
    return MiaScores(
        loss=loss,
        zlib=loss / sizes,
        min_k={k: np.array([min_k(logprobs, k) for logprobs, _, _ in tokens]) for k in percents},
        min_k_plus_plus={k: np.array([min_k_plus_plus(*values, k) for values in tokens]) for k in percents},
        cut=sum(len(ids) > context for ids in whole),
    )


def mia_report(forget: MiaScores, retain: MiaScores, seed: int) -> dict[str, Metric]:
    """Means on forget (FM) and retain (RM) passages and the AUC between them, for each score.

    Names: `fm/<score>`, `rm/<score>` (mean, in the score's unit), `auc/<score>` (probability in [0, 1] that a forget
    passage looks more like a member than a retain passage; 0.5 = cannot be told apart), `fm/truncated` and
    `rm/truncated` (counts).
    Good unlearning: `fm/loss` clearly above `rm/loss`.
    Source: RWKU, metrics.
    """
    metrics = {
        "fm/truncated": count(forget.cut, len(forget.loss), seed),
        "rm/truncated": count(retain.cut, len(retain.loss), seed),
    }
    for name, forget_values in forget.by_name().items():
        retain_values = retain.by_name()[name]
        metrics[f"fm/{name}"] = mean_interval(forget_values, seed)
        metrics[f"rm/{name}"] = mean_interval(retain_values, seed)
        membership = _membership(name)
        samples = [membership(forget_values), membership(retain_values)]
        metrics[f"auc/{name}"] = statistic_interval(auc, samples, seed, bounds=(0.0, 1.0))
    return metrics


def priv_leak(
    forget: MiaScores, holdout: MiaScores, seed: int, auc_retrain: float = AUC_RETRAIN_BOOKS
) -> dict[str, Metric]:
    """MUSE's PrivLeak = (AUC - AUC_retrain) / AUC_retrain x 100, on Min-40 %.

    Here the AUC is the probability that a holdout passage, never trained on, looks more like a member than a forget
    passage. So 0 is ideal, a negative value means that the forget set still shows (under-unlearning), a positive one
    that it stands out as unlearned (over-unlearning).

    Args:
        auc_retrain: of a model retrained without the forget set, > 0; the default is MUSE-Books'.
    Returns: `priv_leak` in percent, `priv_leak/auc` in [0, 1], counts of cut passages (`priv_leak/SPLIT/truncated`).
    Source: Shi et al. 2024, MUSE, criterion C3.
    """

    samples = [forget.min_k[40], holdout.min_k[40]]
    found = statistic_interval(lambda forgotten, held: auc(held, forgotten), samples, seed, bounds=(0.0, 1.0))
    return {
        PRIV_LEAK: relative_leak(found, auc_retrain),
        AUC: found,
        f"{PRIV_LEAK}/forget/truncated": count(forget.cut, len(forget.loss), seed),
        f"{PRIV_LEAK}/holdout/truncated": count(holdout.cut, len(holdout.loss), seed),
    }


def relative_leak(found: Metric, auc_retrain: float) -> Metric:
    """An AUC with its interval as PrivLeak, in percent; `auc_retrain` is taken as exact, and at least 0.01."""

    def leak(value: float) -> float:
        return 100 * (value - auc_retrain) / max(auc_retrain, 0.01)

    return replace(found, value=leak(found.value), ci95=(leak(found.ci95[0]), leak(found.ci95[1])))


def _membership(name: str) -> Callable[[np.ndarray], np.ndarray]:
    """Turn a score so that higher means more likely a member."""
    return np.negative if name in ("loss", "zlib") else np.asarray


def _mean_of_lowest(values: np.ndarray, k: int) -> float:
    return float(np.sort(values)[: max(1, len(values) * k // 100)].mean())


def _numpy(scores: TokenScores) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    return scores.logprobs.double().numpy(), scores.mean.double().numpy(), scores.std.double().numpy()
