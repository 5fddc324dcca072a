"""`python -m jobs.rule attack`: how much of what was forgotten comes back, and by which attack.

Every model is asked the same known forget probes: plainly, reworded, prefilled, sampled, quantised, and after a few
steps of relearning on other forget questions with their true answers. What is done is kept, so that the same command
goes on where it was ended.
"""

import re
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cluster import cli, models, runs, session
from cluster.errors import JobFailure, UserError, paths_named
from cluster.generation import chosen_engine
from cluster.memory import this_node
from cluster.plan import Plan
from cluster.recorder import HISTORY, Recorder
from cluster.report import digest, read_json, read_lines, write_json, write_lines
from cluster.tracking import Tracker
from jobs.rule import attack_report, job, stages, tradeoff
from jobs.rule.attacks import (
    PLAIN,
    QUANTISED,
    AttackTask,
    Way,
    answers_file,
    attacked,
    longest,
    recalls,
    ways,
)
from jobs.rule.config import MOST, Rule, RuleConfig, Steering
from jobs.rule.data import Probe, Refusal, data_folder
from jobs.rule.entries import named_models, slug
from jobs.rule.in_context import in_form
from jobs.rule.plan import rule_plan
from jobs.rule.probes import Answer, as_asked, facts
from jobs.rule.trace import Trace, known_probes, require_probes

ORIGINAL = "original"
RELEARNING = "relearning"
KINDS = ("forget_fb", "forget_qa")  # attacks of the data's own (forget_aa) would be attacked twice
LIMIT_S = 6 * 3600


def chosen(named: Sequence[str], comparison: Path | None) -> dict[str, Path]:
    """Name -> directory, from NAME=DIR texts and from the best runs of a finished comparison.

    Raises:
        UserError: neither is given, a text of another form, a name twice, a folder that holds no comparison.
    """
    found: dict[str, Path] = {}
    if comparison is not None:
        report = read_json(comparison / "report.json")
        if not isinstance(report, dict) or report.get("job") != "compare" or "models" not in report:
            raise UserError(
                f"--comparison {comparison} holds no finished comparison; name its folder, or run the comparison again"
            )
        found = {name: Path(report["models"][name]) for name in report["best"].values()}
    found |= named_models(named, {*found, ORIGINAL})
    if not found:
        raise UserError("attack needs models: --model NAME=DIR, or --comparison DIR for the best runs of a comparison")
    return found


def attack(
    config: RuleConfig,
    named: Mapping[str, Path],
    out: Path | None,
    fresh: bool,
    command: str,
    comparison: Path | None = None,
) -> Path:
    """Attacks every model, the original as well, and writes the report; returns its path.

    `comparison`: the folder of the comparison that some of them are of, which must be of the same model and data.

    What fails of a model is recorded and does not end the rest; the same command tries it again.

    Raises:
        UserError: a model that cannot be read or is too short of context, too few known probes, or no room to relearn.
        JobFailure: every model failed.
    """
    with paths_named():
        run, paths, plan = _prepared(config, named, out, command, comparison)
        plan.require_fit()
        job.claim(run, fresh)
    known = read_json(run.folder / "report.json")
    if known is not None and not known["failures"]:
        print(f"these attacks are finished (--fresh starts them over): {run.folder}")
        attack_report.show(known)
        return run.folder / "report.json"
    with job.exclusively(run.folder), session.connected(config), job.tracked(run, "rule-attack") as tracker:
        answers = job.evaluated(run, ORIGINAL, run.source.path).answers
        tradeoff.require_known(answers, config.rule.evaluation.known_threshold)
        lessons, probes = split(answers, config)
        trace = _relearning_trace(config, answers, probes)
        found: dict[str, Attacked] = {}
        failures: dict[str, str] = {}
        for name, path in paths.items():
            one = _attacked(run, tracker, name, path, lessons, trace, failures)
            if PLAIN in one.recalls:  # else there is nothing to compare with
                found[name] = one
        if not found:
            raise JobFailure(f"no model could be attacked; the first: {next(iter(failures.values()))}")
        path = _concluded(run, tracker, found, failures, facts(probes))
    attack_report.show(read_json(path))
    return path


def _concluded(
    run: job.Run,
    tracker: Tracker,
    found: Mapping[str, "Attacked"],
    failures: Mapping[str, str],
    asked_for: Sequence[str],
) -> Path:
    """report.json, table, samples and plot; the same to MLflow. `asked_for` is the fact that each probe asks for."""
    recalls = {name: one.recalls for name, one in found.items()}
    attempt = run.state.get("attempts", 0)  # MLflow keeps what a step has: what is asked again is a later step's
    content = job.provenance(run, tracker) | {
        "job": "attack",
        "metrics": attack_report.metrics(recalls, run.config.rule.seed, asked_for),
        "facts": len(set(asked_for)),
        "failures": dict(failures),
        "relearning": {name: one.curve for name, one in found.items()},
        "seconds": run.state["seconds"],
    }
    plot = run.folder / "plots" / "attacks.png"
    plot.parent.mkdir(exist_ok=True)
    attack_report.figure(content).savefig(plot, dpi=150)
    rows = attack_report.rows(content)
    write_lines(rows, run.folder / "tables" / "attacks.jsonl")
    tracker.table(rows, "attacks")
    for name, one in found.items():
        write_lines(one.samples, run.folder / "samples" / f"{name}.jsonl")
        tracker.samples(one.samples, name)
        tracker.metrics(
            {key: metric["value"] for key, metric in content["metrics"][name].items()}, step=attempt, stage=slug(name)
        )
    run.save(attempts=attempt + 1)
    tracker.artifact(plot, "plots")
    return runs.publish(content, run.folder, tracker)


def dry_run(config: RuleConfig, named: Mapping[str, Path], comparison: Path | None = None) -> None:
    """Checks what `attack` would, and prints the models and what relearning would take."""
    with paths_named():
        run, paths, plan = _prepared(config, named, None, "", comparison)
    job.print_settings(run)
    print(f"models: {', '.join(paths)}")
    for stage, memory in plan.memory.items():  # the batches are those of the relearning, and known when answers are
        Plan((), {f"{RELEARNING}, as {stage}": memory}).show()
    plan.require_fit()


def _prepared(
    config: RuleConfig, named: Mapping[str, Path], out: Path | None, command: str, comparison: Path | None
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
    if comparison is not None:
        _require_same_questions(run, comparison)
    paths = {ORIGINAL: run.source.path} | {name: source.path for name, source in sources.items()}
    require_probes(run.data.probes)
    probes = [probe for probe in run.data.probes if probe.kind in KINDS]
    for name, path in paths.items():
        check_room(name, path, probes, rule)
    node = this_node(run.folder, session.has_other_nodes(config))
    return run, paths, rule_plan(_as_relearning(config), run.data, run.source.path, node, ("steering",), "steering")


def _require_same_questions(run: job.Run, comparison: Path) -> None:
    """Raises UserError where the comparison was of another original model or of other questions."""
    report = read_json(comparison / "report.json")
    if report["model_version"] != run.source.version:
        raise UserError(
            f"--comparison {comparison} is of the model {report['model']}, but rule.model = {run.config.rule.model} is "
            "another, or has another revision or chat form; give attack the --profile, --config and --set of the "
            "comparison"
        )
    if list(report["data_digests"].values()) != [job.data_digest(run.data)]:
        raise UserError(
            f"--comparison {comparison} asked the questions of {', '.join(report['data_digests'])}, but rule.data = "
            f"{run.config.rule.data} has others; give attack the --profile, --config and --set of the comparison"
        )


def check_room(name: str, path: Path, probes: Sequence[Probe], rule: Rule) -> None:
    """Raises UserError where a probe in one of the ways that it is asked is too long for the model's context."""
    if not probes:  # that there are none is told once the original was asked
        return
    most, context = rule.evaluation.max_new_tokens, models.context_of(path)
    size, query = longest(models.load_tokenizer(path), probes, ways(rule.attack), rule.evaluation.prompt_form)
    if size + most > context:
        raise UserError(
            f"{name} cannot be attacked: {query[:37]!r}... has {size} tokens, more than its context of {context} with "
            f"rule.evaluation.max_new_tokens = {most}; lower it or shorten the probe"
        )


def split(answers: Sequence[Answer], config: RuleConfig) -> tuple[tuple[Refusal, ...], tuple[Probe, ...]]:
    """Questions with their true answers to relearn from, and the probes that every attack asks: known ones.

    A fact stands in several of them: a question is not asked whose answer is relearnt, or holds all words of one that
    is, or has all its words in one ("1947" and "September 21, 1947").

    Raises:
        UserError: fewer than two known probes are left to ask.
    """
    wanted = config.rule.attack.relearn_answers
    by_answer: dict[frozenset[str], list[Probe]] = {}
    for probe in known_probes(answers, config.rule.evaluation.known_threshold, None):
        if probe.kind in KINDS:
            by_answer.setdefault(_words(probe.answer), []).append(probe)
    if not by_answer:
        raise UserError(
            f"the original answers no fill-in or question form of {config.rule.data} about the target, only attacks, "
            "and attack asks those forms; bring such probes that it answers"
        )
    firsts = [probes[0] for probes in by_answer.values()]
    taken = sorted({index * len(firsts) // wanted for index in range(wanted)})
    lessons = [_lesson(firsts[index], index, config.rule.evaluation.prompt_form) for index in taken]
    relearnt = [_words(firsts[index].answer) for index in taken]
    asked = [
        probe
        for words, probes in by_answer.items()
        if not any(words <= other or other <= words for other in relearnt)
        for probe in probes
    ]
    if len(asked) < 2:
        raise UserError(
            f"rule.attack.relearn_answers = {wanted} of the {len(firsts)} different answers to known forget probes "
            f"leave {len(asked)} probes to ask; lower it, or bring more questions that the original answers"
        )
    return tuple(lessons), tuple(asked)


def _lesson(probe: Probe, source: int, form: str) -> Refusal:
    """A probe with its true answer, as it is asked: relearnt otherwise, less would come back."""
    message, opening = as_asked(probe, form)
    return Refusal(message, f"{opening} {probe.answer}".lstrip(), source)


def _words(text: str) -> frozenset[str]:
    return frozenset(re.findall(r"\w+", text.casefold())) or frozenset([text.strip()])


@dataclass(frozen=True)
class Attacked:
    """What a model told: recall of each probe by attack, relearning step -> recall by side, and every answer."""

    recalls: dict[str, list[float]]
    curve: dict[str, dict[str, float]]
    samples: list[dict[str, Any]]


def _attacked(
    run: job.Run,
    tracker: Tracker,
    name: str,
    path: Path,
    lessons: tuple[Refusal, ...],
    trace: Trace,
    failures: dict[str, str],
) -> Attacked:
    """All that could be asked of one model; the rest stands in `failures`."""
    folder, config = run.folder / "attacks" / name, run.config
    probes = tuple(probe for probe in trace.probes if probe.kind in KINDS)
    folder.mkdir(parents=True, exist_ok=True)
    for left in folder.glob(f"{QUANTISED}*"):  # by a worker that was killed
        shutil.rmtree(left, ignore_errors=True)
    asked = ways(config.rule.attack)
    # vLLM does not let go of a GPU, so that every engine gets a process of its own
    alone = chosen_engine(config.generation, config.train) == "vllm"
    for bits in dict.fromkeys(way.bits for way in asked.values()) if alone else [None]:
        part = {key: way for key, way in asked.items() if not alone or way.bits == bits}
        what = f"{name}, {bits} bits" if bits else name
        with _told(failures, what):
            _ask(run, f"asking {what}", path, probes, part, folder)
    relearning = f"{RELEARNING}/{len(lessons)} answers"
    kept = folder / "curve.json"
    if not kept.exists():
        with _told(failures, f"{name}, {RELEARNING}"):
            relearnt, curve = _relearned(run, tracker, name, path, lessons, trace)
            _ask(run, f"asking {name} after {RELEARNING}", relearnt, probes, {relearning: Way()}, folder)
            write_json(curve, kept)
            shutil.rmtree(relearnt, ignore_errors=True)
    names = [key for key in (*asked, relearning) if answers_file(folder, key).exists()]
    samples = [row for key in names for row in read_lines(answers_file(folder, key))]
    return Attacked({key: recalls(folder, key) for key in names}, read_json(kept) or {}, samples)


@contextmanager
def _told(failures: dict[str, str], what: str) -> Iterator[None]:
    """Goes on where the block fails, and notes why."""
    try:
        yield
    except Exception as error:
        failures[what] = cli.sentence(cli.root_cause(error))
        print(f"{what} failed: {failures[what]}", flush=True)


def _ask(
    run: job.Run, phase: str, model: Path, probes: tuple[Probe, ...], asked: Mapping[str, Way], folder: Path
) -> None:
    if all(answers_file(folder, name).exists() for name in asked):
        return
    rule, config = run.config.rule, run.config
    print(phase, flush=True)
    task = AttackTask(
        model, probes, asked, rule.attack, rule.evaluation, config.generation, config.train, rule.seed, folder
    )
    with run.phase(phase):
        session.on_worker(attacked, config, task, seconds=LIMIT_S)


def _as_relearning(config: RuleConfig) -> RuleConfig:
    """The configuration less what relearning does not do, for its plan."""
    steering = config.rule.steering.model_copy(update={"stop_at_refusal": None})
    trace = config.rule.trace.model_copy(update={"probes": None, "naturalness": False})
    rule = config.rule.model_copy(update={"steering": steering, "trace": trace})
    return config.model_copy(update={"rule": rule})


def _relearning_trace(config: RuleConfig, original: Sequence[Answer], probes: tuple[Probe, ...]) -> Trace:
    """What relearning is asked on its way: the probes of every attack, and retained ones that the original knows."""
    rule = config.rule
    limit = rule.trace.probes or len(probes)
    others = [p for p in known_probes(original, rule.evaluation.known_threshold, limit) if "forget" not in p.kind]
    return Trace(rule.attack.relearn_every, (*probes, *others), rule.evaluation, rule.stop, attacks=True)


def _relearned(
    run: job.Run, tracker: Tracker, name: str, path: Path, lessons: tuple[Refusal, ...], trace: Trace
) -> tuple[Path, dict[str, dict[str, float]]]:
    """The model that has relearnt, and the recall of both sides after each few steps."""
    from jobs.rule.steering import SteeringTask, steer

    rule, config = run.config.rule, run.config
    folder = run.folder / "attacks" / name
    workers = config.train.num_workers
    steering = Steering(
        learning_rate=rule.attack.relearn_learning_rate,
        stop_after_epochs=None,
        batch_size=workers * max(1, min(len(lessons), 8) // workers),
        warmup_steps=0,
        schedule="constant",
        max_tokens=MOST,  # asked as they are, lessons fit the context
    )
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
        steps=rule.attack.relearn_steps,
        name=RELEARNING,
        dial="rule.attack.relearn_learning_rate",
    )
    stage = f"{RELEARNING}-{name}"
    recorder = Recorder(stage, folder, rule.attack.relearn_steps, tracker.uri, tracker.run_id)
    stages.fitted(run, recorder, steer, task, f"{RELEARNING} of {name}")
    steps = {
        str(row["step"]): {"forget": 1 - row["forgotten"], "retain": row["retained"]}
        for row in read_lines(folder / HISTORY)
        if "forgotten" in row
    }
    return task.output, steps
