"""Benchmark files read into checked rows, and few-shot prompts fitted into a model's context."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from cluster.errors import UserError
from cluster.generation import Generator, Sampling
from cluster.models import chat_ids
from cluster.report import Metric

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


class Row(BaseModel):
    """One row of a benchmark file; fields that the file has beyond it are ignored."""

    model_config = ConfigDict(frozen=True, strict=True, extra="ignore")


Text = Annotated[str, Field(min_length=1)]
RowType = TypeVar("RowType", bound=Row)


def load_rows(path: Path, row_type: type[RowType]) -> list[RowType] | None:
    """Rows of a JSON list, or None where the file is absent.

    Raises: UserError naming file, row index and field for a missing field or a value of the wrong type.
    """
    values = load_list(path)
    if values is None:
        return None
    rows = []
    for index, value in enumerate(values):
        try:
            rows.append(row_type.model_validate(value))
        except ValidationError as error:
            first = error.errors()[0]
            field = ".".join(map(str, first["loc"])) or "the row itself"
            what = "is missing" if first["type"] == "missing" else f"is wrong ({first['msg']})"
            raise UserError(f"{path}, row {index}: {field} {what}; mend the row or leave the file out.") from None
    return rows


def load_list(path: Path) -> list | None:
    """A JSON list with at least one element, or None where the file is absent; UserError for anything else.

    JSON Lines are read too, whatever the file's name: many data sets (TOFU) have them under `.json`.
    """
    if not path.exists():
        return None
    try:
        text = path.read_text(encoding="utf-8")
        values = _objects(text, path) if text.lstrip().startswith("{") else json.loads(text)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path} is not JSON in UTF-8 ({error}); mend the file or leave it out.") from None
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror}); mend its permissions or leave it out.") from None
    if not isinstance(values, list) or not values:
        raise UserError(f"{path} holds no JSON list of rows; mend the file or leave it out.")
    return values


def _objects(text: str, path: Path) -> list | None:
    """The objects of JSON Lines; None for one object, over however many lines."""
    try:
        json.loads(text)
        return None
    except ValueError:
        pass
    rows = []
    for number, line in enumerate(text.split("\n"), start=1):
        if line.strip():
            try:
                rows.append(json.loads(line))
            except ValueError as error:
                told = f"{path} line {number} is not JSON ({error}); mend the line or leave the file out."
                raise UserError(told) from None
    return rows


def encode(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    """Token ids of plain text, with the special tokens that the tokenizer itself puts around text."""
    return list(tokenizer(text).input_ids)


@dataclass(frozen=True)
class Fitted:
    """A few-shot prompt with each of its continuations.

    sequences: token ids of prompt and continuation, one a continuation.
    prompt_lengths: leading tokens of each that belong to the prompt, at least 1.
    truncated: whether demonstrations or leading tokens were dropped.
    """

    sequences: list[list[int]]
    prompt_lengths: list[int]
    truncated: bool


def fit_prompt(
    tokenizer: PreTrainedTokenizerBase,
    head: str,
    demonstrations: Sequence[str],
    question: str,
    max_tokens: int,
    continuations: Sequence[str] = ("",),
    *,
    opening: str = "",
    chat: bool = False,
) -> Fitted:
    """Few-shot prompt that has at most `max_tokens` tokens with its longest continuation.

    In a `chat` all but `opening` is the user's message, and `opening` stands in the model's mouth.

    Demonstrations are dropped from the front, the same for all continuations, until `head`, the rest, `question` and
    continuation fit; where even the question alone does not, the last `max_tokens` tokens are kept. A tokenizer may
    merge across the seam of prompt and continuation; what it merges is counted to the continuation.

    Raises: ValueError where `max_tokens` leaves no room for a prompt.
    """
    _require_room(max_tokens)
    for dropped in range(len(demonstrations) + 1):
        asked = head + "".join(demonstrations[dropped:]) + question
        if chat:
            ids = chat_ids(tokenizer, asked.rstrip("\n"), opening)
            sequences = [chat_ids(tokenizer, asked.rstrip("\n"), opening + text) for text in continuations]
        else:
            ids = encode(tokenizer, asked + opening)
            sequences = [encode(tokenizer, asked + opening + text) for text in continuations]
        if max(map(len, sequences)) <= max_tokens:
            break
    lengths = [shared_prefix(ids, sequence) for sequence in sequences]
    overlong = [max(0, len(sequence) - max_tokens) for sequence in sequences]
    return Fitted(
        sequences=[sequence[cut:] for sequence, cut in zip(sequences, overlong, strict=True)],
        prompt_lengths=[max(1, length - cut) for length, cut in zip(lengths, overlong, strict=True)],
        truncated=dropped > 0 or any(overlong),
    )


def keep_last(ids: list[int], max_tokens: int) -> tuple[list[int], bool]:
    """The last `max_tokens` tokens, and whether anything was dropped; ValueError where there is no room for one."""
    _require_room(max_tokens)
    return ids[-max_tokens:], len(ids) > max_tokens


def shared_prefix(first: Sequence[int], second: Sequence[int]) -> int:
    """Number of leading elements that two sequences share."""
    for position, (a, b) in enumerate(zip(first, second, strict=False)):
        if a != b:
            return position
    return min(len(first), len(second))


def greedy_texts(
    generator: Generator, prompts: Sequence[list[int]], max_new_tokens: int, stop: tuple[str, ...] = ()
) -> list[str]:
    """One greedy completion a prompt, as text."""
    sampling = Sampling(max_new_tokens=max_new_tokens, stop=stop)
    return [completions[0].text for completions in generator.generate(prompts, sampling)]


def percent(metric: Metric) -> Metric:
    """The metric times 100."""
    return replace(metric, value=100 * metric.value, ci95=(100 * metric.ci95[0], 100 * metric.ci95[1]))


def count(number: int, n: int, seed: int) -> Metric:
    """A count among n items: it was not sampled, so its interval is the count itself."""
    return Metric(value=float(number), ci95=(float(number), float(number)), n=n, seed=seed)


def _require_room(max_tokens: int) -> None:
    if max_tokens < 1:
        raise ValueError(f"No room for a prompt: {max_tokens} tokens are left of the model's context.")
