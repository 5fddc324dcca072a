"""Successive halving for several objectives: a trial that falls behind others at equal steps ends.

Compared by one number, such as the product of the objectives, whatever is best at first survives, and the front is
searched at one place only. Here trials are ranked by who dominates whom, and those that nothing sets apart by the
volume that each adds, so that what forgets less and keeps more goes on beside what does the reverse.

Source: Schmucker et al., Multi-objective Asynchronous Successive Halving, arXiv 2106.12639: non-dominated sorting, with
an epsilon-net where volume stands here (a net keeps what has learnt nothing, which is far from all else). Theirs
promotes paused trials; here, as in Ray's ASHA, a trial that is not among the best goes no further.
"""

from collections.abc import Mapping, Sequence
from math import ceil
from typing import Any

from ray.tune.schedulers import FIFOScheduler, TrialScheduler

from jobs.scoring.front import Point, hypervolume, nondominated


def ranked(points: Sequence[Point], count: int) -> list[int]:
    """Indices of the best: fronts one below the other, all objectives maximised from 0.

    Within a front the next is the one that adds most hypervolume to those taken before, as a greedy search for the
    subset of most volume does.
    """
    order: list[int] = []
    left = list(range(len(points)))
    while left and len(order) < count:
        front = [left[at] for at in nondominated([points[index] for index in left])]
        left = [index for index in left if index not in front]
        taken: list[int] = []
        while front and len(order) + len(taken) < count:
            best = max(front, key=lambda index: hypervolume([points[one] for one in (*taken, index)]))
            front.remove(best)
            taken.append(best)
        order += taken
    return order


class Rungs:
    """What trials had reached at certain steps: at `grace` first, then at `factor` times as many, below `last`."""

    def __init__(self, grace: int, factor: float, last: int) -> None:
        self.factor, self.last = factor, last
        self.points: dict[int, dict[str, Point]] = {}
        step = float(grace)
        while round(step) < last:
            self.points[round(step)] = {}
            step *= factor

    def come(self, trial: str, step: int, point: Point) -> dict[str, Point] | None:
        """Puts a trial on the highest rung that it has reached; who is there, or None where it was there before."""
        rung = max((rung for rung in self.points if rung <= step), default=None)
        if rung is None or trial in self.points[rung]:
            return None
        self.points[rung][trial] = point
        return self.points[rung]

    def stays(self, trial: str, step: int, point: Point) -> bool:
        """Whether a trial that comes to a rung is as good as one of the best there: one in `factor`, at least one."""
        there = self.come(trial, step, point)
        if there is None:
            return True
        points = list(there.values())
        return tuple(point) in {tuple(points[index]) for index in ranked(points, ceil(len(points) / self.factor))}


class Halving(FIFOScheduler):
    """Told by Tune of every look of a trial.

    Args:
        objectives: maximised, 0 to 1.
        rungs: where trials are compared.
        earlier: looks of trials of drivers before, by number; a trial that goes on has its own there.
    """

    def __init__(
        self, objectives: Sequence[str], rungs: Rungs, earlier: Mapping[int, Sequence[Mapping[str, float]]]
    ) -> None:
        super().__init__()
        self.objectives, self.rungs = tuple(objectives), rungs
        for number, looks in earlier.items():
            for look in looks:
                self.rungs.come(*self._look(number, look))

    def on_trial_result(self, tune_controller: Any, trial: Any, result: dict) -> str:
        """Stops what falls behind, but neither the configuration as it is nor what has come to its last step."""
        stays = self.rungs.stays(*self._look(trial.config["number"], result)) or result["step"] >= self.rungs.last
        return TrialScheduler.CONTINUE if stays or not trial.config["values"] else TrialScheduler.STOP

    def _look(self, number: int, look: Mapping[str, float]) -> tuple[str, int, Point]:
        return str(number), int(look["step"]), tuple(look[name] for name in self.objectives)
