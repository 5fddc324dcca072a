"""Confidence intervals against known values, another library, and their own promise of coverage."""

import numpy as np
import pytest
from scipy import stats

from jobs.scoring.intervals import mean_interval, score_interval, share_interval, statistic_interval


@pytest.mark.parametrize(
    ("hits", "n", "low", "high"),
    [(8, 10, 0.4901625, 0.9433178), (0, 10, 0.0, 0.2775328), (10, 10, 0.7224672, 1.0), (50, 100, 0.4038315, 0.5961685)],
)
def test_wilson_by_hand(hits, n, low, high):
    metric = share_interval([True] * hits + [False] * (n - hits), seed=3)
    assert metric.value == hits / n
    assert metric.ci95 == pytest.approx((low, high), abs=1e-6)
    assert (metric.n, metric.seed) == (n, 3)


@pytest.mark.parametrize("n", [1, 2, 7, 60, 1200])
def test_wilson_equals_scipy_and_holds_its_share(n):
    for hits in {0, 1, n // 3, n - 1, n}:
        metric = share_interval([True] * hits + [False] * (n - hits), seed=0)
        peer = stats.binomtest(hits, n).proportion_ci(method="wilson")
        assert metric.ci95 == pytest.approx((peer.low, peer.high), abs=1e-9)
        assert 0.0 <= metric.ci95[0] <= metric.value <= metric.ci95[1] <= 1.0


def test_mean_interval_agrees_with_scipy_and_repeats_by_seed():
    values = np.random.default_rng(0).exponential(size=200)
    metric = mean_interval(values, seed=1)
    drawn = stats.bootstrap((values,), np.mean, method="percentile", rng=np.random.default_rng(2))
    level = stats.norm.cdf(-((200 / 199) ** 0.5) * stats.t.ppf(0.975, 199))
    low, high = np.quantile(drawn.bootstrap_distribution, [level, 1 - level])
    assert metric.value == pytest.approx(values.mean())
    assert metric.ci95 == pytest.approx((low, high), abs=0.05 * (high - low))
    assert metric == mean_interval(values, seed=1)
    assert metric.ci95 != mean_interval(values, seed=2).ci95


def test_items_of_a_group_are_drawn_together():
    values = [0.0, 1.0, 0.25, 0.75]
    groups = ["a", "b", "c", "d"]
    assert mean_interval(values, seed=1, groups=groups) == mean_interval(values, seed=1)
    tripled = mean_interval(values * 3, seed=1, groups=groups * 3)
    assert tripled.ci95 == pytest.approx(mean_interval(values, seed=1).ci95)  # copies of a group add nothing
    assert tripled.n == 12
    low, high = mean_interval([0.0] * 9 + [1.0], seed=1, groups=["many"] * 9 + ["one"]).ci95
    assert (low, high) == (0.0, 1.0)  # one group of two may be drawn twice
    with pytest.raises(ValueError, match="3 groups were given for 4 values"):
        mean_interval(values, seed=1, groups=groups[:3])


@pytest.mark.parametrize("n", [10, 60])
def test_mean_interval_covers_the_true_mean(n):
    rng = np.random.default_rng(5)
    covered = 0
    for trial in range(1000):
        low, high = mean_interval(rng.normal(3.0, 2.0, size=n), seed=trial, resamples=1000).ci95
        covered += low <= 3.0 <= high
    # 1000 trials have a deviation of .007; the plain percentiles cover .90 at n = 10
    assert 0.935 <= covered / 1000 <= 0.965


def test_one_item_is_its_own_interval():
    assert mean_interval([0.25], seed=0).ci95 == (0.25, 0.25)


def test_resampling_in_pieces_draws_every_resample():
    values = np.arange(5000.0)
    low, high = mean_interval(values, seed=0, resamples=1000).ci95
    error = values.std() / 5000**0.5
    assert (low, high) == pytest.approx((values.mean() - 1.96 * error, values.mean() + 1.96 * error), abs=0.2 * error)


def _auc(forget, holdout):
    return float(np.mean(forget[:, None] > holdout[None, :]))


def test_statistic_interval_of_an_auc():
    rng = np.random.default_rng(0)
    forget, holdout = rng.normal(1.0, size=80), rng.normal(0.0, size=120)
    metric = statistic_interval(_auc, [forget, holdout], seed=4, resamples=500)
    assert metric.value == _auc(forget, holdout)
    assert (metric.n, metric.seed) == (200, 4)
    # Hanley and McNeil's standard error of an AUC.
    a = metric.value
    q1, q2 = a / (2 - a), 2 * a * a / (1 + a)
    error = ((a * (1 - a) + 79 * (q1 - a * a) + 119 * (q2 - a * a)) / (80 * 120)) ** 0.5
    assert metric.ci95 == pytest.approx((a - 1.96 * error, a + 1.96 * error), abs=0.6 * error)
    assert metric == statistic_interval(_auc, [forget, holdout], seed=4, resamples=500)


def test_statistic_of_rows_resamples_rows():
    rows = np.column_stack([np.arange(50.0), 2 * np.arange(50.0)])
    metric = statistic_interval(lambda r: r[:, 1].sum() / r[:, 0].sum(), [rows], seed=0, resamples=100)
    assert metric.ci95 == (2.0, 2.0)


def test_what_cannot_be_scored_is_refused():
    with pytest.raises(ValueError, match="at least one item"):
        mean_interval([], seed=0)
    with pytest.raises(ValueError, match="at least one item"):
        share_interval([], seed=0)
    with pytest.raises(ValueError, match="at least one item in each"):
        statistic_interval(_auc, [np.array([1.0]), np.array([])], seed=0, resamples=10)
    with pytest.raises(ValueError, match="1 of 2 values are not finite"):
        mean_interval([1.0, float("nan")], seed=0)
    with pytest.raises(ValueError, match="not finite"):
        statistic_interval(lambda a: float("nan"), [np.array([1.0])], seed=0, resamples=10)


def test_scores_that_are_all_alike_have_a_width():
    half = score_interval([0.5] * 8, 0, range(8))
    assert half.ci95 == share_interval([True, False] * 4, 0).ci95
    assert score_interval([1.0, 1.0, 1.0], 0, ["a", "a", "b"]).ci95 == share_interval([True, True], 0).ci95
    one_fact = score_interval([0.2, 0.6], 0, ["a", "a"])
    assert one_fact.ci95[0] < 0.2
    assert one_fact.ci95[1] > 0.6
    kept = statistic_interval(lambda rows: float(rows.mean()), [np.ones(12)], 0, resamples=20, bounds=(0.0, 100.0))
    assert kept.ci95[0] < 1.0 < kept.ci95[1]
    auc = statistic_interval(_auc, [np.zeros(9), np.ones(12)], 0, resamples=20, bounds=(0.0, 1.0))
    assert (auc.value, auc.ci95) == (0.0, share_interval([False] * 9, 0).ci95)
    spread = [0.0, 0.5, 1.0, 0.25]
    assert score_interval(spread, 3, "abcd") == mean_interval(spread, 3, groups="abcd")


def test_groups_are_drawn_whole_in_every_sample():
    def mean(*parts):
        return float(np.mean([part.mean() for part in parts]))

    values = np.repeat([0.0, 1.0] * 12, 5)
    groups = np.repeat(range(24), 5).tolist()
    drawn = statistic_interval(mean, [values], 1, groups=[groups])
    assert drawn.ci95 == pytest.approx(mean_interval(values, 1, groups=groups).ci95, abs=0.05)
    joint = statistic_interval(mean, [values, values], 1, groups=[groups, groups])
    apart = statistic_interval(mean, [values, values], 1, groups=[groups, [24 + one for one in groups]])
    assert np.ptp(joint.ci95) > 1.2 * np.ptp(apart.ci95)
    rare = statistic_interval(mean, [values, values[:5] + 1.0], 1, groups=[groups, groups[:5]])
    assert np.isfinite(rare.ci95).all()
