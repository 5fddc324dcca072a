"""One trial of a search: an ordinary training of RULE that is looked at on the way, without the report of a run."""

import logging
import os
import shutil
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from cluster import folders, session
from cluster.errors import JobFailure, TryAgain, UserError
from cluster.recorder import HISTORY
from cluster.report import Metric, read_json, read_lines, write_json
from cluster.tracking import Tracker
from jobs.rule import job, stages
from jobs.rule.config import RuleConfig
from jobs.rule.trace import asked_for, look_file, trace_of
from jobs.scoring.intervals import score_interval

if TYPE_CHECKING:
    from ray.train import UserCallback

FACTS = "facts.json"  # what the probes of each axis ask for

logger = logging.getLogger(__name__)


def trial(
    config: RuleConfig, folder: Path, shared: Path, parent: str, callbacks: Sequence["UserCallback"]
) -> dict[str, float]:
    """Trains in `folder`, or goes on there, and returns the last look: its step, and the mean of each axis.

    Args:
        config: with `rule.trace.every`.
        shared: folder of what trials have in common (`jobs.rule.shared`).
        parent: MLflow run of the search.
        callbacks: hear the looks.

    Raises:
        UserError, JobFailure: as a run does.
        TryAgain: the cluster or the disk have no room now, or the tracking store is silent, which the search has found.
    """
    run = job.prepare(config, folder, "")
    stages.require_disk(run)
    stages.check(run)
    run.shared, run.callbacks = shared, callbacks
    with job.exclusively(run.folder, job.LOCK_WAIT_S):
        job.claim(run, fresh=False)
        with session.connected(config), _tracked(run, parent) as tracker:
            return _trained(run, tracker)


@contextmanager
def _tracked(run: job.Run, parent: str) -> Iterator[Tracker]:
    with ExitStack() as stack:
        try:
            tracker = stack.enter_context(job.tracked(run, "rule-trial", parent))
        except UserError as error:
            raise TryAgain(str(error)) from None
        yield tracker


def _trained(run: job.Run, tracker: Tracker) -> dict[str, float]:
    if "look" not in run.state:
        original = job.evaluated(run, "original", run.source.path)
        run.trace = trace_of(run.config.rule, original.answers, run.source.path, run.data.target)
        write_json(asked_for(run.trace.probes), run.folder / FACTS)
        for _ in stages.unlearning(run, tracker):
            pass
        last = max((run.folder / "looks").iterdir())
        means = {axis: sum(values) / len(values) for axis, values in read_json(last).items()}
        run.save(look={"step": int(last.stem)} | means)
    return run.state["look"]


def trained_steps(folder: Path) -> int:
    """Updates of stage 2 that a trial made, from its history; those that a resume repeats count once."""
    return max((row["step"] for row in read_lines(folder / HISTORY) if row["stage"] == "rebo"), default=0)


def intervals(folder: Path, step: int, seed: int) -> dict[str, Metric]:
    """A look of a trial's folder, each axis with its interval over the facts asked for; empty where there is none."""
    found, facts = read_json(look_file(folder, step)) or {}, read_json(folder / FACTS) or {}
    return {axis: score_interval(values, seed, facts.get(axis, range(len(values)))) for axis, values in found.items()}


def stopped(folder: Path, failed: bool) -> None:
    """Marks the MLflow run of a trial that was ended from outside; a store that does not answer is only warned of."""
    state = read_json(folder / "state.json") or {}
    if "mlflow_run_id" not in state:
        return
    try:
        uri = os.environ.get("MLFLOW_TRACKING_URI") or state["tracking_uri"]
        Tracker.attach(uri, state["mlflow_run_id"]).ended_from_outside("FAILED" if failed else "KILLED")
    except (UserError, JobFailure) as error:
        logger.warning("the end of %s is not tracked: %s", folder, error)


def clear(folder: Path) -> None:
    """Removes a trial's weights and training states; the file of the best configuration trains it again."""
    for path in (*folder.glob("train-*"), folder / "model", folder / "steered"):
        shutil.rmtree(path, ignore_errors=True)
        folders.sweep(path)
