"""What the runs of one comparison or search have in common, kept by content: the original's answers and stage 1."""

import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cluster import folders
from cluster.errors import JobFailure
from cluster.recorder import HISTORY
from cluster.report import digest, read_json, read_lines, write_json, write_lines

if TYPE_CHECKING:
    from jobs.rule.job import Run

DEADLINE_S = 6 * 3600
VERSION = 5  # of what a configuration trains and measures: with another number a run has another folder


def once(folder: Path | None, name: str, parts: Any, make: Callable[[], dict]) -> dict:
    """The JSON object that `make` gives, made by one of the runs that share `folder`; always made where that is None.

    Raises:
        JobFailure: another run made no end of it within the deadline.
    """
    if folder is None:
        return make()
    path = folder / f"{name}-{digest(parts)}.json"
    with _turn(path):
        return read_json(path) or read_json(write_json(make(), path))


def stage(
    run: "Run", name: str, output: Path, parts: Any, train: Callable[[], Path], asked: Mapping[str, Any] | None = None
) -> Path:
    """The model of a training stage in `output`: trained, or linked from another run that trained the same.

    Its seconds and history come with it, so that every run's report counts them.

    Args:
        parts: what the model depends on.
        asked: figure of the history -> what was asked for it, where the model does not depend on that; a run that
            asks for something else takes over the model without this figure.
    """
    questions = {figure: digest(content) for figure, content in (asked or {}).items()}
    if run.shared is None:
        return train()
    place = run.shared / f"{name}-{digest(parts)}"
    with _turn(place):
        if place.exists() and not (output / "config.json").exists():
            _take(run, name, place, output, questions)
        else:
            train()
            if not place.exists():
                _give(run, name, output, place, questions)
    return output


def _take(run: "Run", name: str, place: Path, output: Path, asked: Mapping[str, str]) -> None:
    shutil.rmtree(run.folder / f"train-{name}", ignore_errors=True)  # of a killed driver
    folders.sweep(output)
    known = read_json(place / "stage.json")
    foreign = {figure for figure, content in asked.items() if known.get("asked", {}).get(figure) != content}
    others = [row for row in read_lines(run.folder / HISTORY) if row["stage"] != name]
    rows = [{key: value for key, value in row.items() if key not in foreign} for row in read_lines(place / HISTORY)]
    write_lines([*rows, *others], run.folder / HISTORY)
    if known["peak"] is not None:
        write_json(known["peak"], run.folder / f"peak-{name}.json")
    run.save(seconds=run.state.get("seconds", {}) | {name: known["seconds"]})
    _link(place / "model", output)


def _give(run: "Run", name: str, output: Path, place: Path, asked: Mapping[str, str]) -> None:
    with folders.whole(place) as partial:
        _link(output, partial / "model")
        write_lines([row for row in read_lines(run.folder / HISTORY) if row["stage"] == name], partial / HISTORY)
        peak = read_json(run.folder / f"peak-{name}.json")
        known = {"seconds": run.state.get("seconds", {}).get(name, 0.0), "peak": peak, "asked": dict(asked)}
        write_json(known, partial / "stage.json")


@contextmanager
def _turn(path: Path) -> Iterator[None]:
    from filelock import FileLock, Timeout

    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        with FileLock(f"{path}.lock", timeout=DEADLINE_S):
            yield
    except Timeout:
        raise JobFailure(f"this run waited {DEADLINE_S} s for another one to make {path}; end that one") from None


def _link(source: Path, target: Path) -> None:
    """Hard links, or copies on another file system; whole or not at all."""

    def link(one: str, other: str) -> None:
        try:
            os.link(one, other)
        except OSError:
            shutil.copy2(one, other)

    with folders.whole(target) as partial:
        shutil.copytree(source, partial, copy_function=link, dirs_exist_ok=True)
