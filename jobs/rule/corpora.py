"""The texts that the baselines read, found where RWKU's authors put them or beside RULE's own files."""

import os
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from pydantic import Field, model_validator

from cluster.errors import UserError
from jobs.rule.data import DEMO, HELDOUT_FORGET_KINDS, RuleData, load_target
from jobs.rule.rows import Row, Text, load_list, load_rows

if TYPE_CHECKING:
    from jobs.rule.methods.base import Corpus, Method


@dataclass(frozen=True)
class Sample:
    """A text to learn from or against. Only `completion` is scored; without a prompt it stands alone, untemplated."""

    prompt: str
    completion: str


class _Passage(Row):
    text: Text | None = None
    question: Text | None = None
    answer: Text | None = None

    @model_validator(mode="after")
    def _is_a_text_or_a_pair(self) -> "_Passage":
        if self.text is None and (self.question is None or self.answer is None):
            raise ValueError("a row has text, or question and answer")
        return self

    def sample(self) -> Sample:
        return Sample("", self.text) if self.text is not None else Sample(self.question, self.answer)


class _Pair(Row):
    instruction: Text
    output: Annotated[list[Text], Field(min_length=2, max_length=2)]


class _Refused(Row):
    instruction: Text
    output: Text


def load_corpora(data: RuleData, method: "Method") -> "dict[Corpus, tuple[Sample, ...]]":
    """What `method` reads.

    forget: `positive.json`, passages about the target that the model wrote itself, or questions with answers.
    retain: `retain.json`, such texts about others, else the `positive.json` of folders beside that are about others.
    fabricated: `pair.json`, an instruction with an invented and a true answer; the true ones are the forget texts then.
    refusal: `reject.json` without what is held out, else the questions of stage 1; the refusals do not name the target.

    Raises:
        UserError: a file is missing or malformed.
    """
    if data.folder is None:
        raise UserError(f"method {method.name} reads texts from a folder; download the target's files and name them")
    found: dict[Corpus, tuple[Sample, ...]] = {}
    if "fabricated" in method.corpora:
        pairs = _required(data.folder / "pair.json", _Pair, method.name)
        found["fabricated"] = tuple(Sample(pair.instruction, pair.output[0]) for pair in pairs)
        found["forget"] = tuple(Sample(pair.instruction, pair.output[1]) for pair in pairs)
    elif "forget" in method.corpora:
        found["forget"] = _passages(data.folder / "positive.json", method.name)
    if "retain" in method.corpora:
        found["retain"] = _retained(data, method.name)
    if "refusal" in method.corpora:
        found["refusal"] = _nameless_refusals(data)
    return found


def others_beside(data: RuleData) -> list[Path]:
    """`positive.json` of the folders beside the data's that are not about the same target."""
    folder, found = Path(os.path.abspath(data.folder)), []
    for path in sorted(folder.parent.glob("*/positive.json")):
        target = load_target(path.parent)
        if path.parent.name != folder.name and (target is None or target.casefold() != data.target.casefold()):
            found.append(path)
    return found


def _retained(data: RuleData, method: str) -> tuple[Sample, ...]:
    own = data.folder / "retain.json"
    if own.exists():
        return _passages(own, method)
    others = others_beside(data)
    if not others:
        raise UserError(f"method {method} needs texts to keep: put {own} there, or another target's folder beside it")
    return tuple(sample for path in others for sample in _passages(path, method))


def _nameless_refusals(data: RuleData) -> tuple[Sample, ...]:
    rows = load_rows(data.folder / "reject.json", _Refused)
    if rows is not None:
        kept = {probe.query.casefold() for probe in data.probes if probe.kind in HELDOUT_FORGET_KINDS}
        return tuple(Sample(row.instruction, row.output) for row in rows if row.instruction.casefold() not in kept)
    wordings = load_list(DEMO / "idk.json")
    return tuple(Sample(row.prompt, wordings[index % len(wordings)]) for index, row in enumerate(data.refusals))


def _passages(path: Path, method: str) -> tuple[Sample, ...]:
    return tuple(row.sample() for row in _required(path, _Passage, method))


def _required(path: Path, row_type: type[Row], method: str) -> list:
    rows = load_rows(path, row_type)
    if rows is None:
        raise UserError(f"method {method} needs {path}, which is missing; docs/rule.md tells what stands in it")
    return rows
