"""What a run cost: tokens that its losses were of, and the share of the forget and retain corpora that it read."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from cluster.models import load_tokenizer
from cluster.recorder import HISTORY
from cluster.report import read_lines
from jobs.rule import methods
from jobs.rule.corpora import load_corpora
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

    RULE reads its forget questions with their refusals, and boundary questions without answers; its first stage alone,
    and RT, the questions of that stage. A method on texts reads its whole forget corpus, and as many texts of the
    retain corpus; less where a training ended, or is to end, within its first epoch. Plain tokens, without a template.
    Source: RULE, token accounting of the main table.
    """
    tokenizer, data, rule = load_tokenizer(run.source.path), run.data, run.config.rule
    name, whole, dealt = rule.method, {side: _corpus(data, side) for side in ("forget", "retain")}, 1.0
    epochs = rule.baseline.epochs
    if name == methods.PROMPT_ONLY:
        read = {"forget": [], "retain": []}
    elif name == methods.STEERING_ONLY:
        planned = steering_steps(rule.steering, len(data.refusals))
        epochs = _steps(run, "steering", planned) * _a_step(len(data.refusals), rule.steering.batch_size)
        epochs /= len(data.refusals)
        read = {"forget": [f"{row.prompt} {row.refusal}" for row in data.refusals], "retain": []}
    elif name == methods.RULE:
        updates = _steps(run, "rebo", rule.rebo.steps * rule.rebo.updates_per_rollout)
        epochs = updates / rule.rebo.updates_per_rollout * rule.rebo.prompts_per_step / len(data.items)
        read = {
            "forget": [f"{item.prompt} {item.reference}" for item in data.items if item.label == "reject"],
            "retain": [item.prompt for item in data.items if item.label == "normal"],
        }
    else:
        forget = [sample for kind in ("forget", "refusal") for sample in run.corpora.get(kind, ())]
        read = {
            "forget": [f"{sample.prompt} {sample.completion}".strip() for sample in forget],
            "retain": [sample.completion for sample in run.corpora.get("retain", ())],
        }
        dealt = min(1.0, len(forget) / max(1, len(read["retain"])))
    shares = {
        side: min(1.0, epochs) * _tokens(tokenizer, read[side]) / _tokens(tokenizer, texts) if texts else None
        for side, texts in whole.items()
    }
    return shares | {"retain": shares["retain"] and dealt * shares["retain"]}


def _corpus(data: RuleData, side: str) -> list[str]:
    # the files are a choice of the baselines, not of RULE
    if data.folder is None or not (data.folder / "positive.json").exists():
        return []
    others = [path for path in data.folder.parent.glob("*/positive.json") if path.parent != data.folder]
    if side == "retain" and not (data.folder / "retain.json").exists() and not others:
        return []
    corpora = load_corpora(data, methods.find("GA" if side == "forget" else "GA+GDR"))
    return [sample.completion for sample in corpora[side]]


def _steps(run: "Run", stage: str, planned: int) -> int:
    """Steps that a stage took, or would take where it has not been trained."""
    return max((row["step"] for row in read_lines(run.folder / HISTORY) if row["stage"] == stage), default=planned)


def _a_step(rows: int, batch: int) -> float:
    """Rows of a mean step: the last one of an epoch may be smaller."""
    return rows / math.ceil(rows / batch) if rows and batch else 0.0


def _mean(tokenizer: "PreTrainedTokenizerBase", texts: Sequence[str], most: int) -> float:
    sizes = [min(len(ids) + 1, most) for ids in tokenizer(list(texts), add_special_tokens=False)["input_ids"]]
    return sum(sizes) / len(sizes)


def _tokens(tokenizer: "PreTrainedTokenizerBase", texts: Sequence[str]) -> int:
    return sum(map(len, tokenizer(list(texts), add_special_tokens=False)["input_ids"])) if texts else 0
