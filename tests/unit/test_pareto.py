"""Fronts, areas and paired differences by hand and by brute force."""

from __future__ import annotations

from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from jobs.rule.pareto import Point, area, front, paired_difference, verdict

HERE = [Point("a", 0.2, 0.9), Point("b", 0.5, 0.8), Point("c", 0.5, 0.6), Point("d", 0.9, 0.1), Point("e", 0.4, 0.7)]
points = st.lists(st.tuples(st.floats(0, 1), st.floats(0, 1)), min_size=1, max_size=12).map(
    lambda pairs: [Point(str(i), *pair) for i, pair in enumerate(pairs)]
)


def dominates(one: Point, other: Point) -> bool:
    at_least = one.forgotten >= other.forgotten and one.retained >= other.retained
    return at_least and (one.forgotten, one.retained) != (other.forgotten, other.retained)


def test_front_by_hand():
    assert [point.name for point in front(HERE)] == ["a", "b", "d"]
    assert front([HERE[0], Point("twin", 0.2, 0.9)]) == [HERE[0]]


def test_area_by_hand():
    assert area(HERE) == pytest.approx(0.2 * 0.9 + 0.3 * 0.8 + 0.4 * 0.1)
    assert area(HERE, 0.5) == pytest.approx(0.2 * 0.9 + 0.3 * 0.8)
    assert area(HERE, 0.95) == 0
    assert area([]) == 0


@given(points)
def test_the_front_is_what_nothing_dominates(drawn):
    kept = front(drawn)
    for point in drawn:
        free = not any(dominates(other, point) for other in drawn)
        assert free == any((k.forgotten, k.retained) == (point.forgotten, point.retained) for k in kept)
    assert [p.forgotten for p in kept] == sorted(p.forgotten for p in kept)


@given(points)
def test_the_area_is_that_of_the_union_of_rectangles(drawn):
    xs = sorted({0.0, *(p.forgotten for p in drawn)})
    expected = sum(
        (right - left) * max((p.retained for p in drawn if p.forgotten >= right), default=0.0)
        for left, right in pairwise(xs)
    )
    assert area(drawn) == pytest.approx(expected, abs=1e-9)


def test_pairs_decide_what_means_alone_would_not():
    base = [0.0, 1.0] * 50
    better = [min(1.0, value + 0.05) if index % 2 == 0 else value for index, value in enumerate(base)]
    difference = paired_difference(better, base, seed=1)
    assert difference.value == pytest.approx(0.025)
    assert verdict(difference, 100) == "better"
    assert verdict(difference, 9) == "undecided"
    assert verdict(paired_difference(base, better, seed=1), 100) == "worse"
    assert verdict(paired_difference(base, base, seed=1), 100) == "undecided"
    facts = [index // 4 for index in range(100)]
    assert paired_difference(better, base, seed=1, facts=facts).value == difference.value
    with pytest.raises(ValueError, match=r"shorter|longer|argument"):
        paired_difference([1.0], [1.0, 0.0], seed=1)
