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

from tune.front import Point, hypervolume, nondominated


def ranked(points: Sequence[Point]) -> list[int]:
    """Indices from the best to the worst: fronts one below the other, all objectives maximised from 0.

    Within a front the next is the one that adds most hypervolume to those taken before, as a greedy search for the
    subset of most volume does.
    """
    order: list[int] = []
    left = list(range(len(points)))
    while left:
        front = [left[at] for at in nondominated([points[index] for index in left])]
        left = [index for index in left if index not in front]
        taken: list[int] = []
        while front:
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

    def stays(self, trial: str, step: int, point: Point) -> bool:
        """Whether a trial is among the best of a rung, one in `factor` and at least one, when it comes to it.

        The highest rung that it has reached counts, once; between rungs it stays.
        """
        for rung in sorted(self.points, reverse=True):
            seen = self.points[rung]
            if step < rung or trial in seen:
                continue
            seen[trial] = point
            names = list(seen)
            best = ranked(list(seen.values()))[: ceil(len(names) / self.factor)]
            return trial in [names[index] for index in best]
        return True


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
                self._stays(number, look)

    def on_trial_result(self, tune_controller: Any, trial: Any, result: dict) -> str:
        """Stops what falls behind, but neither the configuration as it is nor what has come to its last step."""
        stays = self._stays(trial.config["number"], result) or result["step"] >= self.rungs.last
        return TrialScheduler.CONTINUE if stays or not trial.config["values"] else TrialScheduler.STOP

    def _stays(self, number: int, look: Mapping[str, float]) -> bool:
        return self.rungs.stays(str(number), int(look["step"]), tuple(look[name] for name in self.objectives))
