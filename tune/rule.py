"""`python -m tune.rule`: search RULE's rewards, boundary data and training settings with Ray Tune."""

import shlex
import shutil
import sys
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
import yaml

from cluster import cli
from cluster.config import load, overlaid
from cluster.errors import JobFailure, UserError
from jobs.rule.config import RuleConfig
from tune.config import Tune
from tune.space import Space, Values, keys_of, present, require_usable

if TYPE_CHECKING:
    from ray.train import UserCallback

    from jobs.rule import job
    from tune.search import Plan, Record

SETTINGS = "search.yaml"
PLACE = "tune.rule.space"
LOOKS = 12  # of a trial, where `rule.trace.every` does not say
TRAINING = ("rule.rebo.", "rule.steering.", "rule.baseline.")  # keys that change nothing of what is read
NOT_SEARCHED = ("rule.rebo.steps", "rule.rebo.updates_per_rollout", "rule.model", "rule.data")

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False, help=__doc__)


class SearchConfig(RuleConfig):
    """The whole configuration of `python -m tune.rule`."""

    tune: Tune = Tune()


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
        JobFailure: no trial was looked at.
    """
    from cluster import session
    from cluster.errors import paths_named
    from cluster.report import digest, read_json, write_json
    from jobs.rule import job, trial

    with paths_named():
        base, space = settled(config)
        usable(base, space)
        chosen = config.tune.rule.model_dump(exclude={"trials", "max_concurrent"})  # more of them go on with a search
        own = job.prepare(config, out, command, what=f"search-{digest([chosen, base.rule.trace.model_dump()])[:6]}")
        job.claim(own, fresh)
        own.folder.mkdir(parents=True, exist_ok=True)
    # imported now: Ray reads some of the environment, which `prepare` sets, when it is imported
    from tune.report import figure
    from tune.search import search as searched

    known = read_json(own.folder / "report.json")
    if known is not None and len(known["trials"]) >= config.tune.rule.trials:
        print(f"this search is finished (--fresh starts it over): {own.folder}")
        _show(known)
        return own.folder / "report.json"
    with job.exclusively(own.folder), session.connected(base), job.tracked(own, "rule-search") as tracker:
        (own.folder / SETTINGS).write_text(yaml.safe_dump(_remembered(config), sort_keys=False), encoding="utf-8")
        plan = planned(config, base, space, own, tracker.run_id)
        records = searched(plan)
        for record in records:
            trial.clear(plan.trial_folder(record.number))
        if not any(record.looks for record in records):
            raise JobFailure(f"no trial got as far as a look; the first: {records[0].message}")
        content = _content(own, plan, base, records) | {
            "mlflow": {"uri": _shown_uri(tracker), "run_id": tracker.run_id}
        }
        plot = own.folder / "plots" / "search.png"
        plot.parent.mkdir(exist_ok=True)
        figure(content).savefig(plot, dpi=150)
        tracker.metrics(
            {name: content["hypervolume"][name] for name in ("all", "configuration_as_it_is")}
            | {"steps_saved": content["steps"]["saved"]},
            step=len(records),
            stage="search",
        )
        path = write_json(content, own.folder / "report.json")
        for artifact in (plot, path, own.folder / "best.yaml"):
            tracker.artifact(artifact)
    shutil.rmtree(own.folder / "ray", ignore_errors=True)  # Tune's own state, which nothing reads again
    _show(content)
    return path


def settled(config: SearchConfig) -> tuple[RuleConfig, Space]:
    """The configuration of a trial that sets nothing, and the space.

    Raises:
        UserError: an empty space, or one with a key that a search cannot set.
    """
    sections = {name: getattr(config, name) for name in RuleConfig.model_fields}
    base = RuleConfig(**sections)
    if base.rule.trace.every is None:
        base = overlaid(base, {"rule.trace.every": max(1, base.rule.rebo.steps // LOOKS)}, "rule.trace")
    space = present(config.tune.rule.space, PLACE)
    for name, dimension in space.items():
        for key in sorted(dimension.keys(name)):
            if not key.startswith("rule.") or key in NOT_SEARCHED:
                raise UserError(
                    f"{PLACE}: {key} cannot be searched: trials are compared at equal steps on one model and data, "
                    "and take turns on the same workers; take another key under rule"
                )
    return base, space


def usable(base: RuleConfig, space: Space) -> None:
    """Has every choice, and each end of a range, checked as a run's configuration and data would be.

    Raises:
        UserError: naming the entry of the space.
    """
    from jobs.rule import job, stages

    prepared = job.prepare(base, None, "")

    def accept(keys: dict[str, Any], origin: str) -> None:
        config = overlaid(base, keys, origin)
        same_data = all(key.startswith(TRAINING) for key in keys)
        stages.check(replace(prepared, config=config) if same_data else job.prepare(config, None, ""))

    require_usable(space, PLACE, accept)


def planned(config: SearchConfig, base: RuleConfig, space: Space, own: "job.Run", parent: str) -> "Plan":
    """What the search runs.

    Raises:
        UserError: more trials at once than the cluster holds.
    """
    import ray

    from jobs.rule import stages
    from jobs.rule.trace import AXES
    from tune.search import Plan

    slots = stages.slots([own], ray.cluster_resources())
    wanted = config.tune.rule.max_concurrent
    if wanted is not None and wanted > slots:
        train = config.train
        raise UserError(
            f"tune.rule.max_concurrent = {wanted} trials need {wanted} x train.num_workers {train.num_workers} x "
            f"train.cpus_per_worker {train.cpus_per_worker} = {wanted * train.num_workers * train.cpus_per_worker} CPUs"
            f" and the memory of as many runs; the cluster has room for {slots} at once; lower it, or leave it null"
        )
    run_trial = partial(_run_trial, base, space, own.folder / "shared", parent)
    steps = base.rule.rebo.steps * base.rule.rebo.updates_per_rollout
    return Plan(own.folder, config.tune.rule, space, AXES, steps, wanted or slots, run_trial, _ended)


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


def _content(own: "job.Run", plan: "Plan", base: RuleConfig, records: "Sequence[Record]") -> dict[str, Any]:
    from cluster.report import machine
    from cluster.tracking import git_commit, masked
    from cluster.tracking_store import without_credentials
    from jobs.rule import job, trial
    from jobs.rule import report as reporting
    from tune.report import summary

    found = summary(plan, records)
    by_number = {record.number: record for record in records}
    for number in found["front"]:
        _configuration(base, plan.space, by_number[number], own.folder / "front" / f"{number:03d}.yaml")
    _configuration(base, plan.space, by_number[found["best"]], own.folder / "best.yaml")
    seed = base.rule.seed
    metrics = {str(number): trial.intervals(plan.trial_folder(number), seed) for number in by_number}
    return {
        "system": "rule",
        "job": "search",
        "targets": [own.data.target],
        "model": own.source.name,
        "model_version": own.source.version,
        "command": without_credentials(own.command),
        "configuration": masked(own.config.model_dump()),
        "data_digests": {base.rule.data: job.data_digest(own.data)},
        "metrics": {name: {axis: one.to_json() for axis, one in found.items()} for name, found in metrics.items()},
        "machine": machine(),
        "commit": git_commit(Path(__file__).parents[1]),
        "versions": reporting.versions(),
    } | found


def _configuration(base: RuleConfig, space: Space, record: "Record", path: Path) -> None:
    """A file that `python -m jobs.rule run --config` takes: the trial's whole configuration."""
    config = overlaid(base, keys_of(space, record.values), PLACE)
    sections = config.model_dump(include={"rule", "train", "generation"})
    path.parent.mkdir(exist_ok=True)
    text = f"# Trial {record.number} of a search.\n{yaml.safe_dump(sections, sort_keys=False)}"
    path.write_text(text, encoding="utf-8")


def _remembered(config: SearchConfig) -> dict[str, Any]:
    # a tracking address may hold a password: it comes from the environment or the command line again
    content = config.model_dump()
    content["tracking"]["uri"] = None
    return content


def _show(content: dict[str, Any]) -> None:
    from rich.console import Console

    from tune.report import table

    console = Console(width=None if Console().is_terminal else 160)
    console.print(table(content))
    for number, message in content["failures"].items():
        console.print(f"trial {number} failed: {message}", soft_wrap=True, highlight=False)


def _dry_run(config: SearchConfig) -> None:
    from jobs.rule import job, stages

    base, space = settled(config)
    usable(base, space)
    run = job.prepare(base, None, "")
    print(job.described(run.data))
    print(yaml.safe_dump(_remembered(config), sort_keys=False))
    stages.plan(run).show()
    stages.check(run)


if __name__ == "__main__":
    sys.exit(cli.main(app))
