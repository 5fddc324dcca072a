"""RULE from a configuration to a report: read top to bottom like the paper's method section."""

from collections import Counter
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cluster import models, runs, session
from cluster.errors import paths_named
from cluster.generation import require_hardware
from cluster.recorder import HISTORY, peaks
from cluster.report import digest, read_json, read_lines, write_json, write_lines
from cluster.runs import claim, exclusively
from cluster.tracking import Tracker, masked
from jobs.rule import methods, shared, stages
from jobs.rule import report as reporting
from jobs.rule.benchmarks import Benchmarks, check_benchmarks, load_benchmarks
from jobs.rule.boundary import with_boundary
from jobs.rule.config import RuleConfig
from jobs.rule.corpora import Sample, load_corpora
from jobs.rule.data import Probe, RuleData, data_folder, load_data, read_items
from jobs.rule.evaluate import (
    Examination,
    Examined,
    against_gold,
    check_lengths,
    examine,
    packed,
    score,
    unpacked,
)
from jobs.rule.in_context import in_form
from jobs.rule.trace import Trace, trace_of
from jobs.scoring.entailment import resolve_entailment
from jobs.scoring.judge import Judge

if TYPE_CHECKING:
    from ray.train import UserCallback

UNREGISTERED = "report-unregistered.json"  # the report until the registry has the model
EVALUATION_LIMIT_S = 6 * 3600
LOCK_WAIT_S = 60  # the process of a trial or of a compared run outlives a killed driver by seconds
PACKAGES = ("torch", "transformers", "trl", "ray", "numpy", "rouge", "rouge-score")  # whose version can change a figure


@dataclass
class Run(runs.Run):
    """One run's folder, and what is already known in it: `state.json` survives the driver."""

    config: RuleConfig
    data: RuleData
    source: models.ModelSource
    folder: Path
    command: str
    corpora: Mapping[str, tuple[Sample, ...]] = field(default_factory=dict)
    benchmarks: Benchmarks | None = None
    entailment: models.ModelSource | None = None
    shared: Path | None = None
    trace: Trace | None = None
    callbacks: Sequence["UserCallback"] = ()
    state: dict[str, Any] = field(default_factory=dict)


def main(
    config: RuleConfig,
    out: Path | None = None,
    fresh: bool = False,
    command: str = "",
    shared_folder: Path | None = None,
) -> Path:
    """Unlearns one target; returns the path of report.json.

    `shared_folder` keeps what runs of one comparison have in common (`jobs.rule.shared`).

    Raises:
        UserError: what its author can mend in configuration, data or model.
        JobFailure: a stage failed for good.
    """
    with paths_named():
        run = prepare(config, out, command)
        if fresh or not runs.is_finished(run):
            stages.check(run, run.folder if fresh else None)
        claim(run, fresh)
    run.shared = shared_folder
    finished = run.folder / "report.json"
    known = read_json(finished)
    if known is not None and _judge(known["configuration"]) == _judge(masked(config.model_dump(mode="json"))):
        print(f"this run is finished (--fresh starts it over): {run.folder}")
        show(known)
        return finished
    wait_s = 0 if shared_folder is None else LOCK_WAIT_S
    with exclusively(run.folder, wait_s):
        claim(run, fresh=False)  # again: a driver that was waited for wrote on as it left
        with session.connected(config), tracked(run, "rule") as tracker:
            if known is not None:
                run.save(judgements=run.state.get("judgements", 0) + 1)
            examined = {"original": evaluated(run, "original", run.source.path)}
            run.trace = trace_of(config.rule, examined["original"].answers, run.source.path, run.data.target)
            for stage, model in stages.unlearning(run, tracker):
                examined[stage] = evaluated(run, stage, model)
            return conclude(run, tracker, examined, model)


def evaluate(
    config: RuleConfig,
    model: Path | None,
    gold: Path | None = None,
    out: Path | None = None,
    fresh: bool = False,
    command: str = "",
) -> Path:
    """Every metric of docs/rule.md whose files are there, for the original and for `model`; returns report.json.

    `gold` is a model that never saw what was to be forgotten: it is asked the same, and TOFU's forget quality compares
    the others with it.
    """
    config = config.alone()
    with paths_named():
        run, checkpoints = _evaluation(config, model, gold, out, command)
        claim(run, fresh)
    finished = run.folder / "report.json"
    if finished.exists():
        show(read_json(finished))
        return finished
    with exclusively(run.folder), session.connected(config), tracked(run, "rule-evaluate") as tracker:
        examined = {"original": evaluated(run, "original", run.source.path)}
        for stage, one in checkpoints.items():
            examined[stage] = evaluated(run, stage, one.path)
        return conclude(run, tracker, examined, None)


def dry_evaluation(config: RuleConfig, model: Path | None, gold: Path | None) -> None:
    """Checks what `evaluate` would, and prints what it would ask of which models."""
    with paths_named():
        run, checkpoints = _evaluation(config.alone(), model, gold, None, "")
    print_settings(run)
    measures = ", ".join(run.benchmarks.rows() if run.benchmarks else ()) or "none; no such files in the data"
    print(f"{len(chosen_probes(run))} probes; other measures: {measures}")
    print(f"models: {', '.join(['original', *checkpoints])}")


def _evaluation(
    config: RuleConfig, model: Path | None, gold: Path | None, out: Path | None, command: str
) -> tuple[Run, dict[str, models.ModelSource]]:
    folder = data_folder(config.rule.data)
    named = {"unlearned": ("--model", model), "gold": ("--gold", gold)}
    checkpoints = {
        stage: in_form(config.rule, models.resolve_directory(path, option), folder)
        for stage, (option, path) in named.items()
        if path is not None
    }
    pinned = digest([[stage, one.name, one.version] for stage, one in checkpoints.items()])
    run = prepare(config, out, command, what=f"evaluate-{pinned[:6]}", benchmarked=True)
    for one in checkpoints.values():
        check_lengths(one.path, chosen_probes(run), config.rule.evaluation)
    if run.benchmarks is not None:
        for one in (run.source, *checkpoints.values()):
            check_benchmarks(run.benchmarks, one.path, run.data.folder)
    return run, checkpoints


def prepare(config: RuleConfig, out: Path | None, command: str, what: str = "", benchmarked: bool = False) -> Run:
    """Reads data and model; what is wrong with them is found here, before anything is started or written."""
    session.prepare(config)
    require_hardware(config.generation, config.train)
    rule = config.rule
    if rule.evaluation.judge is not None:
        Judge(rule.evaluation.judge)
    data = load_data(rule.data, rule.target, rule.held_out_share, rule.seed)
    if not what:
        data = with_boundary(data, rule.boundary, rule.seed, partial(read_items, target=data.target))
    benchmarks = load_benchmarks(data.folder) if benchmarked and data.folder is not None else None
    source = in_form(rule, models.resolve(rule.model, rule.revision), data.folder)
    method = methods.find(rule.method)
    corpora = {} if method is None or what else load_corpora(data, method)
    dials = config.model_dump(include={"rule", "train", "generation"})
    if not what:
        dials["rule"]["evaluation"].pop("judge")  # another one judges the same answers
    texts = {name: [vars(sample) for sample in samples] for name, samples in corpora.items()}
    nli = rule.evaluation.entailment and resolve_entailment(rule.evaluation.entailment, "rule.evaluation.entailment")
    parts = [shared.VERSION, dials, source.name, source.version, data_digest(data), texts, what]
    parts += [benchmarks.rows()] if benchmarks else []
    parts += [nli.version] if nli else []
    identity = digest(parts)
    folder = out or session.storage(config) / "rule" / f"{what}{'-' if what else ''}{identity}"
    run = Run(
        config,
        data,
        source,
        folder.resolve(),
        command,
        corpora,
        benchmarks,
        nli,
        state={"identity": identity},
    )
    check_lengths(source.path, chosen_probes(run), rule.evaluation)
    return run


def _judge(configuration: Mapping[str, Any]) -> Any:
    return configuration["rule"]["evaluation"]["judge"]


def data_digest(data: RuleData) -> str:
    """What pins the questions that a run saw."""
    parts = [[vars(row) for row in rows] for rows in (data.refusals, data.items, data.probes)]
    return digest([data.target, parts])


def tracked(run: Run, name: str, parent: str | None = None) -> AbstractContextManager[Tracker]:
    """The job's MLflow run; see `runs.tracked`."""
    parameters = run.config.model_dump(include={"rule", "train", "generation"})
    parameters["rule"]["evaluation"].pop("judge")  # it may change, and stands in the report
    tags = {"data_digest": data_digest(run.data), "target": run.data.target, "model": run.source.name}
    return runs.tracked(run, name, parameters, tags, parent)


def evaluated(run: Run, stage: str, model: Path) -> Examined:
    """The model's answers and perplexities, asked once a run and kept in `answers/STAGE.json`."""
    kept = run.folder / "answers" / f"{stage}.json"
    known = read_json(kept)
    if known is None:
        rule = run.config.rule
        task = Examination(
            model,
            run.source.path,
            chosen_probes(run),
            rule.evaluation,
            run.config.generation,
            run.config.train,
            rule.seed,
            run.benchmarks,
            run.entailment and run.entailment.path,
            rule.stop,
        )

        def asked() -> dict:
            with run.phase(f"evaluation of {stage}"):
                return packed(session.on_worker(examine, run.config, task, seconds=EVALUATION_LIMIT_S))

        pinned = [run.source.name, run.source.version, run.entailment and run.entailment.version]
        parts = [shared.VERSION, *pinned, vars(task) | {"model": None, "original": None, "entailment": None}]
        known = shared.once(run.shared if stage == "original" else None, "answers", parts, asked)
        write_json(known, kept)
    return unpacked(known)


def chosen_probes(run: Run) -> tuple[Probe, ...]:
    """All probes, neighbours cut to `rule.evaluation.neighbors` a kind where that is set."""
    limit = run.config.rule.evaluation.neighbors
    if limit is None:
        return run.data.probes
    seen: dict[str, int] = {}
    chosen = []
    for probe in run.data.probes:
        seen[probe.kind] = seen.get(probe.kind, 0) + 1
        if not probe.kind.startswith("neighbor") or seen[probe.kind] <= limit:
            chosen.append(probe)
    return tuple(chosen)


def conclude(run: Run, tracker: Tracker, examined: dict[str, Examined], unlearned: Path | None) -> Path:
    """Scores, report.json, tables, plots, samples, model card; the same to MLflow."""
    from jobs.rule.plots import plots

    rule, folder = run.config.rule, run.folder
    original = examined["original"].answers
    with run.phase("scoring"):
        metrics = {
            stage: score(one, original, run.data.target, rule.evaluation, run.source.path, rule.seed)
            for stage, one in examined.items()
        }
        for stage, found in against_gold(examined, rule.seed).items():
            metrics[stage] |= found
    history = read_lines(folder / HISTORY)
    content = provenance(run, tracker) | {
        "job": "evaluate" if unlearned is None else "run",
        "method": rule.method,
        "metrics": {stage: {name: m.to_json() for name, m in found.items()} for stage, found in metrics.items()},
        "seconds": run.state["seconds"],
        "step_seconds": reporting.step_seconds(history),
        "peak_memory_gib": {stage: round(one.peak_memory_gib, 2) for stage, one in examined.items()} | peaks(folder),
    }
    if on_gpus := peaks(folder, "gpu_gib"):
        content["peak_gpu_memory_gib"] = on_gpus
    for path in plots(content, history, folder / "plots"):
        tracker.artifact(path, "plots")
    for stage, one in examined.items():
        rows = [answer.to_json() for answer in one.answers]
        write_lines(rows, folder / "samples" / f"{stage}.jsonl")
        tracker.samples(rows, stage)
        flat = {name: metric.value for name, metric in metrics[stage].items()}
        # MLflow keeps what a step has: what another judge says is a later step's
        step = list(examined).index(stage) + len(examined) * run.state.get("judgements", 0)
        tracker.metrics(flat, step=step, stage="evaluation")
    if unlearned is not None:
        reporting.write_markdown(content, unlearned / "README.md")
        write_json(content, folder / UNREGISTERED)  # the registry may refuse what took hours
        name = run.config.tracking.register_as or registered_name(run)
        content["registered_model"] = {"name": name, "alias": "unlearned"}
        content["registered_model"]["version"] = tracker.model(unlearned, name, "unlearned")
        content["checkpoint"] = str(unlearned)
    path = runs.publish(content, folder, tracker)
    (folder / UNREGISTERED).unlink(missing_ok=True)
    show(content)
    return path


def provenance(run: Run, tracker: Tracker) -> dict[str, Any]:
    """What every report of this system begins with: of what it tells, and what made it."""
    return {
        "system": "rule",
        "targets": [run.data.target],
        "model": run.source.name,
        "model_version": run.source.version,
        "data_digests": {run.config.rule.data: data_digest(run.data)},
    } | runs.provenance(run, tracker, PACKAGES)


def registered_name(run: Run) -> str:
    """The registry's name of a run's model where the configuration gives none."""
    return f"rule-{run.data.target.lower().replace(' ', '-')}"


def dry_run(config: RuleConfig) -> None:
    """Prints the resolved configuration and the plans; refuses a plan that cannot fit."""
    with paths_named():
        run = prepare(config, None, "")
    print_settings(run)
    stages.plan(run).show()
    stages.check(run)


def print_settings(run: Run) -> None:
    """What was read, and the resolved configuration."""
    import yaml

    print(described(run.data))
    print(yaml.safe_dump(masked(run.config.model_dump()), sort_keys=False))


def described(data: RuleData) -> str:
    """One line: whom the data are about, and how many questions of each kind there are."""
    sides = Counter(f"{item.label} {item.form}" for item in data.items)
    kinds = Counter(probe.kind for probe in data.probes)
    counted = [", ".join(f"{count} {name}" for name, count in found.items()) for found in (sides, kinds)]
    return f"{data.target}: {len(data.refusals)} refusals; training questions: {counted[0]}; probes: {counted[1]}"


def show(content: dict) -> None:
    """The tables of a report on the console."""
    from rich.console import Console

    console = Console(width=None if Console().is_terminal else 110)
    console.print(reporting.table(content))
    other = reporting.other_table(content)
    if other is not None:
        console.print(other)
