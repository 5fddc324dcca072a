"""RWKU's, MUSE's and TOFU's measures beyond the probes: every one whose files lie in the data folder."""

from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING

from cluster.errors import UserError
from cluster.generation import Generator
from cluster.models import context_length, context_of, load_tokenizer
from cluster.report import Metric
from jobs.rule import mia, muse, tofu, utility
from jobs.rule.config import Evaluation
from jobs.rule.rows import encode
from jobs.rule.tofu import TofuRow

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

SPLITS = ("forget", "retain")
LONGEST_PROMPT = 8192  # tokens, with the answer; an engine opened for 128k would leave no memory for the weights


@dataclass(frozen=True)
class Benchmarks:
    """The checked rows of each benchmark; None where its files are absent, and then it is left out, not guessed."""

    membership: tuple[list[str], list[str]] | None
    mmlu: list[utility.MmluRow] | None
    truthful: list[utility.TruthfulRow] | None
    bbh: list[utility.BbhRow] | None
    trivia: list[utility.TriviaRow] | None
    fluency: list[utility.FluencyRow] | None
    knowmem_forget: muse.KnowMem | None
    knowmem_retain: muse.KnowMem | None
    verbmem: list[muse.VerbatimRow] | None
    privleak: tuple[list[str], list[str]] | None
    tofu: dict[str, list[TofuRow]] | None

    def rows(self) -> dict[str, str]:
        """What pins their content: each benchmark that is there, as text."""
        found = {field.name: getattr(self, field.name) for field in fields(self)}
        return {name: repr(rows) for name, rows in found.items() if rows is not None}


def load_benchmarks(folder: Path) -> Benchmarks:
    """Reads and checks every benchmark file of `folder`.

    Raises:
        UserError: a file is no JSON, or a row of it is wrong; file and row are named.
    """
    forget, retain = (mia.load_passages(folder, split) for split in SPLITS)
    return Benchmarks(
        membership=(forget, retain) if forget and retain else None,
        mmlu=utility.load_mmlu(folder),
        truthful=utility.load_truthful(folder),
        bbh=utility.load_bbh(folder),
        trivia=utility.load_trivia(folder),
        fluency=utility.load_fluency(folder),
        knowmem_forget=muse.load_knowmem(folder, "forget"),
        knowmem_retain=muse.load_knowmem(folder, "retain"),
        verbmem=muse.load_verbmem(folder),
        privleak=muse.load_privleak(folder),
        tofu=tofu.load_tofu(folder),
    )


def check_benchmarks(data: Benchmarks, model: Path, folder: Path) -> None:
    """What would end `run_benchmarks` with the model in directory `model`; `folder` holds the files.

    Raises:
        UserError: answers that leave no room for a question in the model's context, or a passage of one token.
    """
    tokenizer, context = load_tokenizer(model), context_of(model)
    for file, rows, answer in (
        ("retain_bbh.json", data.bbh, utility.BBH_TOKENS),
        ("triviaqa.json", data.trivia, utility.TRIVIA_TOKENS),
        ("fluency.json", data.fluency, utility.FLUENCY_TOKENS),
        ("knowmem_forget_qa.json", data.knowmem_forget, muse.KNOWMEM_TOKENS),
        ("knowmem_retain_qa.json", data.knowmem_retain, muse.KNOWMEM_TOKENS),
        ("verbmem_forget.json", data.verbmem, muse.VERBMEM_TOKENS),
    ):
        if rows and answer >= context:
            raise UserError(
                f"{folder / file} cannot be asked: its answers of {answer} tokens leave no room for a question in the "
                f"context of {context} of {model}; move the file away, or take a model with a longer context"
            )
    for files, sides in (("{}_mia.json", data.membership), ("privleak_{}.json", data.privleak)):
        splits = SPLITS if files.endswith("mia.json") else ("forget", "holdout")
        for split, texts in zip(splits, sides or (), strict=False):
            for row, text in enumerate(texts):
                if len(encode(tokenizer, text)) < 2:
                    raise UserError(
                        f"{folder / files.format(split)}: passage {row} ({text[:20]!r}) is one token of {model}, and "
                        "whether it was learnt cannot be told; write a longer one, or take it out"
                    )


def run_benchmarks(
    data: Benchmarks,
    model: "PreTrainedModel",
    engine: Generator,
    tokenizer: "PreTrainedTokenizerBase",
    settings: Evaluation,
    seed: int,
    stop: tuple[str, ...] = (),
) -> tuple[dict[str, Metric], list[float]]:
    """Membership inference, utility sets, MUSE and TOFU scores by name; and the truth ratios of TOFU's forget set.

    `stop` ends the answers of a base model, which is asked in plain text.
    """
    chat = not stop
    budget, context = settings.max_batch_tokens, min(context_length(model), LONGEST_PROMPT)
    metrics: dict[str, Metric] = {}
    if data.membership:
        _tell("membership inference")
        scores = [mia.mia_scores(model, tokenizer, texts, max_batch_tokens=budget) for texts in data.membership]
        metrics |= {f"mia/{name}": metric for name, metric in mia.mia_report(*scores, seed).items()}
    for name, rows, score in (
        ("MMLU", data.mmlu, utility.score_mmlu),
        ("TruthfulQA", data.truthful, utility.score_truthful),
    ):
        if rows:
            _tell(name)
            metrics |= score(model, tokenizer, rows, max_batch_tokens=budget, seed=seed, chat=chat)
    for name, rows, score in (
        ("BBH", data.bbh, utility.score_bbh),
        ("TriviaQA", data.trivia, utility.score_trivia),
    ):
        if rows:
            _tell(name)
            metrics |= score(engine, tokenizer, rows, context=context, seed=seed, chat=chat)
    if data.fluency:
        _tell("fluency")
        metrics |= utility.score_fluency(engine, tokenizer, data.fluency, context=context, seed=seed, stop=stop)
    for split, questions in zip(SPLITS, (data.knowmem_forget, data.knowmem_retain), strict=True):
        if questions:
            _tell(f"KnowMem {split}")
            metrics |= muse.score_knowmem(engine, tokenizer, questions, split, context=context, seed=seed)
    if data.verbmem:
        _tell("VerbMem")
        metrics |= muse.score_verbmem(engine, tokenizer, data.verbmem, context=context, seed=seed)
    if data.privleak:
        _tell("PrivLeak")
        scores = [mia.mia_scores(model, tokenizer, texts, max_batch_tokens=budget) for texts in data.privleak]
        metrics |= mia.priv_leak(*scores, seed)
    ratios: list[float] = []
    if data.tofu:
        _tell("TOFU")
        found, ratios = tofu.score_tofu(
            model, engine, tokenizer, data.tofu, max_batch_tokens=budget, seed=seed, stop=stop
        )
        metrics |= found
    return metrics, ratios


def _tell(name: str) -> None:
    print(f"evaluation: {name}", flush=True)
