"""What a run cost: tokens that its losses were of, and the share of the forget and retain corpora that it read."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

from cluster.errors import UserError
from cluster.models import load_tokenizer
from cluster.report import read_lines
from jobs.rule import methods
from jobs.rule.corpora import Sample, load_corpora
from jobs.rule.data import RuleData
from jobs.rule.shared import HISTORY

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from jobs.rule.job import Run


def trained_tokens(run: "Run") -> int:
    """Tokens that the losses of a finished run were of: refusals, sampled completions, or texts of the corpora.

    Counted from the history's steps, with the mean length of what a step draws from.
    """
    rule, tokenizer = run.config.rule, load_tokenizer(run.source.path)
    method = methods.find(rule.method)
    refusals = _tokens(tokenizer, [row.refusal for row in run.data.refusals]) / len(run.data.refusals) + 1
    texts = sum(_tokens(tokenizer, [s.completion for s in corpus]) / len(corpus) + 1 for corpus in run.corpora.values())
    samples = rule.rebo.prompts_per_step * rule.rebo.completions_per_prompt
    batch = 0 if method is None else rule.baseline.batch_size or method.defaults.batch_size
    step = {"steering": rule.steering.batch_size * refusals, "unlearning": batch * texts}
    rows = [row for row in read_lines(run.folder / HISTORY) if "loss" in row]
    return round(sum(step.get(row["stage"], samples * row.get("completion_tokens", 0.0)) for row in rows))


def data_used(run: "Run") -> dict[str, float | None]:
    """Tokens that a method reads, as shares of the forget and of the retain corpus; None where there is no corpus.

    RULE reads its forget questions with their refusals, and boundary questions without answers; its first stage alone
    the questions of that stage; a method on texts its whole corpora. Plain tokens, without a chat template.
    Source: RULE, token accounting of the main table.
    """
    tokenizer, data, name = load_tokenizer(run.source.path), run.data, run.config.rule.method
    whole = {side: _corpus(data, side) for side in ("forget", "retain")}
    if name == methods.PROMPT_ONLY:
        read = {"forget": [], "retain": []}
    elif name == methods.STEERING_ONLY:
        read = {"forget": [f"{row.prompt} {row.refusal}" for row in data.refusals], "retain": []}
    elif name == methods.RULE:
        read = {
            "forget": [f"{item.prompt} {item.reference}" for item in data.items if item.label == "reject"],
            "retain": [item.prompt for item in data.items if item.label == "normal"],
        }
    else:
        read = {
            "forget": [s.completion for kind in ("forget", "refusal") for s in run.corpora.get(kind, ())],
            "retain": [s.completion for s in run.corpora.get("retain", ())],
        }
    return {
        side: None if not whole[side] else _tokens(tokenizer, read[side]) / _tokens(tokenizer, whole[side])
        for side in whole
    }


def _corpus(data: RuleData, side: str) -> list[str]:
    method = methods.find("GA" if side == "forget" else "GA+GDR")
    try:
        samples: Sequence[Sample] = load_corpora(data, method)[side]
    except UserError:  # the files are a choice of the baselines, not of RULE
        return []
    return [sample.completion for sample in samples]


def _tokens(tokenizer: "PreTrainedTokenizerBase", texts: Sequence[str]) -> int:
    return sum(map(len, tokenizer(list(texts), add_special_tokens=False)["input_ids"])) if texts else 0
