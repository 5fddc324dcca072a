"""Several objectives at once, all maximised: who is dominated, and the volume that a set of points spans."""

from collections.abc import Sequence

Point = Sequence[float]


def nondominated(points: Sequence[Point]) -> list[int]:
    """Indices of the points that no other one equals or exceeds in every objective and exceeds in one."""
    return [
        index
        for index, point in enumerate(points)
        if not any(_dominates(other, point) for other in points)
        and not any(tuple(other) == tuple(point) for other in points[:index])
    ]


def hypervolume(points: Sequence[Point]) -> float:
    """Volume of the union of the boxes from the origin to each point; objectives below 0 count as 0.

    By slices along the last objective, each the hypervolume of the points that reach it: exact, and quick for the
    fronts of tens of points that a search has.
    """
    points = [point for point in points if min(point) > 0]
    points = [points[index] for index in nondominated(points)]
    if not points:
        return 0.0
    if len(points[0]) == 1:
        return max(point[0] for point in points)
    total, below = 0.0, 0.0
    for height in sorted({point[-1] for point in points}):
        reaching = [point[:-1] for point in points if point[-1] >= height]
        total += (height - below) * hypervolume(reaching)
        below = height
    return total


def hypervolumes(groups: Sequence[Sequence[Point]]) -> list[float]:
    """The hypervolume of the first group of points, of the first two, and so on."""
    found: list[float] = []
    front: list[Point] = []
    for group in groups:
        points = [*front, *group]
        front = [points[index] for index in nondominated(points)]
        found.append(hypervolume(front))
    return found


def _dominates(one: Point, other: Point) -> bool:
    pairs = list(zip(one, other, strict=True))
    return all(a >= b for a, b in pairs) and any(a > b for a, b in pairs)
