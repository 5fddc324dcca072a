"""The trade-off of forgetting and keeping: dominated points, area under a front, paired differences."""

from collections.abc import Hashable, Sequence
from dataclasses import dataclass

from cluster.report import Metric
from jobs.scoring.front import hypervolume, nondominated
from jobs.scoring.intervals import mean_interval

LEAST_FACTS = 10  # intervals of a bootstrap over fewer groups are too narrow to decide anything


@dataclass(frozen=True)
class Point:
    """A model: `forgotten` = 1 - recall on known forget probes, `retained` = recall on known retained ones, 0 to 1."""

    name: str
    forgotten: float
    retained: float


def front(points: Sequence[Point]) -> list[Point]:
    """The points that none dominates, by rising `forgotten`; of equal ones the first."""
    kept = nondominated([(point.forgotten, point.retained) for point in points])
    return sorted((points[index] for index in kept), key=lambda point: point.forgotten)


def area(points: Sequence[Point], floor: float = 0.0) -> float:
    """Area under the stepwise front of the points with `retained` >= `floor`, in [0, 1]: their hypervolume from (0, 0).

    RULE's figure gives such an area for each r (trade-off figure); how it was measured is not published, this is ours.
    """
    return hypervolume([(point.forgotten, point.retained) for point in points if point.retained >= floor])


def paired_difference(
    one: Sequence[float], other: Sequence[float], seed: int, facts: Sequence[Hashable] | None = None
) -> Metric:
    """Mean of one - other over the same probes, with the interval of the bootstrap over the facts that they ask.

    `facts`: of each probe, as in `jobs.rule.probes.facts`; None takes every probe for a fact of its own.

    Raises: ValueError for sequences of different length, or empty ones.
    """
    return mean_interval([a - b for a, b in zip(one, other, strict=True)], seed, groups=facts)


def verdict(difference: Metric, facts: int) -> str:
    """ "better", "worse" or "undecided" of the first, where more is better.

    Decided if the interval leaves out 0 and is of at least `LEAST_FACTS` facts.
    """
    low, high = difference.ci95
    if facts < LEAST_FACTS:
        return "undecided"
    return "better" if low > 0 else "worse" if high < 0 else "undecided"
