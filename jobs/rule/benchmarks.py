"""RWKU's and MUSE's measures beyond the probes: every one whose files lie in the data folder."""

from pathlib import Path
from typing import TYPE_CHECKING

from cluster.generation import Generator
from cluster.models import context_length
from cluster.report import Metric
from jobs.rule import mia, muse, utility
from jobs.rule.config import Evaluation

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


def run_benchmarks(
    folder: Path,
    model: "PreTrainedModel",
    engine: Generator,
    tokenizer: "PreTrainedTokenizerBase",
    settings: Evaluation,
    seed: int,
) -> dict[str, Metric]:
    """Membership inference, utility sets and MUSE scores by name; a measure without files is left out, not guessed."""
    budget, context = settings.max_batch_tokens, context_length(model)
    metrics: dict[str, Metric] = {}
    forget, retain = mia.load_passages(folder, "forget"), mia.load_passages(folder, "retain")
    if forget and retain:
        _tell("membership inference")
        scores = [mia.mia_scores(model, tokenizer, texts, max_batch_tokens=budget) for texts in (forget, retain)]
        metrics |= {f"mia/{name}": metric for name, metric in mia.mia_report(*scores, seed).items()}
    for name, load, score in (
        ("MMLU", utility.load_mmlu, utility.score_mmlu),
        ("TruthfulQA", utility.load_truthful, utility.score_truthful),
    ):
        rows = load(folder)
        if rows:
            _tell(name)
            metrics |= score(model, tokenizer, rows, max_batch_tokens=budget, seed=seed)
    for name, load, score in (
        ("BBH", utility.load_bbh, utility.score_bbh),
        ("TriviaQA", utility.load_trivia, utility.score_trivia),
        ("fluency", utility.load_fluency, utility.score_fluency),
    ):
        rows = load(folder)
        if rows:
            _tell(name)
            metrics |= score(engine, tokenizer, rows, context=context, seed=seed)
    for split in ("forget", "retain"):
        data = muse.load_knowmem(folder, split)
        if data:
            _tell(f"KnowMem {split}")
            metrics |= muse.score_knowmem(engine, tokenizer, data, split, context=context, seed=seed)
    verbatim = muse.load_verbmem(folder)
    if verbatim:
        _tell("VerbMem")
        metrics |= muse.score_verbmem(engine, tokenizer, verbatim, context=context, seed=seed)
    private = muse.load_privleak(folder)
    if private:
        _tell("PrivLeak")
        scores = [mia.mia_scores(model, tokenizer, texts, max_batch_tokens=budget) for texts in private]
        metrics |= mia.priv_leak(*scores, seed)
    return metrics


def _tell(name: str) -> None:
    print(f"evaluation: {name}", flush=True)
