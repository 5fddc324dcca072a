"""`python -m tune.rule`: search RULE's rewards, boundary data and training settings with Ray Tune."""

import shlex
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import typer
import yaml

from cluster import cli
from cluster.config import load
from cluster.errors import TryAgain, UserError, paths_named
from cluster.report import digest, read_json
from tune.records import RUNNING, STOPPED, recorded, trial_folder
from tune.rule_space import SETTINGS, SearchConfig, remembered, settled, usable, without_halving

FREE_ON_RESUME = ("tune.rule.trials=", "tune.rule.max_concurrent=", "cluster.", "tracking.")

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
    from tune.rule_search import searched

    own.config = own.config.model_copy(update={"tracking": config.tracking})
    with job.exclusively(own.folder):
        try:
            content = searched(config, base, space, own, shapes)
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
    told = [trial["number"] for trial in known["trials"] if trial["state"] != RUNNING]
    ended = [record.number for record in recorded(folder) if record.state != RUNNING]
    return told == ended and len(ended) >= trials


def _show(content: Mapping[str, Any]) -> None:
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
    print(yaml.safe_dump(remembered(config, base), sort_keys=False))
    print(without_halving(base, config), end="")
    stages.plan(run).show()
    stages.check(run)


if __name__ == "__main__":
    sys.exit(cli.main(app))
