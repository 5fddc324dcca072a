"""A search over RULE on a connected cluster: what Ray Tune runs, and what is made of the trials' records."""

import os
import shutil
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from cluster import runs, session
from cluster.config import overlaid
from cluster.errors import JobFailure, UserError
from cluster.report import write_text
from cluster.tracking import masked
from jobs.rule import job, stages, tradeoff, trial
from jobs.rule.config import RuleConfig
from jobs.rule.trace import AXES, NATURALNESS
from tune.records import COMPLETE, FAILED, RUNNING, Plan, Record
from tune.report import figure, place_name, summary
from tune.rule_space import PLACE, SETTINGS, SearchConfig, remembered, resolved, without_halving
from tune.search import search
from tune.space import Space, Values, keys_of

if TYPE_CHECKING:
    from ray.train import UserCallback

    from cluster.tracking import Tracker

SHARED = "shared"
URI = "MLFLOW_TRACKING_URI"


def searched(
    config: SearchConfig, base: RuleConfig, space: Space, own: job.Run, shapes: Sequence[job.Run]
) -> dict[str, Any]:
    """Runs the trials that are missing in the folder of `own`, and publishes the report of all; returns its content.

    Args:
        base, space: as `tune.rule_space.settled` made them of `config`.
        shapes: runs as large as the trials.

    Raises:
        UserError: the original knows none of the probes, or more trials at once than the cluster holds.
        JobFailure: no trial was looked at.
    """
    with session.connected(base), job.tracked(own, "rule-search") as tracker:
        plan = planned(config, base, space, own, shapes, tracker.run_id)
        write_text(yaml.safe_dump(remembered(config, base), sort_keys=False), own.folder / SETTINGS)
        own.shared = own.folder / SHARED
        original = job.evaluated(own, "original", own.source.path)
        tradeoff.require_known(original.answers, base.rule.evaluation.known_threshold)  # else every trial would fail
        os.environ[URI] = tracker.uri
        print(without_halving(base, config), end="", flush=True)
        records = search(plan, _environment(config))
        for record in records:
            if record.state != RUNNING:  # its workers may have written on for a moment
                trial.clear(plan.trial_folder(record.number))
        if not any(record.looks and record.state != FAILED for record in records):
            first = next((record.message for record in records if record.message), "no trial was started")
            raise JobFailure(f"no trial got as far as a look; the first: {first}")
        content = _content(config, own, plan, base, records, tracker)
        plot = own.folder / "plots" / "search.png"
        plot.parent.mkdir(exist_ok=True)
        figure(content).savefig(plot, dpi=150)
        tracker.metrics(
            {name: value for name, value in content["hypervolume"].items() if isinstance(value, float)}
            | {"steps_saved": content["steps"]["saved"]},
            step=len(records),
            stage="search",
        )
        for artifact in (plot, *own.folder.glob("best.yaml")):
            tracker.artifact(artifact)
        runs.publish(content, own.folder, tracker)
    return content


def planned(
    config: SearchConfig, base: RuleConfig, space: Space, own: job.Run, shapes: Sequence[job.Run], parent: str
) -> Plan:
    """What the search runs on this cluster; `shapes` are runs as large as its trials.

    Raises:
        UserError: more trials at once than the cluster holds.
    """
    slots = stages.slots(shapes)
    wanted = config.tune.rule.max_concurrent
    if wanted is not None and wanted > slots:
        train = config.train
        each = train.num_workers * train.cpus_per_worker
        raise UserError(
            f"tune.rule.max_concurrent = {wanted} trials need {wanted} x train.num_workers {train.num_workers} x "
            f"train.cpus_per_worker {train.cpus_per_worker} = {wanted * each} CPUs and the memory of as many runs; the "
            f"cluster has room for {slots} at once; lower it, or leave it null"
        )
    return Plan(
        folder=own.folder,
        settings=config.tune.rule,
        space=space,
        objectives=(*AXES, NATURALNESS) if base.rule.trace.naturalness else AXES,
        max_steps=base.rule.rebo.steps * base.rule.rebo.updates_per_rollout,
        updates_per_step=base.rule.rebo.updates_per_rollout,
        slots=wanted or slots,
        run=partial(_run_trial, base, space, own.folder / SHARED, parent),
        ended=_ended,
        trained=trial.trained_steps,
        resolved=partial(resolved, base, space),
    )


def _environment(config: SearchConfig) -> dict[str, str]:
    judge = config.rule.evaluation.judge
    names = [URI, *([judge.token_env] if judge is not None and judge.token_env else [])]
    return {name: os.environ[name] for name in names if name in os.environ}


def _run_trial(
    base: RuleConfig,
    space: Space,
    shared: Path,
    parent: str,
    values: Values,
    folder: Path,
    callbacks: "Sequence[UserCallback]",
) -> dict[str, float]:
    return trial.trial(overlaid(base, keys_of(space, values), PLACE), folder, shared, parent, callbacks)


def _ended(record: Record, folder: Path) -> None:
    if record.state != COMPLETE:
        trial.stopped(folder, failed=record.state == FAILED)
    trial.clear(folder)


def _content(
    config: SearchConfig,
    own: job.Run,
    plan: Plan,
    base: RuleConfig,
    records: Sequence[Record],
    tracker: "Tracker",
) -> dict[str, Any]:
    found = summary(plan, records)
    by_number = {record.number: record for record in records}
    shutil.rmtree(own.folder / "front", ignore_errors=True)
    for place in found["front"]:
        path = own.folder / "front" / f"{place['trial']:03d}-at-{place['step']:03d}.yaml"
        _configuration(base, plan, by_number[place["trial"]], place["step"], path)
    if found["best"] is not None:
        best = found["best"]
        _configuration(base, plan, by_number[best["trial"]], best["step"], own.folder / "best.yaml")
    looks = {str(number): (number, record.last_step) for number, record in by_number.items()}
    looks |= {place_name(place): (place["trial"], place["step"]) for place in found["front"]}
    metrics = {
        name: trial.intervals(plan.trial_folder(number), step, base.rule.seed) for name, (number, step) in looks.items()
    }
    return job.provenance(own, tracker) | {
        "job": "search",
        "configuration": masked(config.model_dump()),
        "metrics": {name: {axis: one.to_json() for axis, one in found.items()} for name, found in metrics.items()},
        **found,
    }


def _configuration(base: RuleConfig, plan: Plan, record: Record, step: int, path: Path) -> None:
    """A file that `python -m jobs.rule run --config` takes: a trial's whole configuration, with the steps of a look."""
    keys = keys_of(plan.space, record.values) | {"rule.rebo.steps": step // plan.updates_per_step}
    keys |= {"rule.trace.every": None, "rule.trace.naturalness": False}  # the search's looks
    config = overlaid(base, keys, PLACE)
    sections = config.model_dump(include={"rule", "train", "generation"})
    path.parent.mkdir(exist_ok=True)
    text = f"# Trial {record.number} of a search, up to step {step}.\n{yaml.safe_dump(sections, sort_keys=False)}"
    write_text(text, path)
