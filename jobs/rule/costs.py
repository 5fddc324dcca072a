"""What a run cost: tokens that its losses were of, and the share of the forget and retain corpora that it read."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from cluster.models import load_tokenizer
from cluster.recorder import HISTORY
from cluster.report import read_lines
from jobs.rule import methods
from jobs.rule.corpora import Sample, load_corpora, others_beside
from jobs.rule.data import RuleData
from jobs.rule.plan import steering_steps

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from jobs.rule.job import Run


@dataclass(frozen=True)
class Spent:
    """What a run had cost after a step, all stages before it included; `seconds` of steps alone, without start-up."""

    stage: str
    step: int
    seconds: float
    tokens: int


def spent(run: "Run") -> list[Spent]:
    """The costs of a finished run step by step; tokens are those that the losses were of.

    Those are refusals, sampled completions, or texts of the corpora, counted from the history's steps with the mean
    length of what a step draws from.
    """
    rule, tokenizer = run.config.rule, load_tokenizer(run.source.path)
    method = methods.find(rule.method)
    refusals = _mean(tokenizer, [row.refusal for row in run.data.refusals], rule.steering.max_tokens)
    texts = sum(
        _mean(tokenizer, [sample.completion for sample in corpus], rule.baseline.max_tokens)
        for corpus in run.corpora.values()
    )
    batch = 0 if method is None else rule.baseline.batch_size or method.defaults.batch_size
    rows = len(next(iter(run.corpora.values()), ()))
    step = {
        "steering": _a_step(len(run.data.refusals), rule.steering.batch_size) * refusals,
        "unlearning": _a_step(rows, batch) * texts,
    }
    samples = rule.rebo.prompts_per_step * rule.rebo.completions_per_prompt
    steps: list[Spent] = []
    seconds = total = completion = 0.0
    for row in read_lines(run.folder / HISTORY):
        if "loss" not in row:
            continue
        completion = row.get("completion_tokens", completion)  # a rollout's later updates learn from the same tokens
        total += step.get(row["stage"], samples * completion)
        seconds += row.get("seconds", {}).get("step", 0.0)
        steps.append(Spent(row["stage"], row["step"], round(seconds, 2), round(total)))
    return steps


def data_used(run: "Run") -> dict[str, float | None]:
    """Tokens that a method reads, as shares of the forget and of the retain corpus; None where there is no corpus.

    RULE reads the questions of both stages with their refusals, each pair counted once, and boundary questions without
    answers; RS and RT those of the first stage. A method on texts reads its whole forget corpus, and as many texts of
    the retain corpus, each up to `rule.baseline.max_tokens`; less where a training ended, or is to end, within its
    first epoch. Plain tokens, without a template.
    Source: RULE, token accounting of the main table.
    """
    tokenizer, data, rule = load_tokenizer(run.source.path), run.data, run.config.rule
    read: dict[str, list[tuple[str, float]]] = {"forget": [], "retain": []}  # texts, and how likely each is read
    most = None
    if rule.method in (methods.RULE, methods.STEERING_ONLY):
        steered: dict[str, float] = {}
        if rule.method == methods.STEERING_ONLY or rule.rebo.start == "steered":
            share = _steered_share(run)
            steered = {f"{row.prompt} {row.refusal}": share for row in data.refusals}
        if rule.method == methods.RULE:
            share = _rebo_share(run)
            asked = [f"{item.prompt} {item.reference}" for item in data.items if item.label == "reject"]
            steered |= {text: 1 - (1 - share) * (1 - steered.get(text, 0.0)) for text in asked}
            read["retain"] = [(item.prompt, share) for item in data.items if item.label == "normal"]
        read["forget"] = list(steered.items())
    elif rule.method != methods.PROMPT_ONLY:
        most = rule.baseline.max_tokens
        texts = [sample for kind in ("forget", "refusal") for sample in run.corpora.get(kind, ())]
        kept, share = run.corpora.get("retain", ()), min(1.0, rule.baseline.epochs)
        dealt = min(1.0, len(texts) / max(1, len(kept)))
        read = {
            "forget": [(_read(sample), share) for sample in texts],
            "retain": [(_read(sample), share * dealt) for sample in kept],
        }
    shares: dict[str, float | None] = {}
    for side, texts in read.items():
        whole = sum(_sizes(tokenizer, _corpus(data, side)))
        sizes = _sizes(tokenizer, [text for text, _ in texts], most)
        tokens = sum(size * share for size, (_, share) in zip(sizes, texts, strict=True))
        shares[side] = tokens / whole if whole else None
    return shares


def _steered_share(run: "Run") -> float:
    """Of stage 1's rows those that its steps read, at most all."""
    steering, rows = run.config.rule.steering, len(run.data.refusals)
    steps = _steps(run, "steering", steering_steps(steering, rows))
    return min(1.0, steps * _a_step(rows, steering.batch_size) / rows)


def _rebo_share(run: "Run") -> float:
    """Of stage 2's questions those that its steps asked, at most all."""
    rebo = run.config.rule.rebo
    rollouts = _steps(run, "rebo", rebo.steps * rebo.updates_per_rollout) / rebo.updates_per_rollout
    return min(1.0, rollouts * rebo.prompts_per_step / len(run.data.items))


def _read(sample: Sample) -> str:
    return f"{sample.prompt} {sample.completion}".strip()


def _corpus(data: RuleData, side: str) -> list[str]:
    # the files are a choice of the baselines, not of RULE
    if data.folder is None or not (data.folder / "positive.json").exists():
        return []
    if side == "retain" and not (data.folder / "retain.json").exists() and not others_beside(data):
        return []
    corpora = load_corpora(data, methods.find("GA" if side == "forget" else "GA+GDR"))
    return [_read(sample) for sample in corpora[side]]


def _steps(run: "Run", stage: str, planned: int) -> int:
    """Steps that a stage took, or would take where it has not been trained."""
    return max((row["step"] for row in read_lines(run.folder / HISTORY) if row["stage"] == stage), default=planned)


def _a_step(rows: int, batch: int) -> float:
    """Rows of a mean step: the last one of an epoch may be smaller."""
    return rows / math.ceil(rows / batch) if rows and batch else 0.0


def _mean(tokenizer: "PreTrainedTokenizerBase", texts: Sequence[str], most: int) -> float:
    sizes = [min(len(ids) + 1, most) for ids in tokenizer(list(texts), add_special_tokens=False)["input_ids"]]
    return sum(sizes) / len(sizes)


def _sizes(tokenizer: "PreTrainedTokenizerBase", texts: Sequence[str], most: int | None = None) -> list[int]:
    ids = tokenizer(list(texts), add_special_tokens=False)["input_ids"] if texts else []
    return [len(one) if most is None else min(len(one), most) for one in ids]
