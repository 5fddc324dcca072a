"""95 % confidence intervals for means, shares and any statistic of independent samples."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from functools import cache, partial
from statistics import NormalDist

import numpy as np

from cluster.report import Metric

_Z95 = NormalDist().inv_cdf(0.975)
_DRAWS_AT_ONCE = 2**21
_NO_WIDTH = 1e-9  # rounding alone


def mean_interval(
    values: Sequence[float],
    seed: int,
    resamples: int = 10_000,
    groups: Sequence[Hashable] | None = None,
    bounds: tuple[float, float] | None = None,
) -> Metric:
    """Mean of `values` with the expanded percentile bootstrap's interval.

    A bootstrap's means vary by (n - 1) / n of what a mean does, and its quantiles are a normal's, not Student's: over
    ten groups the plain 95 % of them hold one in ten such means out. The quantiles taken are as far out as makes up
    for both.

    Args:
        values: one finite number an item, shape (n,), n >= 1, any unit.
        seed: of the resampling; the same seed gives the same interval.
        resamples: number of bootstrap samples.
        groups: what each item belongs to, shape (n,): a group is drawn whole, for its items are not independent; None
            draws items.
        bounds: what a value can be at least and at most, where that is known. Where all groups are alike, which leaves
            a bootstrap without width, the interval is then Wilson's over the groups: no values within the bounds of
            that mean spread more than hits and misses do.
    Returns: value and interval in the unit of `values`; n counts items.
    Raises: ValueError for an empty or non-finite `values`, or another number of groups.
    Source: Hesterberg 2015, What Teachers Should Know about the Bootstrap, 5.3 (expanded percentile); groups: Davison
    and Hinkley, Bootstrap Methods and their Application, 3.8.
    """
    sample = _finite(values)
    sums, sizes = sample, np.ones(sample.size)
    if groups is not None:
        order = {group: index for index, group in enumerate(dict.fromkeys(groups))}
        index = np.fromiter((order[group] for group in groups), np.int64, len(groups))
        if index.size != sample.size:
            raise ValueError(f"{index.size} groups were given for {sample.size} values.")
        sums, sizes = np.bincount(index, weights=sample), np.bincount(index).astype(np.float64)
    rng = np.random.default_rng(seed)
    rows = max(1, _DRAWS_AT_ONCE // sums.size)
    means = []
    for start in range(0, resamples, rows):
        drawn = rng.integers(0, sums.size, size=(min(rows, resamples - start), sums.size))
        means.append(sums[drawn].sum(axis=1) / sizes[drawn].sum(axis=1))
    value = float(sample.mean())
    return Metric(value, _interval(value, np.concatenate(means), sums.size, bounds), sample.size, seed)


def score_interval(values: Sequence[float], seed: int, groups: Sequence[Hashable]) -> Metric:
    """`mean_interval` of scores from 0 to 1 over their groups, as facts that probes ask for."""
    return mean_interval(values, seed, groups=groups, bounds=(0.0, 1.0))


def share_interval(hits: Sequence[bool], seed: int) -> Metric:
    """Share of true `hits` with Wilson's score interval, which stays informative at 0 and 1.

    Args:
        hits: one truth value an item, shape (n,), n >= 1.
        seed: recorded in the result; the interval is in closed form and draws nothing.
    Returns: value and interval in [0, 1].
    Raises: ValueError for empty `hits`.
    Source: Wilson 1927, without continuity correction.
    """
    n = len(hits)
    if n == 0:
        raise ValueError("An interval needs at least one item, got none.")
    share = sum(map(bool, hits)) / n
    return Metric(value=share, ci95=_wilson(share, n), n=n, seed=seed)


def _wilson(share: float, n: int) -> tuple[float, float]:
    centre = (share + _Z95**2 / (2 * n)) / (1 + _Z95**2 / n)
    half = _Z95 / (1 + _Z95**2 / n) * (share * (1 - share) / n + _Z95**2 / (4 * n**2)) ** 0.5
    # At a share of 0 or 1 one end is the share itself; rounding must not put it outside.
    return min(max(centre - half, 0.0), share), max(min(centre + half, 1.0), share)


def statistic_interval(
    statistic: Callable[..., float],
    samples: Sequence[np.ndarray],
    seed: int,
    resamples: int = 2_000,
    groups: Sequence[Sequence[Hashable]] | None = None,
    bounds: tuple[float, float] | None = None,
) -> Metric:
    """Any statistic of independent samples with the expanded percentile bootstrap's interval (`mean_interval`).

    It is expanded by the size of the smallest sample, or, where items are in groups, by the number of groups.

    Args:
        statistic: called as `statistic(*samples)`, for example the AUC of forget against holdout scores.
        samples: arrays of items along axis 0, each with at least one; each is resampled on its own.
        seed: of the resampling.
        resamples: number of bootstrap samples.
        groups: of each sample what its items belong to: a group is drawn whole, with its items in every sample; None
            draws items.
        bounds: of the statistic, as in `mean_interval`.
    Returns: value and interval in the unit of the statistic; n counts the items of all samples.
    Raises: ValueError for an empty sample, or where the statistic is not finite.
    Source: Efron and Tibshirani, An Introduction to the Bootstrap, 8.3 and 13.3.
    """
    if not samples or any(len(sample) == 0 for sample in samples):
        raise ValueError("An interval needs at least one item in each sample.")
    rng = np.random.default_rng(seed)
    value = float(statistic(*samples))
    drawn = partial(_drawn_items, samples, rng) if groups is None else _drawn_groups(samples, groups, rng)
    draws = _finite([value] + [statistic(*drawn()) for _ in range(resamples)])[1:]
    independent = min(map(len, samples)) if groups is None else len({name for sample in groups for name in sample})
    return Metric(value, _interval(value, draws, independent, bounds), sum(map(len, samples)), seed)


def _drawn_items(samples: Sequence[np.ndarray], rng: np.random.Generator) -> list[np.ndarray]:
    return [sample[rng.integers(0, len(sample), size=len(sample))] for sample in samples]


def _drawn_groups(
    samples: Sequence[np.ndarray], groups: Sequence[Sequence[Hashable]], rng: np.random.Generator
) -> Callable[[], list[np.ndarray]]:
    names = list(dict.fromkeys(name for of_sample in groups for name in of_sample))
    places = [
        [np.flatnonzero([one == name for one in of_sample]) for name in names]
        for _, of_sample in zip(samples, groups, strict=True)
    ]

    def draw() -> list[np.ndarray]:
        while True:
            chosen = rng.integers(0, len(names), size=len(names))
            found = [
                sample[np.concatenate([of_sample[index] for index in chosen])]
                for sample, of_sample in zip(samples, places, strict=True)
            ]
            if all(map(len, found)):  # few groups may leave a sample out
                return found

    return draw


def _finite(values: Sequence[float]) -> np.ndarray:
    array = np.asarray(values, dtype=np.float64)
    if array.size == 0:
        raise ValueError("An interval needs at least one item, got none.")
    if not np.isfinite(array).all():
        raise ValueError(f"{int((~np.isfinite(array)).sum())} of {array.size} values are not finite.")
    return array


def _interval(
    value: float, draws: np.ndarray, independent: int, bounds: tuple[float, float] | None
) -> tuple[float, float]:
    low, high = (float(end) for end in np.quantile(draws, _levels(independent)))
    if bounds is None or high - low > _NO_WIDTH:
        return low, high
    least, most = bounds
    share = min(max((value - least) / (most - least), 0.0), 1.0)
    low, high = (least + end * (most - least) for end in _wilson(share, independent))
    return min(low, value), max(high, value)


@cache
def _levels(independent: int) -> tuple[float, float]:
    """Which quantiles of a bootstrap over so many items or groups are the ends of a 95 % interval."""
    from scipy.stats import norm, t

    if independent == 1:
        return 0.025, 0.975
    level = float(norm.cdf(-((independent / (independent - 1)) ** 0.5) * t.ppf(0.975, independent - 1)))
    return level, 1 - level
