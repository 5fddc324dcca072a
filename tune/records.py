"""What a search is told by the system that it searches (`Plan`), and what it keeps of each trial (`Record`).

The records (`trials/NNN.json`) are all that a search itself remembers; nothing is unpickled.
"""

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from cluster.errors import UserError
from cluster.report import read_json, write_json
from tune.config import Search
from tune.space import Space, Values

if TYPE_CHECKING:
    from ray.tune.integration.ray_train import TuneReportCallback

RUNNING, COMPLETE, STOPPED, FAILED = "running", "complete", "stopped", "failed"


@dataclass
class Record:
    """A trial: `values` of the space (empty: the configuration as it is), its looks in order, how it ended."""

    number: int
    values: Values
    state: str = RUNNING
    looks: list[dict[str, float]] = field(default_factory=list)
    seconds: float = 0.0
    message: str = ""

    @property
    def last_step(self) -> int:
        """The step of its last look."""
        return int(self.looks[-1]["step"]) if self.looks else 0

    def point(self, objectives: Sequence[str]) -> tuple[float, ...]:
        """The objectives at its last look."""
        return tuple(self.looks[-1][name] for name in objectives)


@dataclass(frozen=True)
class Plan:
    """What a system hands over. `objectives` are maximised, from 0 to 1.

    run: trains a trial in a folder, with callbacks for Ray Train, and returns its last look; called in a Ray worker
        that holds no CPU, so that its training finds them free. Tune writes all of a plan to disk: no secret in it.
    updates_per_step: updates of the model, which looks count, in a step of the configuration.
    ended: told of each trial that ended, with its folder.
    trained: how many steps a trial was trained for, from its folder: what is ended goes on until Tune's word arrives.
    resolved: what pins the whole configuration that a trial's values make; equal ones are tried once.
    """

    folder: Path
    settings: Search
    space: Space
    objectives: tuple[str, ...]
    max_steps: int
    slots: int
    run: Callable[[Values, Path, Sequence["TuneReportCallback"]], dict[str, float]]
    ended: Callable[[Record, Path], None]
    trained: Callable[[Path], int]
    resolved: Callable[[Values], str]
    updates_per_step: int = 1

    def trial_folder(self, number: int) -> Path:
        """Where a trial keeps its run."""
        return trial_folder(self.folder, number)

    def keep(self, record: Record) -> None:
        """Writes a record."""
        write_json(vars(record), self.trial_folder(record.number).with_suffix(".json"))


def trial_folder(folder: Path, number: int) -> Path:
    """Where a trial of the search in `folder` keeps its run; its record stands beside it."""
    return folder / "trials" / f"{number:03d}"


def recorded(folder: Path) -> list[Record]:
    """What is on record in a search's folder, by number.

    Raises:
        UserError: a record that is none.
    """
    found = (folder / "trials").glob("*.json")
    return sorted((_record(path) for path in found if re.fullmatch(r"\d+", path.stem)), key=lambda one: one.number)


def _record(path: Path) -> Record:
    content = read_json(path)
    try:
        record = Record(**content)
        sound = record.number == int(path.stem) and all("step" in look for look in record.looks)
    except TypeError:
        sound = False
    if not sound:
        raise UserError(
            f"{path} is no record of a trial; move it and the folder of its name away, and a new trial takes its place"
        )
    return record
