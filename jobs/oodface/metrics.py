"""How well pairs of faces are told apart: similarities, thresholds, accuracies, ROC, and intervals of means of them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Float, Int

from cluster.errors import UserError
from cluster.report import Metric
from jobs.oodface.protocols import Pairs
from jobs.scoring.intervals import share_interval

RESAMPLES = 2_000
_DRAWS_AT_ONCE = 1 << 23
_Z95 = 1.959963984540054

Scores = Float[np.ndarray, " n"]
Same = Bool[np.ndarray, " n"]
Fold = Int[np.ndarray, " n"]


class Threshold(NamedTuple):
    """A threshold (two images are of one person from this score on) and the accuracy at it."""

    value: float
    accuracy: float


def cosine(first: Float[np.ndarray, "n d"], second: Float[np.ndarray, "n d"]) -> Scores:
    """Cosine similarity of embeddings, row by row, in [-1, 1].

    The original adds 1e-5 to every component after normalising, which changes no decision; we do not. Zero or not
    finite embeddings give NaN. Source: OODFace, the evaluation script of its repository.
    """
    rows = [np.asarray(one, dtype=np.float64) for one in (first, second)]
    norms = [np.linalg.norm(one, axis=1) for one in rows]
    with np.errstate(invalid="ignore"):
        return np.einsum("nd,nd->n", *rows) / (norms[0] * norms[1])


def pair_scores(
    pairs: Pairs, image_ids: Sequence[str], embeddings: Float[np.ndarray, "images d"], about: str = "the model"
) -> Scores:
    """The similarity of each pair, NaN where an image has no embedding.

    Args:
        about: whose embeddings these are, and under what condition.

    Raises:
        UserError: an embedding is zero or not finite.
    """
    norms = np.linalg.norm(np.asarray(embeddings, dtype=np.float64), axis=1)
    wrong = np.flatnonzero(~(np.isfinite(norms) & (norms > 0)))
    if wrong.size:
        raise UserError(
            f"{about} gives {image_ids[wrong[0]]} an embedding that is zero or not finite ({wrong.size} of "
            f"{len(image_ids)} images); check the model's file, its mean and std, and its precision"
        )
    place = {name: at for at, name in enumerate(image_ids)}
    sides = [np.array([place.get(name, -1) for name in side]) for side in (pairs.image_a, pairs.image_b)]
    there = (sides[0] >= 0) & (sides[1] >= 0)
    scores = np.full(len(pairs), np.nan)
    scores[there] = cosine(embeddings[sides[0][there]], embeddings[sides[1][there]])
    return scores


def refit(scores: Scores, same: Same) -> Threshold:
    """The observed score that is the best threshold for these pairs, and of equally good ones the lowest.

    O(n log n): one sort. Source: OODFace, the evaluation script of its repository.
    """
    order = np.argsort(scores, kind="stable")
    ranked, positive = scores[order], same[order]
    # at the threshold ranked[i] everything before i is rejected; equal scores share the first one's place
    right = np.count_nonzero(positive) + np.cumsum(~positive) - np.cumsum(positive)
    right = np.concatenate([[np.count_nonzero(positive)], right[:-1]])
    right[1:][ranked[1:] == ranked[:-1]] = -1
    best = int(np.argmax(right))
    return Threshold(float(ranked[best]), right[best] / len(scores))


def tar_at_far(scores: Scores, same: Same, far: float) -> Threshold | None:
    """The least threshold at which at most the share `far` of pairs of two people is accepted.

    Returns: the threshold, here to be exceeded, and in the place of accuracy the share of pairs of one person above
        it; None where there are fewer than 1/far pairs of two people, so that the share cannot be told.
    """
    different = np.sort(scores[~same])[::-1]
    allowed = int(np.floor(far * len(different) + 1e-9))
    if allowed < 1:
        return None
    threshold = different[min(allowed, len(different) - 1)]
    return Threshold(float(threshold), float(np.mean(scores[same] > threshold)))


def bootstrap(
    outcome: Bool[np.ndarray, "n k"], strata: Int[np.ndarray, " n"], seed: int, resamples: int = RESAMPLES
) -> Float[np.ndarray, "resamples k"]:
    """Means of the columns over resampled rows, the same rows for all columns, as many of each stratum as there are.

    So differences and ratios of columns have the interval of paired data. Thresholds stay what they were, and pairs
    count as independent, though some share an image. A threshold that was chosen on the same pairs flatters them a
    little: of 200 simulated samples the nominal 95 % intervals of accuracies held the truth in 84 to 95 % at 400 pairs
    and in 89 to 95 % at 6,000, those of refitted falls in 96 %.

    Args:
        outcome: whether each pair was decided rightly, under each of k conditions.
        strata: what each pair belongs to, such as its fold and kind.

    Source: Efron and Tibshirani, An Introduction to the Bootstrap, 8.3 and 13.3.
    """
    order = np.argsort(strata, kind="stable")
    values = outcome[order].astype(np.float32)
    return np.concatenate([times @ values / len(outcome) for times in _drawn(strata, seed, resamples)]).astype(float)


def tar_bootstrap(
    columns: Sequence[Scores], same: Same, strata: Int[np.ndarray, " n"], far: float, seed: int, resamples: int
) -> Float[np.ndarray, "resamples k"]:
    """Shares of pairs of one person that are accepted, over resampled pairs of both kinds, as `bootstrap` draws them.

    Each draw takes its threshold from its own pairs of two people, by the rule of `tar_at_far`, for most of what the
    share may be off comes from there.
    """
    order = np.argsort(strata, kind="stable")
    same = same[order]
    allowed = int(np.floor(far * np.count_nonzero(~same) + 1e-9))
    found = np.empty((resamples, len(columns)))
    start = 0
    for times in _drawn(strata, seed, resamples):
        block = slice(start, start := start + len(times))
        genuine = np.ascontiguousarray(times[:, same])
        for number, scores in enumerate(columns):
            found[block, number] = _accepted(scores[order], same, times, genuine, allowed)
    return found


def _accepted(
    scores: Scores, same: Same, times: Float[np.ndarray, "b n"], genuine: Float[np.ndarray, "b m"], allowed: int
) -> Float[np.ndarray, " b"]:
    falling = np.flatnonzero(~same)[np.argsort(-scores[~same], kind="stable")]
    # the threshold lies among the highest, each of which is drawn once on average
    enough = allowed + 1 + int(10 * (allowed + 1) ** 0.5) + 20
    for highest in (falling[:enough], falling):
        above = np.cumsum(times[:, highest], axis=1) > allowed
        if above[:, -1].all():
            break
    at = np.where(above[:, -1], above.argmax(axis=1), len(highest) - 1)
    shares = genuine @ (scores[same][:, None] > scores[highest]).astype(np.float32) / genuine.shape[1]
    return np.take_along_axis(shares, at[:, None], axis=1)[:, 0]


def _drawn(strata: Int[np.ndarray, " n"], seed: int, resamples: int) -> Iterator[Float[np.ndarray, "b n"]]:
    """How often each row is drawn, rows sorted by stratum, in blocks of resamples."""
    rng = np.random.default_rng(seed)
    sizes = np.unique(strata, return_counts=True)[1]
    ends = np.cumsum(sizes)
    block = max(1, _DRAWS_AT_ONCE // len(strata))
    for start in range(0, resamples, block):
        rows = min(block, resamples - start)
        times = np.empty((rows, len(strata)), dtype=np.float32)
        for size, end in zip(sizes, ends, strict=True):
            drawn = rng.integers(0, size, (rows, size)) + np.arange(rows)[:, None] * size
            times[:, end - size : end] = np.bincount(drawn.ravel(), minlength=rows * size).reshape(rows, size)
        yield times


class Resampled:
    """Intervals of m means from the draws of `bootstrap`; the first mean is the clean one, n the number of pairs."""

    def __init__(self, draws: Float[np.ndarray, "resamples m"], n: int, seed: int) -> None:
        self.draws, self.n, self.seed = draws, n, seed

    def metrics(self, values: Float[np.ndarray, " m"]) -> list[Metric]:
        """The means, in [0, 1]."""
        return _metrics(values, *np.quantile(self.draws, [0.025, 0.975], axis=0), self.n, self.seed)

    def falls(self, values: Float[np.ndarray, " m"]) -> list[Metric]:
        """How far each mean is below the clean one, as a share of that one: at most 1, negative where it is above."""
        relative = (self.draws[:, :1] - self.draws) / self.draws[:, :1]
        low, high = np.quantile(relative, [0.025, 0.975], axis=0)
        return _metrics((values[0] - values) / values[0], low, high, self.n, self.seed, -np.inf)


class Folds:
    """Intervals of m means by Student's t from their values in each fold; the first mean is the clean one."""

    def __init__(self, folds: Float[np.ndarray, "folds m"], n: int) -> None:
        self.folds, self.n = folds, n

    def metrics(self, values: Float[np.ndarray, " m"]) -> list[Metric]:
        """The means, in [0, 1]."""
        half = self._half(self.folds)
        return _metrics(values, values - half, values + half, self.n, 0)

    def falls(self, values: Float[np.ndarray, " m"]) -> list[Metric]:
        """How far each mean is below the clean one, as a share of that one: at most 1, negative where it is above."""
        fall = (values[0] - values) / values[0]
        # a ratio of means varies as its residuals do (Cochran, Sampling Techniques, 6.4)
        half = self._half((self.folds[:, :1] * (1 - fall) - self.folds) / values[0])
        return _metrics(fall, fall - half, fall + half, self.n, 0, -np.inf)

    def _half(self, folds: Float[np.ndarray, "folds m"]) -> Float[np.ndarray, " m"]:
        from scipy import stats

        count = len(folds)
        return stats.t.ppf(0.975, count - 1) * folds.std(axis=0, ddof=1) / count**0.5


def _metrics(
    values: np.ndarray, low: np.ndarray, high: np.ndarray, n: int, seed: int, least: float = 0.0
) -> list[Metric]:
    """Metrics; where a sample does not vary, as when all are right, the interval is as wide as Wilson's for n right."""
    margin = 1 - share_interval([True] * n, seed).ci95[0]
    values = values.clip(least, 1)  # a weighted mean of ones may be 1 + 2e-16
    flat = high - low < 1e-12
    low = np.where(flat, values - margin, low).clip(least, 1)
    high = np.where(flat, values + margin, high).clip(least, 1)
    return [Metric(float(value), (float(a), float(b)), n, seed) for value, a, b in zip(values, low, high, strict=True)]


def held_out(scores: Scores, same: Same, fold: Fold) -> Bool[np.ndarray, " n"]:
    """Whether each pair is decided rightly at the threshold that is best for the other folds.

    Raises:
        UserError: fewer than two folds.
    Source: Huang et al., Labeled Faces in the Wild, 2007, View 2.
    """
    right = np.zeros(len(scores), dtype=bool)
    folds = np.unique(fold)
    if len(folds) < 2:
        raise UserError("the ten-fold accuracy needs pairs in at least two folds; give the list folds, or leave it out")
    for one in folds:
        inside = fold == one
        right[inside] = (scores[inside] >= refit(scores[~inside], same[~inside]).value) == same[inside]
    return right


def by_fold(right: Bool[np.ndarray, "n k"], fold: Fold) -> Float[np.ndarray, "folds k"]:
    """The share of right pairs of each fold, in the order of the folds, under k conditions."""
    return np.stack([right[fold == one].mean(axis=0) for one in np.unique(fold)])


def delong(columns: Sequence[Scores], same: Same, mixture: Float[np.ndarray, "k m"]) -> list[Metric]:
    """Means of the AUCs of k conditions, m of them by the weights in `mixture`, with their intervals.

    An AUC is the chance that a pair of one person scores above one of two, ties counting half.
    Source: DeLong et al., Comparing the Areas under Two or More Correlated ROC Curves, 1988, equation 5.
    """
    sides = [
        np.stack(side, axis=1) @ mixture for side in zip(*(_placements(one, same) for one in columns), strict=True)
    ]
    values = sides[0].mean(axis=0)
    half = _Z95 * sum(side.var(axis=0, ddof=min(1, len(side) - 1)) / len(side) for side in sides) ** 0.5
    return _metrics(values, values - half, values + half, len(same), 0)


def _placements(scores: Scores, same: Same) -> tuple[np.ndarray, np.ndarray]:
    """For each pair of one person the share of the others below it, for each of the others the share above it."""
    from scipy.stats import rankdata

    ranks, positive, negative = rankdata(scores), scores[same], scores[~same]
    below = (ranks[same] - rankdata(positive)) / len(negative)
    return below, 1 - (ranks[~same] - rankdata(negative)) / len(positive)
