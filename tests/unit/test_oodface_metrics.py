"""Verification metrics: hand-computed cases, brute force, other formulas, and the coverage that intervals promise."""

from __future__ import annotations

import time

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from cluster.errors import UserError
from cluster.report import Metric
from jobs.oodface import metrics
from jobs.oodface.metrics import (
    Folds,
    bootstrap,
    by_fold,
    cosine,
    delong,
    held_out,
    pair_scores,
    refit,
    tar_at_far,
    tar_bootstrap,
)
from jobs.oodface.protocols import Pairs
from jobs.oodface.robustness import CORRUPTIONS, VARIATIONS, Scored, evaluate

RULES = ("refit", "fixed", "ten_fold")
# few distinct values, so that ties are common
LISTS = st.lists(st.tuples(st.integers(-4, 4), st.booleans()), min_size=2, max_size=30).filter(
    lambda rows: len({same for _, same in rows}) == 2
)
CATEGORIES = {
    f"{category} {number}": category
    for category, size in {**CORRUPTIONS, **VARIATIONS}.items()
    for number in range(size)
}

SLUGS = ["lighting_weather", "sensor", "movement", "data_processing", "occlusion"]


def arrays(rows: list[tuple[int, bool]]) -> tuple[np.ndarray, np.ndarray]:
    scores, same = zip(*rows, strict=True)
    return np.array(scores) / 4, np.array(same)


def drawn(seed: int, count: int, gap: float, folds: int = 10) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Scores, kinds and folds; `gap` standard deviations lie between the two kinds."""
    same = np.arange(count) % 2 == 0
    return np.random.default_rng(seed).normal(gap * same), same, np.arange(count) // 2 % folds


def accuracy(scores: np.ndarray, same: np.ndarray, threshold: float) -> float:
    """The share of pairs that are decided rightly: of one person if the score is at least the threshold."""
    return float(np.mean((scores >= threshold) == same))


def ten_fold(scores: np.ndarray, same: np.ndarray, fold: np.ndarray) -> Metric:
    """The mean over folds, as `evaluate` has it of many conditions at once."""
    folds = by_fold(held_out(scores, same, fold)[:, None], fold)
    return Folds(folds, len(scores)).metrics(folds.mean(axis=0))[0]


def test_cosine_by_hand():
    a, b = np.array([[3.0, 4.0], [1.0, 0.0], [2.0, 0.0]]), np.array([[4.0, 3.0], [0.0, 9.0], [-5.0, 0.0]])
    assert cosine(a, b) == pytest.approx([24 / 25, 0, -1])
    assert cosine(a.astype(np.float32), 7 * b.astype(np.float32)) == pytest.approx(cosine(a, b))


def test_pairs_find_their_embeddings():
    pairs = Pairs(np.zeros(3, int), np.ones(3, bool), ("a", "b", "a"), ("b", "c", "x"), ("1", "2", "3"))
    scores = pair_scores(pairs, ["c", "a", "b"], np.array([[0.0, 1.0], [1.0, 0.0], [1.0, 1.0]]))
    assert scores[:2] == pytest.approx([0.5**0.5, 0.5**0.5])
    assert np.isnan(scores[2])
    for wrong in (0.0, np.nan, np.inf):
        told = r"m under fog gives a an embedding that is zero or not finite \(1 of 3 images\)"
        with pytest.raises(UserError, match=told):
            pair_scores(pairs, ["c", "a", "b"], np.array([[0.0, 1.0], [wrong, wrong], [1.0, 1.0]]), "m under fog")


def test_accuracy_and_refit_by_hand():
    scores, same = np.array([0.1, 0.2, 0.3, 0.4, 0.5, 0.6]), np.array([0, 0, 1, 0, 1, 1], bool)
    assert accuracy(scores, same, 0.3) == 5 / 6
    assert accuracy(scores, same, 0.31) == 4 / 6
    # .3 and .5 are equally good; the lower one is taken
    assert refit(scores, same) == (0.3, 5 / 6)


@given(LISTS)
def test_refit_is_the_best_of_all_observed_thresholds(rows):
    scores, same = arrays(rows)
    tried = {value: accuracy(scores, same, value) for value in sorted(set(scores.tolist()))}
    best = max(tried.values())
    assert refit(scores, same) == (min(value for value, right in tried.items() if right == best), pytest.approx(best))


@given(LISTS)
def test_auc_is_the_share_of_pairs_in_order(rows):
    scores, same = arrays(rows)
    signs = np.sign(scores[same][:, None] - scores[~same][None, :])
    [area] = delong([scores], same, np.ones((1, 1)))
    assert area.value == pytest.approx((signs + 1).mean() / 2)


@given(LISTS, st.sampled_from([0.1, 0.25, 0.5, 1.0]))
def test_tar_at_far_accepts_no_more_than_it_may(rows, far):
    scores, same = arrays(rows)
    found = tar_at_far(scores, same, far)
    if (~same).sum() * far < 1 - 1e-6:
        assert found is None
        return
    assert (scores[~same] > found.value).mean() <= far + 1e-9
    assert found.accuracy == (scores[same] > found.value).mean()
    lower = [value for value in scores if value < found.value]
    if lower and far < 1:
        # at the next lower threshold more would be accepted than may be
        assert (scores[~same] > max(lower)).mean() > far


@pytest.mark.parametrize("far", [0.05, 0.3])
def test_a_drawn_share_has_the_threshold_of_its_own_draw(far, monkeypatch):
    scores, same, fold = drawn(3, 160, 1.5, folds=2)
    columns, strata = [scores.round(1), -scores], 2 * fold + same  # rounded, so that ties are common
    monkeypatch.setattr(metrics, "_DRAWS_AT_ONCE", 160 * 7)  # blocks of seven
    found = tar_bootstrap(columns, same, strata, far, seed=5, resamples=20)
    order = np.argsort(strata, kind="stable")
    draws = np.concatenate(list(metrics._drawn(strata, 5, 20))).astype(int)
    assert draws.shape == (20, 160)
    for times, shares in zip(draws, found, strict=True):
        rows = np.repeat(order, times)
        expected = [tar_at_far(column[rows], same[rows], far).accuracy for column in columns]
        assert shares == pytest.approx(expected)


def test_intervals_of_shares_at_a_false_accept_rate_hold_the_truth():
    gap, far, held = 2.0, 0.05, 0
    truth = stats.norm.sf(stats.norm.isf(far) - gap)
    for seed in range(60):
        scores, same, fold = drawn(seed, 800, gap)
        draws = tar_bootstrap([scores], same, 2 * fold + same, far, seed, 400)[:, 0]
        low, high = np.quantile(draws, [0.025, 0.975])
        held += low <= truth <= high
    assert held >= 52  # of 60; less has a chance of a hundredth where 95 % hold it


def test_ten_folds_by_hand():
    scores = np.array([0.9, 0.1, 0.8, 0.3, 0.4, 0.2])
    same = np.array([True, False] * 3)
    fold = np.repeat([0, 1, 2], 2)
    # thresholds .4, .4 and .8: in the last fold the pair at .4 is rejected
    metric = ten_fold(scores, same, fold)
    assert metric.value == pytest.approx(5 / 6)
    half = stats.t.ppf(0.975, 2) * np.std([1, 1, 0.5], ddof=1) / 3**0.5
    assert metric.ci95 == pytest.approx((max(0, 5 / 6 - half), 1.0))
    with pytest.raises(UserError, match="at least two folds"):
        ten_fold(scores, same, np.zeros(6, int))


def test_intervals_of_folds_are_students():
    scores, same, fold = drawn(0, 400, 1.5)
    metric = ten_fold(scores, same, fold)
    parts = []
    for one in range(10):
        threshold = refit(scores[fold != one], same[fold != one]).value
        parts.append(accuracy(scores[fold == one], same[fold == one], threshold))
    peer = stats.ttest_1samp(parts, 0).confidence_interval()
    assert metric.value == pytest.approx(np.mean(parts))
    assert metric.ci95 == pytest.approx((peer.low, peer.high))


def test_the_bootstrap_repeats_by_seed_and_stays_within_strata():
    outcome = np.random.default_rng(0).random((60, 3)) < 0.5
    outcome[:, 2] = np.arange(60) < 20
    strata = np.arange(60) // 20
    draws = bootstrap(outcome, strata, 5, 500)
    assert (draws == bootstrap(outcome, strata, 5, 500)).all()
    assert (draws != bootstrap(outcome, strata, 6, 500)).any()
    # what is constant within each stratum does not vary
    assert np.allclose(draws[:, 2], 1 / 3)
    expected = np.mean([outcome[strata == one, 0].var() for one in range(3)]) / 60
    assert draws[:, 0].mean() == pytest.approx(outcome[:, 0].mean(), abs=0.01)
    assert draws[:, 0].var() == pytest.approx(expected, rel=0.2)
    # strata may lie in any order, and the resamples be drawn in pieces
    mixed = np.random.default_rng(1).permutation(60)
    assert np.allclose(bootstrap(outcome[mixed], strata[mixed], 5, 500)[:, 2], 1 / 3)


def test_resamples_in_pieces_are_all_drawn(monkeypatch):
    monkeypatch.setattr("jobs.oodface.metrics._DRAWS_AT_ONCE", 700)
    draws = bootstrap(np.arange(100)[:, None] < 40, np.zeros(100, int), 0, 300)
    assert draws.shape == (300, 1)
    assert draws.mean() == pytest.approx(0.4, abs=0.01)
    assert draws.std() == pytest.approx(0.049, abs=0.006)


def by_hand() -> tuple[Scored, dict[str, str]]:
    """Ten pairs in two folds: clean all right; fog 1 to 5 reject 1 to 5 of one person; snow likewise from 5 to 1."""
    same, fold = np.arange(10) < 5, np.arange(10) % 2
    clean = np.where(same, 1.0, 0.0)

    def without(count: int) -> np.ndarray:
        return np.where(np.arange(10) < count, -1.0, clean)

    conditions = {("fog", level): without(level) for level in range(1, 6)}
    conditions |= {("age", level): without(1) for level in (2, 4)}
    return Scored(same, fold, clean, conditions), {"fog": "Lighting & Weather", "age": "Age"}


def test_accuracies_and_falls_by_hand():
    scored, categories = by_hand()
    found = evaluate(scored, list(scored.conditions), categories, 1)
    value = {name: metric.value for name, metric in found.metrics.items()}
    assert value["fixed/acc/clean"] == 1
    assert value["fixed/acc/fog/3"] == pytest.approx(0.7)
    assert value["fixed/acc/fog"] == pytest.approx(0.7)
    assert value["fixed/rce/fog"] == pytest.approx(0.3)
    assert value["fixed/acc/age.selected"] == value["fixed/acc/var.selected"] == pytest.approx(0.9)
    assert value["fixed/rve.selected"] == pytest.approx(0.1)
    # one of five scenarios of its category, one of twenty corruptions
    assert (
        value["fixed/acc/category/lighting_weather.selected"] == value["fixed/acc/cor.selected"] == pytest.approx(0.7)
    )
    assert value["fixed/acc/cor/severity/5.selected"] == pytest.approx(0.5)
    assert value["fixed/rce/severity/5.selected"] == pytest.approx(0.5)
    assert not {"fixed/acc/cor", "fixed/rce", "fixed/rve", "fixed/acc/age"} & set(value)
    # refitted, the four scores left above the rejected ones at -1 stay right, and all that scores -1 is lost
    assert value["refit/acc/fog/1"] == pytest.approx(0.9)
    assert value["auc/fog/2"] == pytest.approx(0.6)
    assert not [name for name in value if name.startswith("tar")]
    assert found.thresholds["fixed"]["fog/3"] == found.thresholds["refit"]["clean"] == 1
    assert (found.pairs, found.left_out) == (10, 0)


def test_what_is_outside_the_papers_categories_is_in_no_mean():
    scored, categories = by_hand()
    added = {(name, level): scored.clean[::-1] for name in ("elastic_transform", "face_mask") for level in range(1, 6)}
    more = Scored(scored.same, scored.fold, scored.clean, {**scored.conditions, **added})
    categories = categories | dict.fromkeys(["elastic_transform", "face_mask"], "Extensions")
    before = evaluate(scored, list(scored.conditions), categories, 1).metrics
    found = evaluate(more, list(more.conditions), categories, 1).metrics
    assert {name: found[name] for name in before} == before
    assert {name for name in found if name.startswith("fixed/") and name[-1] not in "12345"} - {*before} == {
        *("fixed/acc/elastic_transform", "fixed/rce/elastic_transform", "fixed/acc/face_mask", "fixed/rve/face_mask")
    }
    assert found["fixed/rve/face_mask"].value == found["fixed/rce/elastic_transform/3"].value == 1


def test_names_of_a_whole_run_and_means_of_means():
    scores, same, fold = drawn(0, 200, 3.0)
    rng = np.random.default_rng(1)
    conditions = {(name, level): scores - level * rng.random(200) for name in CATEGORIES for level in range(1, 6)}
    found = evaluate(Scored(same, fold, scores, conditions), list(conditions), CATEGORIES, 0, 200).metrics
    assert not [name for name in found if "selected" in name]
    for rule in RULES:
        value = {name.removeprefix(f"{rule}/"): one.value for name, one in found.items() if name.startswith(rule)}
        corruptions = [name for name, category in CATEGORIES.items() if category in CORRUPTIONS]
        per_scenario = [np.mean([value[f"acc/{name}/{level}"] for level in range(1, 6)]) for name in corruptions]
        assert value["acc/cor"] == pytest.approx(np.mean(per_scenario))
        assert value["acc/cor"] == pytest.approx(np.mean([value[f"acc/cor/severity/{level}"] for level in range(1, 6)]))
        assert value["rce"] == pytest.approx((value["acc/clean"] - value["acc/cor"]) / value["acc/clean"])
        assert value["rve"] == pytest.approx((value["acc/clean"] - value["acc/var"]) / value["acc/clean"])
        weighted = sum(
            size * value[f"acc/category/{slug}"] for slug, size in zip(SLUGS, CORRUPTIONS.values(), strict=True)
        )
        assert value["acc/cor"] == pytest.approx(weighted / 20)
    assert {"auc/cor", "auc/clean", "tar_at_0.01/var", "refit/rve/category/facial_expression"} <= set(found)
    for name, metric in found.items():
        assert metric.ci95[0] <= metric.value + 1e-9, name
        assert metric.value <= metric.ci95[1] + 1e-9, name


def test_a_pair_that_lacks_an_image_once_leaves_everywhere():
    scored, categories = by_hand()
    whole = evaluate(scored, list(scored.conditions), categories, 0)
    lacking = {**scored.conditions, ("fog", 2): np.where(np.arange(10) == 9, np.nan, scored.conditions["fog", 2])}
    found = evaluate(Scored(scored.same, scored.fold, scored.clean, lacking), list(lacking), categories, 0)
    assert (found.pairs, found.left_out) == (9, 1)
    assert found.metrics["fixed/acc/fog/5"].value == pytest.approx(4 / 9)
    assert {metric.n for name, metric in found.metrics.items() if "/acc/" in name} == {9}
    assert whole.metrics["fixed/acc/fog/5"].n == 10
    nothing = {**lacking, ("fog", 1): np.where(scored.same, np.nan, 0.0)}
    with pytest.raises(UserError, match="only 4 of 10 pairs have all images, none of one kind"):
        evaluate(Scored(scored.same, scored.fold, scored.clean, nothing), list(nothing), categories, 0)


def test_a_score_over_missing_conditions_is_refused():
    scored, categories = by_hand()
    with pytest.raises(UserError, match="snow at severity 1 has no scores"):
        evaluate(scored, [*scored.conditions, ("snow", 1)], categories, 0)
    with pytest.raises(UserError, match="fog at severity 5 was not planned"):
        evaluate(scored, [one for one in scored.conditions if one != ("fog", 5)], categories, 0)
    wrong = Scored(scored.same, scored.fold, np.where(scored.same, 0.0, 1.0), {})
    assert evaluate(wrong, [], categories, 0).metrics["refit/acc/clean"].value == 0.5


def test_without_folds_there_is_no_ten_fold():
    scored, categories = by_hand()
    one = Scored(scored.same, np.zeros(10, int), scored.clean, scored.conditions)
    rules = {name.split("/")[0] for name in evaluate(one, list(one.conditions), categories, 0).metrics}
    assert rules == {"refit", "fixed", "auc"}


def test_what_does_not_vary_is_not_certain():
    scored, categories = by_hand()
    found = evaluate(scored, list(scored.conditions), categories, 0).metrics
    # Wilson's interval of 10 of 10
    assert found["refit/acc/clean"].ci95 == pytest.approx((0.7224672, 1.0))
    assert found["auc/clean"].ci95 == pytest.approx((0.7224672, 1.0))
    same = Scored(scored.same, scored.fold, scored.clean, {("fog", 1): scored.clean})
    metric = evaluate(same, [("fog", 1)], categories, 0).metrics["refit/rce/fog/1"]
    assert (metric.value, metric.ci95) == (0, pytest.approx((-0.2775328, 0.2775328)))


def test_the_interval_of_a_fall_is_that_of_paired_data():
    """Where every corrupted score is the clean one, moved for a few pairs, the fall is known far better than both."""
    scores, same, fold = drawn(3, 2000, 2.0)
    moved = np.where(np.random.default_rng(4).random(2000) < 0.02, -9.0, scores)
    found = evaluate(Scored(same, fold, scores, {("fog", 1): moved}), [("fog", 1)], {"fog": "Sensor"}, 0).metrics
    width = {name: found[name].ci95[1] - found[name].ci95[0] for name in found}
    for rule in RULES:
        assert width[f"{rule}/rce/fog/1"] < 0.75 * width[f"{rule}/acc/clean"]


def right_at(threshold: float, gap: float, deviation: float) -> float:
    """The accuracy of all pairs there are, where the kinds are normal and `gap` apart."""
    return (stats.norm.sf(threshold, gap, deviation) + stats.norm.cdf(threshold, 0, deviation)) / 2


def test_intervals_hold_the_truth_as_often_as_they_say():
    foggy = (1.7, 1.36**0.5)
    best = right_at(1.0, 2.0, 1.0), right_at(1.7 / 2, *foggy)
    held = dict.fromkeys(["fixed/acc/fog/1", "refit/rce/fog/1", "ten_fold/acc/clean", "auc/fog/1"], 0)
    for seed in range(150):
        scores, same, fold = drawn(seed, 1000, 2.0)
        fog = scores - np.random.default_rng(seed + 10**6).normal(0.3 * same, 0.6)
        found = evaluate(Scored(same, fold, scores, {("fog", 1): fog}), [("fog", 1)], {"fog": "Sensor"}, seed, 200)
        truth = {
            "fixed/acc/fog/1": right_at(found.thresholds["fixed"]["fog/1"], *foggy),
            "refit/rce/fog/1": 1 - best[1] / best[0],
            "ten_fold/acc/clean": best[0],
            "auc/fog/1": stats.norm.cdf(foggy[0] / foggy[1] / 2**0.5),
        }
        for name in held:
            low, high = found.metrics[name].ci95
            held[name] += low <= truth[name] <= high
    # nominal .95; the share in 150 trials has a deviation of .018
    assert all(count / 150 >= 0.88 for count in held.values()), held
    assert any(count < 150 for count in held.values())


def test_a_whole_run_takes_seconds():
    scores, same, fold = drawn(0, 6000, 3.0)
    rng = np.random.default_rng(1)
    conditions = {
        (name, level): scores - rng.random(6000).astype(np.float32) for name in CATEGORIES for level in range(1, 6)
    }
    start = time.process_time()
    evaluate(Scored(same, fold, scores, conditions), list(conditions), CATEGORIES, 0)
    # 3.5 s on one core
    assert time.process_time() - start < 30
