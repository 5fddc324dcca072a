"""`python -m jobs.rule attack`: how much of what was forgotten comes back, and by which attack.

Every model is asked the same known forget probes: plainly, reworded, prefilled, sampled, quantised, and after a few
steps of relearning on other forget questions with their true answers. What is done is kept, so that the same command
goes on where it was ended.
"""

import math
import re
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from cluster import models, session, training
from cluster.errors import UserError, paths_named
from cluster.generation import chosen_engine
from cluster.plan import Plan
from cluster.recorder import HISTORY, Recorder
from cluster.report import Metric, digest, read_json, read_lines, write_json
from cluster.tracking import Tracker
from jobs.rule import attack_report, job, tradeoff
from jobs.rule.attacks import PLAIN, QUANTISED, REWORDINGS, AttackTask, attacked
from jobs.rule.config import RuleConfig, Steering
from jobs.rule.data import Probe, Refusal, data_folder
from jobs.rule.evaluate import check_lengths
from jobs.rule.in_context import in_form
from jobs.rule.pareto import paired_difference
from jobs.rule.plan import rule_plan
from jobs.rule.probes import Answer
from jobs.rule.trace import Trace, known_probes
from jobs.scoring.intervals import mean_interval

ORIGINAL = "original"
RELEARNING = "relearning"
KINDS = ("forget_fb", "forget_qa")  # attacks of the data's own (forget_aa) would be attacked twice
LONGEST = max(REWORDINGS.values(), key=lambda reword: len(reword("")))
LIMIT_S = 6 * 3600
NAME = re.compile(r"[\w+@-][\w.+@-]*")


def chosen(named: Sequence[str], comparison: Path | None) -> dict[str, Path]:
    """Name -> directory, from NAME=DIR texts and from the best runs of a finished comparison.

    Raises:
        UserError: neither is given, a text of another form, a name twice, a folder that holds no comparison.
    """
    found: dict[str, Path] = {}
    if comparison is not None:
        report = read_json(comparison / "report.json")
        if not isinstance(report, dict) or report.get("job") != "compare":
            raise UserError(f"--comparison {comparison} holds no finished comparison; name its folder")
        found = {name: Path(report["runs"][name]) / "model" for name in report["best"].values()}
    for text in named:
        name, equals, folder = text.partition("=")
        if not equals or not NAME.fullmatch(name):
            raise UserError(
                f"--model {text} is not of the form NAME=DIR, NAME of letters, digits and . + @ - _, no dot first"
            )
        if name in found or name == ORIGINAL:
            raise UserError(f"--model {text}: there is a model {name} already; take another name")
        found[name] = Path(folder)
    if not found:
        raise UserError("attack needs models: --model NAME=DIR, or --comparison DIR for the best runs of a comparison")
    return found


def attack(config: RuleConfig, named: Mapping[str, Path], out: Path | None, fresh: bool, command: str) -> Path:
    """Attacks every model, the original as well, and writes the report; returns its path.

    Raises:
        UserError: a model that cannot be read or is too short of context, too few known probes, or no room to relearn.
    """
    with paths_named():
        run, paths, plan = _prepared(config, named, out, command)
        plan.require_fit()
        job.claim(run, fresh)
    rule = config.rule
    known = read_json(run.folder / "report.json")
    if known is not None:
        print(f"these attacks are finished (--fresh starts them over): {run.folder}")
        attack_report.show(known)
        return run.folder / "report.json"
    with job.exclusively(run.folder), session.connected(config), job.tracked(run, "rule-attack") as tracker:
        answers = job.evaluated(run, ORIGINAL, run.source.path).answers
        tradeoff.require_known(answers, config.rule.evaluation.known_threshold)
        lessons, probes = split(answers, config)
        scores = {name: _scores(run, name, path, probes) for name, path in paths.items()}
        curves = {name: _relearned(run, tracker, name, path, lessons, probes, answers) for name, path in paths.items()}
        for name, curve in curves.items():
            scores[name][f"{RELEARNING}/{len(lessons)} answers"] = curve["scores"]
        content = job.provenance(run, tracker) | {
            "job": "attack",
            "metrics": _metrics(scores, rule.seed),
            "relearning": {name: curve["steps"] for name, curve in curves.items()},
            "seconds": run.state["seconds"],
        }
        plot = run.folder / "plots" / "attacks.png"
        plot.parent.mkdir(exist_ok=True)
        attack_report.figure(content).savefig(plot, dpi=150)
        for name, found in content["metrics"].items():
            tracker.metrics({key: metric["value"] for key, metric in found.items()}, step=0, stage=name)
        path = write_json(content, run.folder / "report.json")
        for artifact in (plot, path):
            tracker.artifact(artifact)
    attack_report.show(content)
    return path


def dry_run(config: RuleConfig, named: Mapping[str, Path]) -> None:
    """Checks what `attack` would, and prints the models and what relearning would take."""
    with paths_named():
        run, paths, plan = _prepared(config, named, None, "")
    job.print_settings(run)
    print(f"models: {', '.join(paths)}")
    for stage, memory in plan.memory.items():  # the batches are those of the relearning, and known when answers are
        Plan((), {f"{RELEARNING}, as {stage}": memory}).show()
    plan.require_fit()


def _prepared(
    config: RuleConfig, named: Mapping[str, Path], out: Path | None, command: str
) -> tuple[job.Run, dict[str, Path], Plan]:
    rule = config.rule
    if config.train.strategy == "fsdp":
        raise UserError(
            "attack asks models in training, which train.strategy = fsdp does not let it; take ddp, and for a large "
            "model adapters (train.lora)"
        )
    folder = data_folder(rule.data)
    sources = {name: in_form(rule, models.resolve_directory(path, "--model"), folder) for name, path in named.items()}
    pinned = digest([[name, source.version] for name, source in sources.items()])
    run = job.prepare(config, out, command, what=f"attack-{pinned[:6]}")
    longest = [replace(probe, query=LONGEST(probe.query)) for probe in run.data.probes if probe.kind in KINDS]
    for source in sources.values():
        check_lengths(source.path, longest, rule.evaluation)
    paths = {ORIGINAL: run.source.path} | {name: source.path for name, source in sources.items()}
    return run, paths, rule_plan(config, run.data, run.source.path, ("steering",))


def split(answers: Sequence[Answer], config: RuleConfig) -> tuple[tuple[Refusal, ...], tuple[Probe, ...]]:
    """Questions with their true answers to relearn from, and the probes that every attack asks: known ones.

    A fact stands in several of them: a question with an answer that is relearnt is not asked.

    Raises:
        UserError: fewer than two known probes are left to ask.
    """
    wanted = config.rule.attack.relearn_answers
    threshold = config.rule.evaluation.known_threshold
    by_answer: dict[str, list[Probe]] = {}
    for probe in known_probes(answers, threshold, None):
        if probe.kind in KINDS:
            by_answer.setdefault(probe.answer.casefold().strip(), []).append(probe)
    facts = list(by_answer.values())
    taken = {index * len(facts) // wanted for index in range(wanted)}
    lessons = [Refusal(facts[index][0].query, facts[index][0].answer, index) for index in sorted(taken)]
    asked = [probe for index, probes in enumerate(facts) if index not in taken for probe in probes]
    if len(asked) < 2:
        raise UserError(
            f"rule.attack.relearn_answers = {wanted} of the {len(facts)} different answers to known forget probes "
            f"leave {len(asked)} probes to ask; lower it, or bring more questions that the original answers"
        )
    return tuple(lessons), tuple(asked)


def _scores(run: job.Run, name: str, path: Path, probes: tuple[Probe, ...]) -> dict[str, list[float]]:
    rule, config = run.config.rule, run.config
    everything = (None, *rule.attack.bits)
    # vLLM does not let go of a GPU, so that every engine gets a process of its own
    alone = chosen_engine(config.generation, config.train) == "vllm"
    found: dict[str, list[float]] = {}
    for bits in [(one,) for one in everything] if alone else [everything]:
        kept = run.folder / "attacks" / name / f"asked-{'-'.join(str(one or 'full') for one in bits)}.json"
        known = read_json(kept)
        if known is None:
            print(f"asking {name}", flush=True)
            task = AttackTask(
                path,
                probes,
                rule.attack,
                rule.evaluation,
                config.generation,
                config.train,
                rule.seed,
                kept.parent,
                bits,
            )
            kept.parent.mkdir(parents=True, exist_ok=True)
            for left in kept.parent.glob(f"{QUANTISED}*"):  # by a worker that was killed
                shutil.rmtree(left, ignore_errors=True)
            with run.phase(f"asking {name}, {kept.stem}"):
                known = session.on_worker(attacked, config, task, seconds=LIMIT_S)
            write_json(known, kept)
        found |= known
    return found


def _relearned(
    run: job.Run,
    tracker: Tracker,
    name: str,
    path: Path,
    lessons: tuple[Refusal, ...],
    probes: tuple[Probe, ...],
    original: Sequence[Answer],
) -> dict[str, Any]:
    """Recall after each few steps of relearning, and the recall of each probe after the last."""
    from jobs.rule.steering import SteeringTask, steer

    rule, config = run.config.rule, run.config
    folder = run.folder / "attacks" / name
    kept = folder / f"{RELEARNING}.json"
    known = read_json(kept)
    if known is not None:
        return known
    settings = rule.attack
    workers = config.train.num_workers
    batch = workers * max(1, min(len(lessons), 8) // workers)
    steering = Steering(
        learning_rate=settings.relearn_learning_rate,
        epochs=settings.relearn_steps / math.ceil(len(lessons) / batch),
        stop_after_epochs=None,
        batch_size=batch,
        warmup_steps=0,
        schedule="constant",
        max_tokens=rule.steering.max_tokens,
    )
    limit = rule.trace.probes or len(probes)
    others = [p for p in known_probes(original, rule.evaluation.known_threshold, limit) if "forget" not in p.kind]
    trace = Trace(settings.relearn_every, (*probes, *others), rule.evaluation, rule.stop)
    task = SteeringTask(
        path,
        folder / "relearned",
        lessons,
        (),
        steering,
        config.train,
        config.generation,
        rule.rebo.max_completion_tokens,
        rule.rebo.temperature,
        rule.rebo.top_p,
        rule.seed,
        trace=trace,
    )
    stage = f"{RELEARNING}-{name}"
    recorder = Recorder(stage, folder, settings.relearn_steps, tracker.uri, tracker.run_id)
    with run.phase(f"{RELEARNING} of {name}"):
        training.fit(steer, task, recorder, config.train)
    shutil.rmtree(task.output, ignore_errors=True)
    steps = {
        str(row["step"]): {"forget": 1 - row["forgotten"], "retain": row["retained"]}
        for row in read_lines(folder / HISTORY)
        if "forgotten" in row
    }
    recalls = [1 - value for value in read_json(max((folder / "looks").iterdir()))["forgotten"]]
    return read_json(write_json({"steps": steps, "scores": recalls}, kept))


def _metrics(scores: Mapping[str, Mapping[str, Sequence[float]]], seed: int) -> dict[str, dict[str, Any]]:
    metrics: dict[str, dict[str, Metric]] = {}
    for name, by_attack in scores.items():
        every = by_attack | worst_of(by_attack)
        metrics[name] = {f"recall/{key}": mean_interval(values, seed) for key, values in every.items()}
        metrics[name] |= {
            f"regained/{key}": paired_difference(values, by_attack[PLAIN], seed)
            for key, values in every.items()
            if key != PLAIN
        }
    return {name: {key: one.to_json() for key, one in found.items()} for name, found in metrics.items()}


def worst_of(by_attack: Mapping[str, Sequence[float]]) -> dict[str, list[float]]:
    """Of rewordings and of prefillings, the one that brings most back, probe by probe: KIND/any."""
    worst = {}
    for kind in ("rewording", "prefilling"):
        variants = [values for key, values in by_attack.items() if key.startswith(f"{kind}/")]
        worst[f"{kind}/any"] = [max(values) for values in zip(*variants, strict=True)]
    return worst
