"""`python -m jobs.oodface`: corrupt, evaluate, ask, draw."""

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

Quick = Annotated[bool, typer.Option("--quick", help="Severities 1, 3, 5 and the first 5 + 5 pairs of each fold.")]


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
    _do("corrupt", load(OodfaceConfig, profile, config or [], sets or []), out, fresh, dry_run)


def _about_pairs(what: str, told: str) -> None:
    """Adds a command that works on a list of pairs."""

    @app.command(what, help=told)
    def command(
        profile: cli.Profile = None,
        config: cli.ConfigFile = None,
        sets: cli.Set = None,
        quick: Quick = False,
        out: cli.Out = None,
        fresh: cli.Fresh = False,
        dry_run: cli.DryRun = False,
    ) -> None:
        loaded = load(OodfaceConfig, profile, config or [], [*(QUICK if quick else ()), *(sets or [])])
        _do(what, loaded, out, fresh, dry_run)


_about_pairs(
    "evaluate", "Ask face models whether pairs of faces are of one person, under every chosen scenario and severity."
)
_about_pairs(
    "ask", "Ask vision-language models, over OpenAI-style endpoints, whether pairs of faces are of one person."
)


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


def _do(what: str, config: OodfaceConfig, out: Path | None, fresh: bool, dry_run: bool) -> None:
    from jobs.oodface import job, run

    if dry_run:
        run.dry_run(config, what)
        return
    command = shlex.join(["python", "-m", "jobs.oodface", *sys.argv[1:]])
    print({"corrupt": job.corrupt, "evaluate": job.evaluate, "ask": job.ask}[what](config, out, fresh, command))


if __name__ == "__main__":
    sys.exit(cli.main(app))
