"""`python -m jobs.rule compare`: the same target unlearned by several methods, and what each trades for what.

Every method is an ordinary run in a process of its own, as many at once as the cluster has room for. They share the
original's answers and stage 1. The same command again continues, and takes the finished ones as they are; a method that
fails is recorded and does not end the others.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from cluster import cli, models, runs, session
from cluster.errors import JobFailure, UserError, paths_named
from cluster.memory import GIB
from cluster.report import digest, read_json
from cluster.tracking import Tracker
from jobs.rule import children, costs, job, stages, tradeoff
from jobs.rule.config import RuleConfig
from jobs.rule.data import data_folder
from jobs.rule.entries import Entry, require_distinct, slug
from jobs.rule.evaluate import Examined, check_lengths, score
from jobs.rule.gold import Gold, gold_scores
from jobs.rule.in_context import in_form
from jobs.rule.tofu import load_tofu
from jobs.rule.trace import require_probes


def compare(
    config: RuleConfig,
    chosen: Sequence[Entry],
    out: Path | None,
    fresh: bool,
    command: str,
    gold: Path | None = None,
    checkpoints: Mapping[str, Path] = {},
) -> Path:
    """Runs what has no finished run yet, and writes the comparison; returns the path of its report.json.

    `gold`, a model that never saw what was to be forgotten, is asked the same and gets a row of its own; `checkpoints`,
    models that were unlearnt elsewhere, by name, are compared like the methods.

    Raises:
        UserError: what `jobs.rule.job.main` would refuse of any entry, or an entry that was trained on other texts,
            before any starts.
        JobFailure: no method finished.
    """
    with paths_named():
        run, own, pinned, others = _prepared(config, chosen, out, command, gold, checkpoints, fresh)
        for prepared in own.values():  # reads the corpora also where a method does not
            costs.data_used(prepared)
        job.claim(run, fresh)
        _require_same_texts(own)
    run.shared = run.folder / "shared"
    known = read_json(run.folder / "report.json")
    versions = {name: source.version for name, source in others.items()}
    asked = [entry.name for entry in chosen], versions
    if known is not None and not known["failures"] and (known["methods"], known["model_versions"]) == asked:
        print(f"this comparison is finished (--fresh starts it over): {run.folder}")
        show(known)
        return run.folder / "report.json"
    with (
        job.exclusively(run.folder),
        session.connected(config),
        job.tracked(run, "rule-compare") as tracker,
    ):
        original = job.evaluated(run, "original", run.source.path)
        tradeoff.require_known(original.answers, config.rule.evaluation.known_threshold)
        failures: dict[str, str] = {}
        if pinned is not None:  # before hours of training: without it there is no report
            ideal = _model_outcome(run, tradeoff.GOLD, pinned.source, original)
            gold_scores(run, {}, pinned, versions, failures)
        failures |= children.trained(own, run.shared)
        outcomes = _outcomes(run, own, others, original, failures)
        if not outcomes:
            raise JobFailure(f"no method finished; the first: {next(iter(failures.values()))}")
        if pinned is not None:
            outcomes.append(ideal)
        content = job.provenance(run, tracker) | _content(own, failures) | {"model_versions": versions}
        content |= tradeoff.summary(outcomes, config.rule.seed)
        if pinned is not None:
            best = {name: Path(content["models"][name]) for name in content["best"].values()}
            scored = gold_scores(run, {"original": run.source.path} | best, pinned, versions, failures)
            content["failures"] = failures
            content["against_gold"] = {
                name: {key: metric.to_json() for key, metric in found.items()} for name, found in scored.items()
            }
        path = _concluded(run, tracker, content)
    show(content)
    return path


def _outcomes(
    run: job.Run,
    own: Mapping[Entry, job.Run],
    others: Mapping[str, models.ModelSource],
    original: Examined,
    failures: dict[str, str],
) -> list[tradeoff.Outcome]:
    """What became of each entry that did not fail, and of each other model; what fails of these joins `failures`."""
    threshold = run.config.rule.evaluation.known_threshold
    found = [
        tradeoff.outcome(entry.name, entry.group, one.folder, threshold, costs.spent(one), costs.data_used(one))
        for entry, one in own.items()
        if entry.name not in failures
    ]
    for name, source in others.items():
        try:
            found.append(_model_outcome(run, name, source, original))
        except Exception as error:  # whatever a foreign model brings: the others go on
            failures[name] = cli.sentence(cli.root_cause(error))
    return found


def _concluded(run: job.Run, tracker: Tracker, content: dict[str, Any]) -> Path:
    """report.json and plot; the same to MLflow."""
    attempt = run.state.get("attempts", 0)  # MLflow keeps what a step has
    for name, metrics in content["metrics"].items():
        found = metrics | content.get("against_gold", {}).get(name, {})
        tracker.metrics({key: metric["value"] for key, metric in found.items()}, step=attempt, stage=slug(name))
    run.save(attempts=attempt + 1)
    plot = run.folder / "plots" / "tradeoff.png"
    plot.parent.mkdir(exist_ok=True)
    tradeoff.figure(content).savefig(plot, dpi=150)
    tracker.artifact(plot)
    return runs.publish(content, run.folder, tracker)


def dry_run(
    config: RuleConfig, chosen: Sequence[Entry], gold: Path | None, checkpoints: Mapping[str, Path] = {}
) -> None:
    """Checks what `compare` would, and prints what each entry would train."""
    from rich.console import Console
    from rich.table import Table

    with paths_named():
        run, own, _, others = _prepared(config, chosen, None, "", gold, checkpoints)
    job.print_settings(run)
    columns = ("entry", "optimiser steps", "peak of a worker, GiB", "checkpoints on disk, GiB")
    table = Table(*columns, title="Plan of each run")
    for entry, prepared in own.items():
        plan = stages.plan(prepared)
        steps = " + ".join(str(batch.optimiser_steps) for batch in plan.batches) or "0"
        peak = max((memory.per_worker for memory in plan.memory.values()), default=0)
        disk = max((memory.checkpoint for memory in plan.memory.values()), default=0)
        table.add_row(entry.name, steps, f"{peak / GIB:.2f}", f"{disk / GIB:.2f}")
    for name in others:
        table.add_row(name, "a finished model", "-", "-")
    Console().print(table)


def _prepared(
    config: RuleConfig,
    chosen: Sequence[Entry],
    out: Path | None,
    command: str,
    gold: Path | None,
    checkpoints: Mapping[str, Path],
    fresh: bool = False,
) -> tuple[job.Run, dict[Entry, job.Run], Gold | None, dict[str, models.ModelSource]]:
    """The comparison, the run of each entry, the gold model and the others: checked, before anything is written.

    Which entries are compared is no part of the folder's name: one that is added later finds the others trained.
    """
    if not chosen and not checkpoints:
        raise UserError("compare needs --methods, --entries or --model NAME=DIR: something to compare")
    require_distinct(chosen, checkpoints)
    pinned = None
    own = {entry: job.prepare(entry.applied(config), None, command) for entry in chosen}
    what = "compare"
    folder = data_folder(config.rule.data)
    others = {
        name: in_form(config.rule, models.resolve_directory(path, "--model"), folder)
        for name, path in checkpoints.items()
    }
    if gold is not None:
        source = in_form(config.rule, models.resolve_directory(gold, "--gold"), folder)
        pinned = Gold(source, folder and load_tofu(folder))
        what += f"-{digest(pinned.identity())[:6]}"
    run = job.prepare(config, out, command, what=what)
    require_probes(run.data.probes)
    for entry, prepared in own.items():
        prepared.folder = run.folder / "runs" / entry.slug
        if fresh or not runs.is_finished(prepared):
            stages.check(prepared, run.folder if fresh else None)
    asked = others | ({"gold": pinned.source} if pinned else {})
    for name, source in asked.items():
        check_lengths(source.path, job.chosen_probes(run), config.rule.evaluation, name)
    return run, own, pinned, others


def _require_same_texts(own: Mapping[Entry, job.Run]) -> None:
    """Raises UserError where the comparison's folder holds an entry that was trained otherwise."""
    for entry, prepared in own.items():
        state = read_json(prepared.folder / runs.STATE)
        if state is not None and state.get("identity") != prepared.state["identity"]:
            raise UserError(
                f"{prepared.folder} holds {entry.name} of other settings than it has now, or trained on other texts "
                f"than {prepared.config.rule.data} has; take another label or --out, or --fresh to train all entries "
                "of this folder again"
            )


def show(content: dict[str, Any]) -> None:
    """The table, what is decided, and what failed."""
    from rich.console import Console

    console = Console(width=None if Console().is_terminal else 130)
    console.print(tradeoff.table(content))
    console.print(tradeoff.areas(content), soft_wrap=True, highlight=False, markup=False)
    for sentence in (*tradeoff.verdicts(content), *(f"{n} failed: {why}" for n, why in content["failures"].items())):
        console.print(sentence, soft_wrap=True, highlight=False, markup=False)


def _model_outcome(run: job.Run, name: str, model: models.ModelSource, original: Examined) -> tradeoff.Outcome:
    """A finished model asked the same probes as the methods; its answers are kept by its content."""
    evaluation, rule = run.config.rule.evaluation, run.config.rule
    examined = job.evaluated(run, f"{name}-{digest(model.version)[:8]}", model.path)
    metrics = score(examined, original.answers, run.data.target, evaluation, run.source.path, rule.seed)
    answers, threshold = examined.answers, evaluation.known_threshold
    return tradeoff.model_outcome(name, model.path, answers, original.answers, threshold, metrics)


def _content(own: Mapping[Entry, job.Run], failures: Mapping[str, str]) -> dict[str, Any]:
    reports = {
        entry.name: read_json(one.folder / "report.json") for entry, one in own.items() if entry.name not in failures
    }
    return {
        "job": "compare",
        "methods": [entry.name for entry in own],
        "failures": dict(failures),
        "seconds": {name: report["seconds"] for name, report in reports.items()},
        "peak_memory_gib": {name: report["peak_memory_gib"] for name, report in reports.items()},
    }
