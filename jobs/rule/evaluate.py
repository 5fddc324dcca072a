"""One model asked everything: probes always, the likelihood and benchmark metrics where `evaluate` asks for them."""

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np

from cluster.config import Generation, Train
from cluster.errors import UserError
from cluster.generation import open_engine
from cluster.models import context_of, load_tokenizer, scoring_model
from cluster.recorder import peak_memory_gib
from cluster.report import Metric
from jobs.rule.benchmarks import LONGEST_PROMPT, Benchmarks, run_benchmarks
from jobs.rule.config import Evaluation
from jobs.rule.data import FORGET_KINDS, NEIGHBOR_KINDS, RETAINED_KINDS, Probe
from jobs.rule.mia import AUC, PRIV_LEAK, relative_leak
from jobs.rule.naturalness import (
    Answered,
    dictionary_of,
    judged_naturalness,
    naturalness,
    naturalness_report,
    perplexities,
)
from jobs.rule.probes import Answer, as_asked, ask, facts, known, probe_ids, probe_metrics, statements
from jobs.rule.tofu import FORGET_QUALITY, forget_quality
from jobs.scoring.entailment import Entailment
from jobs.scoring.intervals import statistic_interval
from jobs.scoring.judge import Judge


@dataclass(frozen=True)
class Examination:
    """What is asked of which model; `original` is the model before unlearning, for perplexities.

    `entailment` is the directory of the model that says which answers of the original one are right, too; `stop` ends
    every answer.
    """

    model: Path
    original: Path
    probes: tuple[Probe, ...]
    settings: Evaluation
    generation: Generation
    train: Train
    seed: int
    benchmarks: Benchmarks | None = None
    entailment: Path | None = None
    stop: tuple[str, ...] = ()


@dataclass(frozen=True)
class Examined:
    """What a model answered and what follows from it.

    `perplexities` are of the forget answers, under the original; `truth_ratios` of TOFU's forget set, if there is one.
    """

    answers: list[Answer]
    perplexities: list[float]
    benchmarks: dict[str, Metric]
    seconds: float
    peak_memory_gib: float
    truth_ratios: list[float] = field(default_factory=list)


def check_lengths(model: Path, probes: Sequence[Probe], settings: Evaluation, name: str = "the model") -> None:
    """Raises UserError where a probe and its answer are longer than the context of the model, told as `name`."""
    tokenizer, context = load_tokenizer(model), context_of(model)
    for probe in probes:
        size = len(probe_ids(tokenizer, probe, settings.prompt_form))
        if size + settings.max_new_tokens > context:
            longer = f"more than {name}'s context of {context}"
            raise UserError(
                f"the {probe.kind} probe {probe.query[:37]!r}... has {size} tokens, {longer} with "
                f"rule.evaluation.max_new_tokens = {settings.max_new_tokens}; lower it or shorten the probe"
            )


def examine(task: Examination) -> Examined:
    """Asks all probes and, where there are `task.benchmarks`, runs them."""
    start = time.perf_counter()
    tokenizer = load_tokenizer(task.model)
    prompts = [probe_ids(tokenizer, probe, task.settings.prompt_form) for probe in task.probes]
    max_tokens = max(map(len, prompts)) + task.settings.max_new_tokens
    if task.benchmarks is not None and task.benchmarks.rows():
        # their demonstrations fill the context
        max_tokens = max(max_tokens, min(context_of(task.model), LONGEST_PROMPT))
    engine = open_engine(task.model, task.generation, task.train, max_tokens, task.seed)
    answers = ask(engine, tokenizer, task.probes, task.settings, task.stop, _progress)
    asked = [index for index, probe in enumerate(task.probes) if probe.kind in FORGET_KINDS]
    if task.entailment is not None and task.model == task.original:
        answers = _with_entailment(answers, task, "cuda" if task.train.gpus_per_worker else "cpu")
    original = scoring_model(task.original, task.train)
    # after the question alone, also where the model's own template says more (ICU)
    asking = load_tokenizer(task.original)
    fluency = perplexities(
        original,
        asking,
        [probe_ids(asking, task.probes[index], task.settings.prompt_form) for index in asked],
        [answers[index].completion for index in asked],
        [as_asked(task.probes[index], task.settings.prompt_form)[1] for index in asked],
        task.settings.max_batch_tokens,
    )
    benchmarks, ratios = {}, []
    if task.benchmarks is not None:
        model = original if task.model == task.original else scoring_model(task.model, task.train)
        benchmarks, ratios = run_benchmarks(
            task.benchmarks, model, engine, tokenizer, task.settings, task.seed, task.stop
        )
    return Examined(answers, fluency, benchmarks, time.perf_counter() - start, peak_memory_gib(), ratios)


def _with_entailment(answers: list[Answer], task: Examination, device: str) -> list[Answer]:
    entailment = Entailment(task.entailment, task.settings.entailment, device)
    entailed = entailment.entails([statements(answer) for answer in answers])
    return [replace(answer, entailed=value) for answer, value in zip(answers, entailed, strict=True)]


def score(
    examined: Examined, original: Sequence[Answer], subject: str, settings: Evaluation, dictionary: Path, seed: int
) -> dict[str, Metric]:
    """All metrics of one examined model by name; `original` are the original model's answers to the same probes."""
    is_known = known(original, settings.known_threshold)
    metrics = probe_metrics(examined.answers, is_known, seed)
    metrics |= _kept(examined.answers, original, is_known, seed)
    metrics |= _naturalness(examined, subject, settings, dictionary, seed)
    return metrics | examined.benchmarks


def against_gold(examined: Mapping[str, Examined], seed: int) -> dict[str, dict[str, Metric]]:
    """What the stage "gold" tells of each stage; nothing without one.

    TOFU's forget quality, of the stages but gold; PrivLeak with gold's own AUC in place of the one that MUSE measured.
    """
    if "gold" not in examined:
        return {}
    gold, found = examined["gold"], {}
    for stage, one in examined.items():
        found[stage] = {}
        if stage != "gold" and one.truth_ratios and gold.truth_ratios:
            found[stage][FORGET_QUALITY] = forget_quality(one.truth_ratios, gold.truth_ratios, seed)
        if AUC in one.benchmarks and AUC in gold.benchmarks:
            found[stage][PRIV_LEAK] = relative_leak(one.benchmarks[AUC], gold.benchmarks[AUC].value)
    return found


def _kept(
    answers: Sequence[Answer], original: Sequence[Answer], is_known: Sequence[bool], seed: int
) -> dict[str, Metric]:
    """`kept/...`: ROUGE-L recall on known retained probes as a share of the original's, bootstrap over facts.

    A probe that is known by entailment alone, of which the original recalled no word, has no such share.
    """
    kept = {}
    for name, kinds in (("neighbor", NEIGHBOR_KINDS), ("general", ("general",)), ("retain", RETAINED_KINDS)):
        pairs = [
            (after, before)
            for after, before, knows in zip(answers, original, is_known, strict=True)
            if knows and after.probe.kind in kinds and before.rouge_l_recall > 0
        ]
        if pairs:
            recalls = np.array([[one.rouge_l_recall for one in pair] for pair in pairs])
            asked_for = facts([after.probe for after, _ in pairs])
            kept[f"kept/{name}"] = statistic_interval(
                lambda rows: float(rows[:, 0].mean() / rows[:, 1].mean()),
                [recalls],
                seed,
                groups=[asked_for],
            )
    return kept


def _naturalness(
    examined: Examined, subject: str, settings: Evaluation, dictionary: Path, seed: int
) -> dict[str, Metric]:
    answered = [
        Answered(answer.probe.query, answer.completion, subject, answer.probe.answer)
        for answer in examined.answers
        if answer.probe.kind in FORGET_KINDS
    ]
    if not answered:
        return {}
    words = dictionary_of(load_tokenizer(dictionary))
    scores = naturalness_report(naturalness(answered, examined.perplexities, words), seed)
    metrics = {f"naturalness/{name}": metric for name, metric in scores.items()}
    if settings.judge is not None:
        judged = naturalness_report(judged_naturalness(answered, Judge(settings.judge)), seed)
        metrics |= {f"naturalness_judged/{name}": metric for name, metric in judged.items()}
    return metrics


def _progress(done: int, total: int) -> None:
    print(f"evaluation {done}/{total} probes", flush=True)


def packed(examined: Examined) -> dict:
    """The form that `answers/STAGE.json` has."""
    return vars(examined) | {
        "answers": [vars(answer) | {"probe": vars(answer.probe)} for answer in examined.answers],
        "benchmarks": {name: metric.to_json() for name, metric in examined.benchmarks.items()},
    }


def unpacked(content: dict) -> Examined:
    """What `packed` gave."""
    answers = [Answer(**row | {"probe": Probe(**row["probe"])}) for row in content["answers"]]
    benchmarks = {name: Metric.from_json(metric) for name, metric in content["benchmarks"].items()}
    return Examined(**content | {"answers": answers, "benchmarks": benchmarks})
