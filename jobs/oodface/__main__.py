"""`python -m jobs.oodface`: corrupt, evaluate, draw."""

import shlex
import sys
from pathlib import Path
from typing import Annotated

import typer

from cluster import cli
from cluster.config import load
from jobs.oodface.config import OodfaceConfig

app = typer.Typer(no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False, help=__doc__)
QUICK = ("oodface.severities=[1,3,5]", "oodface.evaluate.pairs_per_fold=5")


@app.command()
def corrupt(
    profile: cli.Profile = None,
    config: cli.ConfigFile = None,
    sets: cli.Set = None,
    out: cli.Out = None,
    fresh: cli.Fresh = False,
    dry_run: cli.DryRun = False,
) -> None:
    """Detect and align the faces of images, and write them under every chosen scenario and severity."""
    loaded = load(OodfaceConfig, profile, config or [], sets or [])
    from jobs.oodface import job

    if dry_run:
        job.dry_run(loaded, "corrupt")
        return
    print(job.corrupt(loaded, out, fresh, _command()))


@app.command()
def evaluate(
    profile: cli.Profile = None,
    config: cli.ConfigFile = None,
    sets: cli.Set = None,
    quick: Annotated[
        bool, typer.Option("--quick", help="Severities 1, 3, 5 and the first 5 + 5 pairs of each fold.")
    ] = False,
    out: cli.Out = None,
    fresh: cli.Fresh = False,
    dry_run: cli.DryRun = False,
) -> None:
    """Ask face models whether pairs of faces are of one person, under every chosen scenario and severity."""
    loaded = load(OodfaceConfig, profile, config or [], [*(QUICK if quick else ()), *(sets or [])])
    from jobs.oodface import job

    if dry_run:
        job.dry_run(loaded, "evaluate")
        return
    print(job.evaluate(loaded, out, fresh, _command()))


@app.command()
def draw(
    out: Annotated[Path, typer.Option("--out", help="A new folder.")],
    people: Annotated[int, typer.Option(min=1, max=100_000)] = 40,
    shots: Annotated[int, typer.Option(min=1, max=1000, help="Portraits a person.")] = 3,
    seed: Annotated[int, typer.Option(min=0, max=2**31)] = 0,
) -> None:
    """Draw portraits of people that do not exist, with pairs, to try the other commands without photographs."""
    from cluster.errors import paths_named
    from jobs.oodface import drawn

    with paths_named():
        print(drawn.write(out, people, shots, seed))


def _command() -> str:
    return shlex.join(["python", "-m", "jobs.oodface", *sys.argv[1:]])


if __name__ == "__main__":
    sys.exit(cli.main(app))
