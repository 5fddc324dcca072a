"""Fronts and hypervolumes by hand and by counting random points."""

from __future__ import annotations

import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from jobs.scoring.front import hypervolume, hypervolumes, nondominated

levels = st.integers(0, 6).map(lambda level: level / 6)
pairs = st.lists(st.tuples(levels, levels), max_size=10)


def test_by_hand():
    points = [(0.2, 0.9), (0.5, 0.8), (0.5, 0.6), (0.9, 0.1), (0.5, 0.8)]
    assert nondominated(points) == [0, 1, 3]
    assert hypervolume(points) == pytest.approx(0.2 * 0.9 + 0.3 * 0.8 + 0.4 * 0.1)
    assert hypervolumes([points[:1], points[1:2]]) == pytest.approx([0.18, 0.42])
    assert hypervolume([(1, 1, 0.5), (0.5, 0.5, 1)]) == pytest.approx(0.5 + 0.5 * 0.25)
    assert hypervolume([]) == hypervolume([(0.5, 0.0)]) == hypervolume([(0.5, -1.0)]) == 0


@given(pairs)
def test_the_front_spans_what_all_points_span_and_no_more_points_do(points):
    front = nondominated(points)
    assert hypervolume([points[index] for index in front]) == pytest.approx(hypervolume(points))
    assert len({points[index] for index in front}) == len(front)
    assert all(any(all(a <= b for a, b in zip(one, points[i], strict=True)) for i in front) for one in points)


def test_three_objectives_by_counting():
    generator = random.Random(0)
    points = [tuple(generator.random() for _ in range(3)) for _ in range(6)]
    drawn = [tuple(generator.random() for _ in range(3)) for _ in range(20_000)]
    below = sum(any(all(a <= b for a, b in zip(x, point, strict=True)) for point in points) for x in drawn)
    assert hypervolume(points) == pytest.approx(below / len(drawn), abs=0.01)
