"""What OODFace reports of a model: accuracies clean and under every condition, and how far they fall.

Every mean is over the paper's whole set of conditions; one over fewer of them, as a small run has, is called so by the
ending `.selected`. The names are OODFace's; the formulas, of which its summaries say nothing, those of the same group's
benchmark of 3D detection (Dong et al., arXiv 2303.11040):
Acc_c = mean over severities, Acc_cor and Acc_var = mean over 20 corruptions and 10 variations of Acc_c,
RCE_c = (Acc_clean - Acc_c) / Acc_clean, RCE and RVE the same of Acc_cor and Acc_var.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Float, Int8

from cluster.errors import UserError
from cluster.report import Metric
from jobs.oodface.metrics import (
    RESAMPLES,
    Fold,
    Folds,
    Resampled,
    Same,
    Scores,
    bootstrap,
    by_fold,
    delong,
    held_out,
    refit,
    tar_at_far,
    tar_bootstrap,
)
from jobs.oodface.scenario import SEVERITIES

CORRUPTIONS = {"Lighting & Weather": 5, "Sensor": 3, "Movement": 3, "Data & Processing": 6, "Occlusion": 3}
VARIATIONS = {"Age": 2, "Facial Expression": 4, "Rotation": 2, "Accessories": 2}
OTHER_VARIATIONS = ("face_mask",)  # of none of these categories: in no mean, but their falls are RVE's kind too
SELECTED = ".selected"
FALSE_ACCEPTS = (1e-2, 1e-3)
UNANSWERED = -1

Condition = tuple[str, int]  # a scenario's name and a severity


@dataclass(frozen=True)
class Scored:
    """The similarities of all pairs under every condition, NaN where a pair lacks an image there."""

    same: Same
    fold: Fold
    clean: Scores
    conditions: Mapping[Condition, Scores]


@dataclass(frozen=True)
class Evaluation:
    """metrics: by name. thresholds: of each rule but ten_fold, by condition, `clean` or SCENARIO/SEVERITY.

    pairs: how many all of it is about. left_out: pairs that lacked an image under some condition.
    """

    metrics: dict[str, Metric]
    thresholds: dict[str, dict[str, float]]
    pairs: int
    left_out: int


def evaluate(
    scored: Scored, planned: Collection[Condition], categories: Mapping[str, str], seed: int, resamples: int = RESAMPLES
) -> Evaluation:
    """Everything that OODFace reports of one model on one list of pairs.

    Accuracies stand below THRESHOLD/acc/ (refit, fixed; ten_fold where there are two folds or more): clean,
    SCENARIO/SEVERITY, SCENARIO (Acc_c), category/CATEGORY, cor (Acc_cor), var (Acc_var), cor/severity/SEVERITY and
    var/severity/SEVERITY. Their relative falls, (clean - it) / clean, stand below THRESHOLD/rce and THRESHOLD/rve by
    the same names, RCE and RVE themselves without one. Below auc/ and tar_at_0.01/, tar_at_0.001/ (shares of pairs of
    one person that are accepted, where pairs suffice) stand those of the same conditions and means.
    Intervals: over folds for ten_fold, DeLong's for AUC, else the bootstrap over pairs within folds and kinds of pairs.

    Args:
        planned: the conditions that the run has; all must be scored.
        categories: category by scenario, the paper's nine or another, which stays out of cor and var.

    Raises:
        UserError: a planned condition has no scores, one was not planned, no pair of a kind is whole everywhere, or no
            clean pair is decided rightly.
    """
    for scenario, severity in sorted({*planned} ^ {*scored.conditions}):
        told = "has no scores" if (scenario, severity) in planned else "was not planned"
        raise UserError(f"{scenario} at severity {severity} {told}; score it, or change what is asked for")
    scores = np.stack([scored.clean, *scored.conditions.values()], axis=1)
    whole = np.isfinite(scores).all(axis=1)
    same, fold, scores = scored.same[whole], scored.fold[whole], scores[whole]
    if same.all() or not same.any():
        raise UserError(
            f"only {len(same)} of {len(whole)} pairs have all images, none of one kind; see what was left out"
        )
    means = _means(list(scored.conditions), categories)
    mixture = np.stack([mean.weights for mean in means], axis=1)
    strata, columns = 2 * fold + same, list(scores.T)
    found: dict[str, Metric] = {}

    best = [refit(column, same).value for column in columns]
    thresholds = {"refit": best, "fixed": [best[0]] * len(columns)}
    for rule, limits in thresholds.items():
        right = (scores >= np.array(limits)) == same[:, None]
        draws = bootstrap(right, strata, seed, resamples) @ mixture
        found |= _accuracies(rule, means, right.mean(axis=0) @ mixture, Resampled(draws, len(same), seed))
    if len(np.unique(fold)) > 1:
        right = np.stack([held_out(column, same, fold) for column in columns], axis=1)
        folds = by_fold(right, fold) @ mixture
        found |= _accuracies("ten_fold", means, folds.mean(axis=0), Folds(folds, len(same)))
    for far in FALSE_ACCEPTS:
        at = [tar_at_far(column, same, far) for column in columns]
        if None not in at:
            draws = tar_bootstrap(columns, same, strata, far, seed, resamples) @ mixture
            shares = np.array([one.accuracy for one in at]) @ mixture
            found |= _listed(f"tar_at_{far:g}", means, Resampled(draws, len(same), seed).metrics(shares))
    found |= _listed("auc", means, delong(columns, same, mixture))
    told = ["clean", *(f"{scenario}/{severity}" for scenario, severity in scored.conditions)]
    by_condition = {rule: dict(zip(told, limits, strict=True)) for rule, limits in thresholds.items()}
    return Evaluation(found, by_condition, len(same), int((~whole).sum()))


@dataclass(frozen=True)
class Answered:
    """What a model that says yes or no said of all pairs: (n, 1 + k), the clean condition's column first.

    1 is yes, the two images show one person, 0 no, `UNANSWERED` neither.
    """

    same: Same
    fold: Fold
    answers: Int8[np.ndarray, "n columns"]
    conditions: Sequence[Condition]


def decided(asked: Answered, categories: Mapping[str, str], seed: int, resamples: int = RESAMPLES) -> dict[str, Metric]:
    """What OODFace reports of a model that has no threshold.

    Accuracies stand below answer/acc/, their relative falls below answer/rce and answer/rve, by the names of
    `evaluate`; a pair without an answer is decided wrongly. Below answered/ stands the share of pairs with an answer,
    below true_accept/ and false_accept/ the shares of pairs of one and of two people that the model takes for one.
    Intervals: the bootstrap over pairs. Falls are left out where so few clean pairs are decided rightly that a sample
    of them may have none.
    """
    means = _means(list(asked.conditions), categories)
    mixture = np.stack([mean.weights for mean in means], axis=1)
    same, strata = asked.same, 2 * asked.fold + asked.same

    def spread(outcome: Bool[np.ndarray, "n columns"], chosen: Bool[np.ndarray, " n"]) -> tuple[np.ndarray, Resampled]:
        draws = bootstrap(outcome[chosen], strata[chosen], seed, resamples) @ mixture
        return outcome[chosen].mean(axis=0) @ mixture, Resampled(draws, int(chosen.sum()), seed)

    yes, all_pairs = asked.answers == 1, np.ones(len(same), dtype=bool)
    values, draws = spread(asked.answers == same[:, None], all_pairs)
    found = _listed("answer/acc", means, draws.metrics(values))
    if draws.draws[:, 0].all():
        found |= _fallen("answer", means, values, draws)
    shares = {
        "answered": (asked.answers != UNANSWERED, all_pairs),
        "true_accept": (yes, same),
        "false_accept": (yes, ~same),
    }
    for name, (outcome, chosen) in shares.items():
        values, draws = spread(outcome, chosen)
        found |= _listed(name, means, draws.metrics(values))
    return found


class _Mean(NamedTuple):
    """name: of the accuracy, below its rule. fall: of its relative fall, none for the clean one. weights: (1 + k,)."""

    name: str
    fall: str | None
    weights: Float[np.ndarray, " columns"]


def _means(conditions: Sequence[Condition], categories: Mapping[str, str]) -> list[_Mean]:
    """The clean column first, then every condition and every mean of conditions that is reported."""
    column = np.eye(1 + len(conditions))
    single = {condition: column[1 + at] for at, condition in enumerate(conditions)}
    scenarios = list(dict.fromkeys(scenario for scenario, _ in conditions))
    varied = {scenario for scenario in scenarios if categories[scenario] in VARIATIONS or scenario in OTHER_VARIATIONS}
    falls = {scenario: "rve" if scenario in varied else "rce" for scenario in scenarios}
    found = [_Mean("clean", None, column[0])]
    for (scenario, severity), weights in single.items():
        found.append(_Mean(f"{scenario}/{severity}", f"{falls[scenario]}/{scenario}/{severity}", weights))
    of_scenario, complete = {}, {}
    for scenario in scenarios:
        levels = [weights for (name, _), weights in single.items() if name == scenario]
        of_scenario[scenario], complete[scenario] = np.mean(levels, axis=0), len(levels) == len(SEVERITIES)
        ending = "" if complete[scenario] else SELECTED
        found.append(_Mean(scenario + ending, f"{falls[scenario]}/{scenario}{ending}", of_scenario[scenario]))
    for kind, fall, sizes in (("cor", "rce", CORRUPTIONS), ("var", "rve", VARIATIONS)):
        members = [scenario for scenario in scenarios if categories[scenario] in sizes]
        groups = [(f"category/{_slug(category)}", category, size) for category, size in sizes.items()]
        for name, category, size in [*groups, (kind, None, sum(sizes.values()))]:
            inside = [one for one in members if category in (None, categories[one])]
            if inside:
                ending = "" if len(inside) == size and all(complete[one] for one in inside) else SELECTED
                full = fall + ending if category is None else f"{fall}/{name}{ending}"
                found.append(_Mean(name + ending, full, np.mean([of_scenario[one] for one in inside], axis=0)))
        for severity in SEVERITIES:
            inside = [single[one, severity] for one in members if (one, severity) in single]
            if inside:
                ending = f"severity/{severity}" + ("" if len(inside) == sum(sizes.values()) else SELECTED)
                found.append(_Mean(f"{kind}/{ending}", f"{fall}/{ending}", np.mean(inside, axis=0)))
    return found


def _accuracies(rule: str, means: list[_Mean], values: np.ndarray, spread: Resampled | Folds) -> dict[str, Metric]:
    if not values[0]:
        raise UserError("not one clean pair is decided rightly; check that images, pairs and model belong together")
    return _listed(f"{rule}/acc", means, spread.metrics(values)) | _fallen(rule, means, values, spread)


def _fallen(rule: str, means: list[_Mean], values: np.ndarray, spread: Resampled | Folds) -> dict[str, Metric]:
    falls = zip(means[1:], spread.falls(values)[1:], strict=True)
    return {f"{rule}/{mean.fall}": one for mean, one in falls}


def _listed(prefix: str, means: list[_Mean], metrics: list[Metric]) -> dict[str, Metric]:
    return {f"{prefix}/{mean.name}": metric for mean, metric in zip(means, metrics, strict=True)}


def _slug(category: str) -> str:
    return re.sub(r"[^a-z]+", "_", category.lower())
