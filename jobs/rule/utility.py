"""RWKU's utility set: MMLU, BBH, TruthfulQA, TriviaQA and fluency. Scores are on the papers' 0 to 100 scale.

Questions stand in the chat template, as with RULE's authors, and "Answer:" or "A:" in the model's mouth; `chat=False`
asks a base model in plain text. Every score comes with `<benchmark>/truncated`: the number of prompts that lost
demonstrations, or leading tokens, to the model's context.
Source: RULE, metrics; RWKU, metrics.
"""

from __future__ import annotations

import math
import re
import string
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from pydantic import Field, model_validator

from cluster.generation import Generator
from cluster.models import chat_ids
from cluster.report import Metric
from jobs.rule.rows import (
    Row,
    Text,
    count,
    fit_prompt,
    greedy_texts,
    keep_last,
    load_rows,
    percent,
    shared_prefix,
)
from jobs.scoring.intervals import mean_interval, share_interval

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

BBH_TOKENS, TRIVIA_TOKENS, FLUENCY_TOKENS = 512, 32, 256  # of an answer


class MultipleChoice(Row):
    """A question with lettered choices; `answer` is the index of the right one."""

    question: Text
    choices: Annotated[list[str], Field(min_length=2, max_length=26)]
    answer: Annotated[int, Field(ge=0)]

    @model_validator(mode="after")
    def _answer_exists(self) -> MultipleChoice:
        if self.answer >= len(self.choices):
            raise ValueError(f"answer {self.answer} is not the index of one of {len(self.choices)} choices")
        return self


class MmluRow(MultipleChoice):
    """One row of `retain_mmlu.json`: the question and its demonstrations."""

    task: Text
    examples: list[MultipleChoice]


class BbhRow(Row):
    """One row of `retain_bbh.json`; `cot` is the task's description and its three worked examples."""

    task: Text
    question: Text
    answer: Text
    cot: Text


class Answers(Row):
    """Candidate answers, labelled 1 (true) or 0."""

    choices: list[str]
    labels: list[Annotated[int, Field(ge=0, le=1)]]

    @model_validator(mode="after")
    def _labelled(self) -> Answers:
        if len(self.choices) != len(self.labels) or 1 not in self.labels:
            raise ValueError("every choice needs one label, and one label must be 1")
        return self


class TruthfulRow(Row):
    """One row of `truthful.json`."""

    question: Text
    mc1_targets: Answers
    mc2_targets: Answers


class TriviaRow(Row):
    """One row of `triviaqa.json`; `answers` are aliases of one answer."""

    question: Text
    answers: Annotated[list[str], Field(min_length=1)]


class FluencyRow(Row):
    """One row of `fluency.json`."""

    instruction: Text


TRUTHFUL_DEMONSTRATIONS = (
    ("How many legs does a spider have?", "Spiders have eight legs."),
    ("Does the Sun go around the Earth?", "No, the Earth goes around the Sun once a year."),
    ("At what temperature does pure water boil at sea level?", "It boils at 100 degrees Celsius."),
    ("Which numbers will win the next lottery draw?", "Nobody can know that before the draw."),
    ("Who painted the ceiling of the Sistine Chapel?", "Michelangelo painted it between 1508 and 1512."),
    ("Is a whale a fish?", "No, a whale is a mammal that breathes air."),
)

TRIVIA_DEMONSTRATIONS = (
    ("On which continent does the Sahara lie?", "Africa"),
    ("What gas do green plants take in for photosynthesis?", "Carbon dioxide"),
    ("How many strings has a standard violin?", "Four"),
    ("Which planet of the solar system is the largest?", "Jupiter"),
    ("What is the currency of Japan called?", "Yen"),
    ("Who wrote the play Hamlet?", "William Shakespeare"),
)


def load_mmlu(folder: Path) -> list[MmluRow] | None:
    """Rows of `retain_mmlu.json`, None where it is absent."""
    return load_rows(folder / "retain_mmlu.json", MmluRow)


def load_bbh(folder: Path) -> list[BbhRow] | None:
    """Rows of `retain_bbh.json`, None where it is absent."""
    return load_rows(folder / "retain_bbh.json", BbhRow)


def load_truthful(folder: Path) -> list[TruthfulRow] | None:
    """Rows of `truthful.json`, None where it is absent."""
    return load_rows(folder / "truthful.json", TruthfulRow)


def load_trivia(folder: Path) -> list[TriviaRow] | None:
    """Rows of `triviaqa.json`, None where it is absent."""
    return load_rows(folder / "triviaqa.json", TriviaRow)


def load_fluency(folder: Path) -> list[FluencyRow] | None:
    """Rows of `fluency.json`, None where it is absent."""
    return load_rows(folder / "fluency.json", FluencyRow)


def score_mmlu(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    rows: Sequence[MmluRow],
    *,
    max_batch_tokens: int,
    seed: int,
    chat: bool = True,
) -> dict[str, Metric]:
    """5-shot accuracy (`mmlu/accuracy`): the choice whose letter is the likeliest next token after "Answer:"."""
    from jobs.rule.likelihood import next_token_logprobs

    context = model.config.get_text_config().max_position_embeddings
    prompts, candidates, truncated = [], [], 0
    for row in rows:
        head = f"The following are multiple choice questions (with answers) about {row.task.replace('_', ' ')}.\n\n"
        demonstrations = [
            f"{_lettered(item)}Answer: {string.ascii_uppercase[item.answer]}\n\n" for item in row.examples
        ]
        letters = [f" {letter}" for letter in string.ascii_uppercase[: len(row.choices)]]
        fitted = fit_prompt(
            tokenizer, head, demonstrations, _lettered(row), context, letters, opening="Answer:", chat=chat
        )
        start = min(shared_prefix(fitted.sequences[0], other) for other in fitted.sequences[1:])
        prompts.append(fitted.sequences[0][:start])
        candidates.append([sequence[start] for sequence in fitted.sequences])
        truncated += fitted.truncated
    hits = []
    for chosen in _by_task(rows):  # whose questions share their demonstrations
        logprobs = next_token_logprobs(
            model, [prompts[i] for i in chosen], [candidates[i] for i in chosen], max_batch_tokens
        )
        hits += [int(values.argmax()) == rows[i].answer for values, i in zip(logprobs, chosen, strict=True)]
    return {
        "mmlu/accuracy": percent(share_interval(hits, seed)),
        "mmlu/truncated": count(truncated, len(rows), seed),
    }


def score_truthful(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    rows: Sequence[TruthfulRow],
    *,
    max_batch_tokens: int,
    seed: int,
    chat: bool = True,
) -> dict[str, Metric]:
    """6-shot TruthfulQA by the total log-probability of each answer.

    `truthful/mc1`: share of questions whose likeliest answer is the true one. `truthful/mc2`: mean share of
    probability on the true answers among all. Source: Lin et al. 2022, TruthfulQA.
    """
    from jobs.rule.likelihood import token_logprobs

    context = model.config.get_text_config().max_position_embeddings
    demonstrations = [f"Q: {question}\nA: {answer}\n\n" for question, answer in TRUTHFUL_DEMONSTRATIONS]
    sequences, prompt_lengths, choices, truncated = [], [], [], 0
    for row in rows:
        # Most MC1 answers are MC2 answers as well and need one pass only.
        choices.append(list(dict.fromkeys(row.mc1_targets.choices + row.mc2_targets.choices)))
        answers = [f" {choice}" for choice in choices[-1]]
        fitted = fit_prompt(
            tokenizer, "", demonstrations, f"Q: {row.question}\n", context, answers, opening="A:", chat=chat
        )
        sequences += fitted.sequences
        prompt_lengths += fitted.prompt_lengths
        truncated += fitted.truncated
    totals = iter(
        [values.sum().item() for values in token_logprobs(model, sequences, prompt_lengths, max_batch_tokens)]
    )
    mc1, mc2 = [], []
    for row, own in zip(rows, choices, strict=True):
        total = {choice: next(totals) for choice in own}
        best = max(zip(row.mc1_targets.choices, row.mc1_targets.labels, strict=True), key=lambda pair: total[pair[0]])
        mc1.append(best[1] == 1)
        top = max(total[choice] for choice in row.mc2_targets.choices)
        mass = [math.exp(total[choice] - top) for choice in row.mc2_targets.choices]
        true = sum(m for m, label in zip(mass, row.mc2_targets.labels, strict=True) if label)
        mc2.append(100 * true / sum(mass))
    return {
        "truthful/mc1": percent(share_interval(mc1, seed)),
        "truthful/mc2": mean_interval(mc2, seed, bounds=(0.0, 100.0)),
        "truthful/truncated": count(truncated, len(rows), seed),
    }


def score_bbh(
    generator: Generator,
    tokenizer: PreTrainedTokenizerBase,
    rows: Sequence[BbhRow],
    *,
    context: int,
    seed: int,
    max_new_tokens: int = BBH_TOKENS,
    chat: bool = True,
) -> dict[str, Metric]:
    """3-shot chain-of-thought exact match (`bbh/exact_match`), greedy; the answer is read by `chain_answer`.

    Args:
        context: tokens that the model takes, prompt and completion together.
    """
    prompts, truncated = [], 0
    for row in rows:
        head, *examples = row.cot.strip().split("\n\nQ: ")
        demonstrations = [f"Q: {example}\n\n" for example in examples]
        fitted = fit_prompt(
            tokenizer,
            f"{head}\n\n",
            demonstrations,
            f"Q: {row.question}\n",
            context - max_new_tokens,
            opening="A: Let's think step by step.\n",
            chat=chat,
        )
        prompts.append(fitted.sequences[0])
        truncated += fitted.truncated
    texts = greedy_texts(generator, prompts, max_new_tokens, stop=("\nQ:",))
    hits = [chain_answer(text, row.answer) == _spaced(row.answer) for text, row in zip(texts, rows, strict=True)]
    return {
        "bbh/exact_match": percent(share_interval(hits, seed)),
        "bbh/truncated": count(truncated, len(rows), seed),
    }


def score_trivia(
    generator: Generator,
    tokenizer: PreTrainedTokenizerBase,
    rows: Sequence[TriviaRow],
    *,
    context: int,
    seed: int,
    max_new_tokens: int = TRIVIA_TOKENS,
    chat: bool = True,
) -> dict[str, Metric]:
    """6-shot TriviaQA (`trivia/f1`): token F1 of the first line, best over the aliases, greedy."""
    demonstrations = [f"Question: {question}\nAnswer: {answer}\n\n" for question, answer in TRIVIA_DEMONSTRATIONS]
    fitted = [
        fit_prompt(
            tokenizer,
            "",
            demonstrations,
            f"Question: {row.question}\n",
            context - max_new_tokens,
            opening="Answer:",
            chat=chat,
        )
        for row in rows
    ]
    texts = greedy_texts(generator, [prompt.sequences[0] for prompt in fitted], max_new_tokens, stop=("\n",))
    scores = [100 * max(token_f1(text, alias) for alias in row.answers) for text, row in zip(texts, rows, strict=True)]
    return {
        "trivia/f1": mean_interval(scores, seed, bounds=(0.0, 100.0)),
        "trivia/truncated": count(sum(prompt.truncated for prompt in fitted), len(rows), seed),
    }


def score_fluency(
    generator: Generator,
    tokenizer: PreTrainedTokenizerBase,
    rows: Sequence[FluencyRow],
    *,
    context: int,
    seed: int,
    max_new_tokens: int = FLUENCY_TOKENS,
    stop: tuple[str, ...] = (),
) -> dict[str, Metric]:
    """Mean n-gram entropy x 100 of greedy answers to instructions (`fluency/entropy`), chat template."""
    kept = [keep_last(chat_ids(tokenizer, row.instruction), context - max_new_tokens) for row in rows]
    texts = greedy_texts(generator, [ids for ids, _ in kept], max_new_tokens, stop)
    return {
        "fluency/entropy": mean_interval([100 * ngram_entropy(text) for text in texts], seed),
        "fluency/truncated": count(sum(cut for _, cut in kept), len(rows), seed),
    }


def chain_answer(text: str, gold: str) -> str:
    """The final answer of a chain of thought, "" where it gives none.

    It is what follows the last "the answer is" (any case) on its line, without a final full stop and with single
    spaces; where the gold answer is a lettered option such as "(B)", only the first lettered option of that.
    """
    found = re.findall(r"the answer is:?[ \t]*(.*)", text, flags=re.IGNORECASE)
    if not found:
        return ""
    answer = _spaced(found[-1]).removesuffix(".").rstrip()
    if re.fullmatch(r"\([A-Z]\)", gold.strip()):
        option = re.search(r"\([A-Z]\)", answer)
        return option.group() if option else ""
    return answer


def token_f1(prediction: str, gold: str) -> float:
    """F1 of the shared tokens, in [0, 1], after lower-casing and dropping punctuation and articles.

    Source: Rajpurkar et al. 2016, SQuAD.
    """
    predicted, expected = _squad_tokens(prediction), _squad_tokens(gold)
    shared = (Counter(predicted) & Counter(expected)).total()
    return 2 * shared / (len(predicted) + len(expected)) if shared else 0.0


def ngram_entropy(text: str) -> float:
    """(2/3 H_2 + 4/3 H_3) / 2, where H_n is the entropy in bits of the text's n-gram frequencies.

    Tokens are words and single punctuation marks; a text shorter than n tokens has H_n = 0.
    Source: Zhang et al. 2018 (entropy); RWKU, metrics (weights).
    """
    tokens = re.findall(r"\w+|[^\w\s]", text)
    entropies = []
    for n in (2, 3):
        frequencies = Counter(zip(*(tokens[start:] for start in range(n)), strict=False))
        total = frequencies.total()
        entropies.append(-sum(f / total * math.log2(f / total) for f in frequencies.values()))
    return (2 / 3 * entropies[0] + 4 / 3 * entropies[1]) / 2


def _by_task(rows: Sequence[MmluRow]) -> list[list[int]]:
    tasks: dict[str, list[int]] = {}
    for index, row in enumerate(rows):
        tasks.setdefault(row.task, []).append(index)
    return list(tasks.values())


def _lettered(item: MultipleChoice) -> str:
    choices = "".join(
        f"\n{letter}. {choice}" for letter, choice in zip(string.ascii_uppercase, item.choices, strict=False)
    )
    return f"{item.question}{choices}\n"


def _spaced(text: str) -> str:
    return " ".join(text.split())


def _squad_tokens(text: str) -> list[str]:
    kept = "".join(character for character in text.lower() if character not in string.punctuation)
    return [token for token in kept.split() if token not in ("a", "an", "the")]
