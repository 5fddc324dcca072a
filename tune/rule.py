"""`python -m tune.rule`: search RULE's rewards, boundary data and training settings with Ray Tune."""

import os
import shlex
import shutil
import sys
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
import yaml

from cluster import cli
from cluster.config import load, overlaid
from cluster.errors import JobFailure, TryAgain, UserError, paths_named, without_credentials
from jobs.rule.config import RuleConfig
from tune.rule_space import PLACE, SearchConfig, resolved, settled, usable, without_halving
from tune.space import Space, Values, keys_of

if TYPE_CHECKING:
    from ray.train import UserCallback

    from cluster.tracking import Tracker
    from jobs.rule import job
    from tune.search import Plan, Record

SETTINGS = "search.yaml"
SHARED = "shared"
FREE_ON_RESUME = ("tune.rule.trials=", "tune.rule.max_concurrent=", "cluster.", "tracking.")
URI = "MLFLOW_TRACKING_URI"

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False, help=__doc__)


@app.command()
def search(
    profile: cli.Profile = None,
    config: cli.ConfigFile = None,
    sets: cli.Set = None,
    out: cli.Out = None,
    fresh: cli.Fresh = False,
    resume: Annotated[
        Path | None, typer.Option(metavar="DIR", help="Go on with the search in this folder, with its configuration.")
    ] = None,
    dry_run: cli.DryRun = False,
) -> None:
    """Search the space of `tune.rule`: what trades forgetting for keeping best, and which settings matter."""
    files = list(config or [])
    if resume is not None:
        if profile is not None or config or out is not None or fresh:
            raise UserError("--resume DIR takes the search as it was; only --set may change it, as tune.rule.trials=24")
        if not (resume / SETTINGS).exists():
            raise UserError(f"--resume {resume} holds no search ({SETTINGS} is missing); name the folder of one")
        for assignment in sets or []:
            if not assignment.startswith(FREE_ON_RESUME):
                raise UserError(
                    f"--resume with --set {assignment}: a search goes on as it was; only tune.rule.trials, "
                    "tune.rule.max_concurrent, cluster.* and tracking.* may change"
                )
        files, out = [resume / SETTINGS], resume
    loaded = load(SearchConfig, profile, files, sets or [])
    if dry_run:
        _dry_run(loaded)
        return
    print(run(loaded, out, fresh, shlex.join(["python", "-m", "tune.rule", *sys.argv[1:]])))


def run(config: SearchConfig, out: Path | None, fresh: bool, command: str) -> Path:
    """Runs the trials that are missing and writes the report; returns its path.

    Raises:
        UserError: an unusable space or configuration, before anything starts.
        TryAgain: a trial found no room on the cluster, the disk or the tracking store; the report is of the others.
        JobFailure: no trial was looked at.
    """
    from cluster.report import digest, read_json
    from jobs.rule import job, trial

    with paths_named():
        base, space = settled(config)
        chosen = config.tune.rule.model_dump(exclude={"trials", "max_concurrent"})  # more of them go on with a search
        own = job.prepare(base, out, command, what=f"search-{digest(chosen)[:6]}")
        if not fresh:
            job.claim(own, fresh)
            known = read_json(own.folder / "report.json")
            if known is not None and _is_whole(known, own.folder, config.tune.rule.trials):
                print(f"this search is finished (--fresh starts it over): {own.folder}")
                _show(known)
                return own.folder / "report.json"
        shapes = usable(base, space, own.folder, own.folder if fresh else None)
        questions = digest([job.data_digest(one.data) for one in shapes])
        if not fresh and own.state.get("questions", questions) != questions:
            raise UserError(
                f"the boundary questions of {config.rule.data} are not those that the search in {own.folder} began "
                "with; bring those back, take another --out, or --fresh to replace it"
            )
        if fresh:
            job.claim(own, fresh)
        own.folder.mkdir(parents=True, exist_ok=True)
        own.state["questions"] = questions
    # imported now: Ray reads some of the environment, which `prepare` sets, when it is imported
    from tune.search import RUNNING, STOPPED, recorded, trial_folder

    own.config = own.config.model_copy(update={"tracking": config.tracking})
    with job.exclusively(own.folder):
        try:
            content = _searched(config, base, space, own, shapes)
            _show(content)
            left = [record for record in recorded(own.folder) if record.state == RUNNING]
            if left:
                first = next((record for record in left if record.message), left[0])
                why = first.message or "it was broken off"
                raise TryAgain(
                    f"trial {first.number} is to be gone on with, and no further one was begun: {why}; mend that, and "
                    f"then --resume {own.folder}"
                )
        finally:
            # the process of a trial that was ended may have said otherwise with its last breath
            for record in recorded(own.folder):
                if record.state in (RUNNING, STOPPED):
                    trial.stopped(trial_folder(own.folder, record.number), failed=False)
    return own.folder / "report.json"


def _is_whole(known: Mapping[str, Any], folder: Path, trials: int) -> bool:
    """Whether a report tells of all trials on record, and of as many as are wanted."""
    from tune.search import RUNNING, recorded

    ended = [record.number for record in recorded(folder) if record.state != RUNNING]
    return reported(known) == ended and len(ended) >= trials


def _searched(
    config: SearchConfig, base: RuleConfig, space: Space, own: "job.Run", shapes: Sequence["job.Run"]
) -> dict[str, Any]:
    from cluster import runs, session
    from cluster.report import write_text
    from jobs.rule import job, tradeoff, trial
    from tune.report import figure
    from tune.search import FAILED, RUNNING, search

    with session.connected(base), job.tracked(own, "rule-search") as tracker:
        plan = planned(config, base, space, own, shapes, tracker.run_id)
        write_text(yaml.safe_dump(_remembered(config, base), sort_keys=False), own.folder / SETTINGS)
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


def reported(content: Mapping[str, Any]) -> list[int]:
    """Numbers of the trials that a report has the end of."""
    from tune.search import RUNNING

    return [trial["number"] for trial in content["trials"] if trial["state"] != RUNNING]


def planned(
    config: SearchConfig, base: RuleConfig, space: Space, own: "job.Run", shapes: Sequence["job.Run"], parent: str
) -> "Plan":
    """What the search runs on this cluster; `shapes` are runs as large as its trials.

    Raises:
        UserError: more trials at once than the cluster holds.
    """
    from jobs.rule import stages, trial
    from jobs.rule.trace import AXES, NATURALNESS
    from tune.search import Plan

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
    from jobs.rule.trial import trial

    return trial(overlaid(base, keys_of(space, values), PLACE), folder, shared, parent, callbacks)


def _ended(record: "Record", folder: Path) -> None:
    from jobs.rule import trial
    from tune.search import COMPLETE, FAILED

    if record.state != COMPLETE:
        trial.stopped(folder, failed=record.state == FAILED)
    trial.clear(folder)


def _content(
    config: SearchConfig,
    own: "job.Run",
    plan: "Plan",
    base: RuleConfig,
    records: "Sequence[Record]",
    tracker: "Tracker",
) -> dict[str, Any]:
    from cluster.tracking import masked
    from jobs.rule import job, trial
    from tune.report import place_name, summary

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


def _configuration(base: RuleConfig, plan: "Plan", record: "Record", step: int, path: Path) -> None:
    """A file that `python -m jobs.rule run --config` takes: a trial's whole configuration, with the steps of a look."""
    from cluster.report import write_text

    keys = keys_of(plan.space, record.values) | {"rule.rebo.steps": step // plan.updates_per_step}
    keys |= {"rule.trace.every": None, "rule.trace.naturalness": False}  # the search's looks
    config = overlaid(base, keys, PLACE)
    sections = config.model_dump(include={"rule", "train", "generation"})
    path.parent.mkdir(exist_ok=True)
    text = f"# Trial {record.number} of a search, up to step {step}.\n{yaml.safe_dump(sections, sort_keys=False)}"
    write_text(text, path)


def _remembered(config: SearchConfig, base: RuleConfig) -> dict[str, Any]:
    """The configuration with the paths of `base`, which are absolute: it may be resumed from elsewhere."""
    content, uri = config.model_dump(), config.tracking.uri
    content["cluster"]["storage"] = base.cluster.storage
    content["rule"] |= {name: getattr(base.rule, name) for name in ("model", "data")}
    content["rule"]["evaluation"]["entailment"] = base.model_dump()["rule"]["evaluation"]["entailment"]
    if uri is not None and without_credentials(uri) != uri:  # a password comes from the environment again
        content["tracking"]["uri"] = None
    return content


def _show(content: dict[str, Any]) -> None:
    from rich.console import Console

    from tune.report import table

    console = Console(width=None if Console().is_terminal else 160)
    console.print(table(content))
    for number, message in content["failures"].items():
        console.print(f"trial {number} failed: {message}", soft_wrap=True, highlight=False, markup=False)


def _dry_run(config: SearchConfig) -> None:
    from jobs.rule import job, stages

    with paths_named():
        base, space = settled(config)
        run = job.prepare(base, None, "")
        usable(base, space)
    print(job.described(run.data))
    print(yaml.safe_dump(_remembered(config, base), sort_keys=False))
    print(without_halving(base, config), end="")
    stages.plan(run).show()
    stages.check(run)


if __name__ == "__main__":
    sys.exit(cli.main(app))
