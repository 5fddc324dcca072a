"""`python -m jobs.rule`: run, compare, attack, evaluate, passages, world."""

import shlex
import sys
from pathlib import Path
from typing import Annotated

import typer

from cluster import cli
from cluster.config import load
from jobs.rule.config import RuleConfig

app = typer.Typer(no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False, help=__doc__)


@app.command()
def run(
    profile: cli.Profile = None,
    config: cli.ConfigFile = None,
    sets: cli.Set = None,
    method: Annotated[
        str | None, typer.Option(help="RULE, RS, or another method, as NPO+KLR; short for --set rule.method=NAME.")
    ] = None,
    out: cli.Out = None,
    fresh: cli.Fresh = False,
    dry_run: cli.DryRun = False,
    shared: Annotated[
        Path | None,
        typer.Option(
            help="Folder in which runs of one comparison keep what is equal: the original's answers, stage 1."
        ),
    ] = None,
) -> None:
    """Unlearn a target: steer to refusals, then move the refusal boundary by reinforcement; report before and after."""
    chosen = [] if method is None else [f"rule.method={method}"]
    loaded = load(RuleConfig, profile, config or [], [*(sets or []), *chosen])
    from jobs.rule import job

    if dry_run:
        job.dry_run(loaded)
        return
    print(job.main(loaded, out, fresh, _command(), shared))


@app.command()
def compare(
    chosen: Annotated[
        str | None, typer.Option("--methods", help="Methods with commas between, each METHOD or METHOD@LEARNING_RATE.")
    ] = None,
    file: Annotated[
        Path | None,
        typer.Option("--entries", metavar="FILE", help="YAML file: labels, below each the keys in which it differs."),
    ] = None,
    model: Annotated[
        list[str] | None,
        typer.Option(metavar="NAME=DIR", help="A model unlearnt elsewhere, compared as it is; may be repeated."),
    ] = None,
    gold: Annotated[
        Path | None,
        typer.Option(help="Model directory that never saw what is to be forgotten, as a row."),
    ] = None,
    profile: cli.Profile = None,
    config: cli.ConfigFile = None,
    sets: cli.Set = None,
    out: cli.Out = None,
    fresh: cli.Fresh = False,
    dry_run: cli.DryRun = False,
) -> None:
    """Unlearn the target by several methods and show what each trades for what: table, plot, front, differences."""
    loaded = load(RuleConfig, profile, config or [], sets or [])
    from jobs.rule import compare as comparison
    from jobs.rule import entries

    found = entries.entries(chosen) if chosen is not None else []
    found += entries.from_file(file, loaded) if file is not None else []
    models = entries.named_models(model or [], ())
    if dry_run:
        comparison.dry_run(loaded, found, gold, models)
        return
    print(comparison.compare(loaded, found, out, fresh, _command(), gold, models))


@app.command()
def evaluate(
    model: Annotated[
        Path | None, typer.Option(help="Model directory to compare with the original; none: only that.")
    ] = None,
    gold: Annotated[
        Path | None, typer.Option(help="Model directory that never saw what was to be forgotten, for forget quality.")
    ] = None,
    profile: cli.Profile = None,
    config: cli.ConfigFile = None,
    sets: cli.Set = None,
    out: cli.Out = None,
    fresh: cli.Fresh = False,
    dry_run: cli.DryRun = False,
) -> None:
    """Every metric whose files lie in the data folder: probes, membership inference, utility sets, MUSE, TOFU."""
    loaded = load(RuleConfig, profile, config or [], sets or [])
    from jobs.rule import job

    if dry_run:
        job.dry_evaluation(loaded, model, gold)
        return
    print(job.evaluate(loaded, model, gold, out, fresh, _command()))


@app.command()
def attack(
    model: Annotated[
        list[str] | None, typer.Option(metavar="NAME=DIR", help="An unlearned model under a name; may be repeated.")
    ] = None,
    comparison: Annotated[
        Path | None, typer.Option(metavar="DIR", help="Folder of a finished comparison: its methods' best models.")
    ] = None,
    profile: cli.Profile = None,
    config: cli.ConfigFile = None,
    sets: cli.Set = None,
    out: cli.Out = None,
    fresh: cli.Fresh = False,
    dry_run: cli.DryRun = False,
) -> None:
    """Try to bring back what was forgotten: rewording, prefilling, sampling, quantisation, relearning."""
    loaded = load(RuleConfig, profile, config or [], sets or [])
    from jobs.rule import attack as attacks

    if dry_run:
        attacks.dry_run(loaded, attacks.chosen(model or [], comparison), comparison)
        return
    print(attacks.attack(loaded, attacks.chosen(model or [], comparison), out, fresh, _command(), comparison))


@app.command()
def passages(
    out: Annotated[Path, typer.Option(help="Folder that gets positive.json, retain.json and pair.json.")],
    profile: cli.Profile = None,
    config: cli.ConfigFile = None,
    sets: cli.Set = None,
    dry_run: cli.DryRun = False,
) -> None:
    """Have the original model write the texts that the baselines train on; others.json in the data names the others."""
    loaded = load(RuleConfig, profile, config or [], sets or [])
    from jobs.rule import passages as texts

    if dry_run:
        texts.dry_run(loaded, out)
        return
    for path in texts.passages(loaded, out):
        print(path)


@app.command()
def world(out: Annotated[Path, typer.Option(help="New folder that gets model, gold, data and world.yaml.")]) -> None:
    """Make a small world of made-up people, with a model that never heard of the target, to try and rank methods in."""
    from jobs.rule import world as worlds

    print(worlds.make(out))


def _command() -> str:
    return shlex.join(["python", "-m", "jobs.rule", *sys.argv[1:]])


if __name__ == "__main__":
    sys.exit(cli.main(app))
