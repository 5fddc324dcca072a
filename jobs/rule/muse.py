"""MUSE-Books: knowledge memorisation, verbatim memorisation and the passages of PrivLeak.

Text scores are ROUGE-L F1 on the paper's 0 to 100 scale; each comes with the number of prompts that lost in-context
pairs, or leading tokens, to the model's context (`.../truncated`).
Source: Shi et al. 2024, MUSE, criteria C1 to C3; RULE, metrics.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from cluster.errors import UserError
from cluster.generation import Generator
from cluster.report import Metric
from jobs.rule.rows import Fitted, Row, Text, count, fit_prompt, greedy_texts, load_list, load_rows
from jobs.scoring.intervals import mean_interval
from jobs.scoring.rouge import rouge_l_f1

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

KNOWMEM_TOKENS = 32
VERBMEM_TOKENS = 128


class QaRow(Row):
    """One row of a `knowmem_*_qa.json` or `knowmem_*_qa_icl.json`."""

    question: Text
    answer: Text


class VerbatimRow(Row):
    """One row of `verbmem_forget.json`: a passage and the text `gt` that follows it in the book."""

    prompt: Text
    gt: Text


@dataclass(frozen=True)
class KnowMem:
    """Questions of one split with the pairs shown in context."""

    rows: list[QaRow]
    demonstrations: list[QaRow]


def load_knowmem(folder: Path, split: str) -> KnowMem | None:
    """`knowmem_<split>_qa.json` ("forget" or "retain") with its `_icl` file; None where the questions are absent.

    Raises: UserError for a wrong row, or questions without their in-context file.
    """
    rows = load_rows(folder / f"knowmem_{split}_qa.json", QaRow)
    if rows is None:
        return None
    path = folder / f"knowmem_{split}_qa_icl.json"
    demonstrations = load_rows(path, QaRow)
    if demonstrations is None:
        raise UserError(f"{path} is absent although its questions are there; add the ten in-context pairs.")
    return KnowMem(rows, demonstrations)


def load_verbmem(folder: Path) -> list[VerbatimRow] | None:
    """Rows of `verbmem_forget.json`, None where it is absent."""
    return load_rows(folder / "verbmem_forget.json", VerbatimRow)


def load_privleak(folder: Path) -> tuple[list[str], list[str]] | None:
    """Passages of `privleak_forget.json` and `privleak_holdout.json`, None unless both are there.

    Each is a list of strings or of {"text"} rows. They are scored by `mia.mia_scores` and `mia.priv_leak`.
    """
    forget, holdout = (_load_texts(folder / f"privleak_{split}.json") for split in ("forget", "holdout"))
    return None if forget is None or holdout is None else (forget, holdout)


def score_knowmem(
    generator: Generator, tokenizer: PreTrainedTokenizerBase, data: KnowMem, split: str, *, context: int, seed: int
) -> dict[str, Metric]:
    """Mean F1 of greedy 32-token answers, cut at the newline, after ten in-context pairs.

    Args:
        split: "forget" (lower is better) or "retain" (MUSE's utility, higher is better); names the result.
        context: tokens that the model takes, prompt and completion together.
    Returns: `knowmem/<split>`, `knowmem/<split>/truncated`.
    """
    demonstrations = [f"Question: {row.question}\nAnswer: {row.answer}\n\n" for row in data.demonstrations]
    fitted = [
        fit_prompt(tokenizer, "", demonstrations, f"Question: {row.question}\nAnswer: ", context - KNOWMEM_TOKENS)
        for row in data.rows
    ]
    texts = greedy_texts(generator, [prompt.sequences[0] for prompt in fitted], KNOWMEM_TOKENS, stop=("\n",))
    return _f1_report(f"knowmem/{split}", texts, [row.answer for row in data.rows], fitted, seed)


def score_verbmem(
    generator: Generator,
    tokenizer: PreTrainedTokenizerBase,
    rows: Sequence[VerbatimRow],
    *,
    context: int,
    seed: int,
) -> dict[str, Metric]:
    """Mean F1 of greedy 128-token continuations (`verbmem/forget`, lower is better, `verbmem/forget/truncated`)."""
    fitted = [
        fit_prompt(tokenizer, "", [], f"Completion: {row.prompt}\nAnswer: ", context - VERBMEM_TOKENS) for row in rows
    ]
    texts = greedy_texts(generator, [prompt.sequences[0] for prompt in fitted], VERBMEM_TOKENS)
    # a continuation is compared with as many tokens of the book
    true = [tokenizer.decode(tokenizer(row.gt, add_special_tokens=False).input_ids[:VERBMEM_TOKENS]) for row in rows]
    return _f1_report("verbmem/forget", texts, true, fitted, seed)


def _f1_report(
    name: str, texts: Sequence[str], references: Sequence[str], fitted: Sequence[Fitted], seed: int
) -> dict[str, Metric]:
    scores = [100 * rouge_l_f1(text, reference) for text, reference in zip(texts, references, strict=True)]
    truncated = sum(prompt.truncated for prompt in fitted)
    return {
        name: mean_interval(scores, seed, bounds=(0.0, 100.0)),
        f"{name}/truncated": count(truncated, len(texts), seed),
    }


def _load_texts(path: Path) -> list[str] | None:
    values = load_list(path)
    if values is None:
        return None
    texts = [value.get("text") if isinstance(value, dict) else value for value in values]
    for index, text in enumerate(texts):
        if not isinstance(text, str) or not text:
            raise UserError(f"{path}, row {index}: neither a text nor a row with a text; mend the row.")
    return texts
