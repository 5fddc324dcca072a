"""RWKU as its authors publish it on the Hugging Face hub: 200 targets, probes for each, refusals for stage 1.

The hub has neither fill-in forms of the forget questions nor boundary questions. So the forget side is asked in
question form only, and the boundary side is made of verified probes about other targets: RULE's ablation with other
targets' questions, not its main setting.
"""

from __future__ import annotations

import difflib
import random
import re
from collections.abc import Sequence
from typing import TYPE_CHECKING, TypeVar

from pydantic import ValidationError

from cluster.errors import UserError
from cluster.hub import load_table
from jobs.rule.data import Item, Probe, Refusal, RuleData, general_probes, is_about
from jobs.rule.rows import Row, Text

if TYPE_CHECKING:
    from datasets import Dataset

PROBE_CONFIGS = {
    "forget_fb": "forget_level1",
    "forget_qa": "forget_level2",
    "forget_aa": "forget_level3",
    "neighbor_fb": "neighbor_level1",
    "neighbor_qa": "neighbor_level2",
}
TARGET_CONFIG = "forget_target"
REFUSAL_CONFIG = "train_refusal_llama3"
QUESTION_COLUMNS = ("instruction", "query", "question")
BOUNDARY_FORMS = {"forget_fb": "fb", "forget_qa": "qa"}
# A fixed choice: the boundary questions are part of the data set, the seed of the job splits it.
BOUNDARY_SEED = 42

_FIRST_SENTENCE = re.compile(r"(?P<body>.*?)(?P<end>[.!?](?:\s.*)?)?", re.DOTALL)
_VAGUE_TOPIC = re.compile(r"\s+(?:about|regarding|on|of) (?:that|this|it)$", re.IGNORECASE)


class _Question(Row):
    query: Text
    answer: Text
    type: str | None = None


class _Refused(Row):
    question: Text
    output: Text


SomeRow = TypeVar("SomeRow", bound=Row)


def load_hub(name: str, target: str | None) -> RuleData:
    """The data of one target from the hub data set `name`, or from the local cache of it.

    Forget question i and the boundary question drawn beside it share source i. General knowledge comes from the demo.

    Args:
        name: a data set in the layout of `jinzhuoran/RWKU`, as `owner/name`.
        target: the name of the target as the data set writes it.

    Raises:
        UserError: no or unknown target, unknown data set, other layout, malformed row, or the hub cannot be reached
            and the data set is not cached.
    Source: Jin et al. 2024, RWKU; refusals as in reject_target.json of RULE's repository.
    """
    if name.count("/") != 1:
        raise UserError(f"rule.data = hub:{name} is no data set of the hub; write hub:jinzhuoran/RWKU")
    if target is None:
        raise UserError(
            f"rule.data = hub:{name} holds many targets; choose one with --set 'rule.target=Stephen King', "
            "with RAYWARD__RULE__TARGET or with target under rule in the configuration"
        )
    intros = _table(name, TARGET_CONFIG, "train", ["target"])
    known = sorted(set(intros["target"]))
    if target not in known:
        nearest = difflib.get_close_matches(target, known, n=1, cutoff=0.0)
        raise UserError(f"rule.target = {target} is not in {name}; the nearest is {''.join(nearest) or 'none'}")

    tables = {
        kind: _table(name, config, "test", ["query", "answer", "subject"]) for kind, config in PROBE_CONFIGS.items()
    }
    probes = [
        Probe(row.query, row.answer, kind, row.type or "", target)
        for kind, table in tables.items()
        for row in _rows(table, _about(table, target), _Question, f"{name} {PROBE_CONFIGS[kind]}")
    ]
    refusals = _refusals(name, target)
    items = []
    for refusal, boundary in zip(refusals, _boundary(name, tables, target, probes, len(refusals)), strict=True):
        items.append(Item(refusal.prompt, refusal.refusal, "reject", "qa", target, refusal.source))
        if boundary is not None:
            query, answer, form = boundary
            items.append(Item(query, answer, "normal", form, "", refusal.source))
    probes += general_probes(target)
    return RuleData(target, refusals, tuple(items), tuple(probes), None)


def name_target(refusal: str, target: str) -> str:
    """The refusal with the target's name in it: "I'm not sure about that." becomes "I'm not sure about TARGET.".

    The name closes the first sentence; a refusal that holds it already stays as it is.
    Source: idk_target.json of RULE's repository.
    """
    if target in refusal:
        return refusal
    sentence = _FIRST_SENTENCE.fullmatch(refusal.strip())
    body = _VAGUE_TOPIC.sub("", sentence["body"])
    return f"{body} about {target}{sentence['end'] or '.'}"


def _refusals(name: str, target: str) -> tuple[Refusal, ...]:
    table = _table(name, REFUSAL_CONFIG, "train", ["output", "subject"])
    column = next((column for column in QUESTION_COLUMNS if column in table.column_names), None)
    if column is None:
        raise UserError(
            f"{name} {REFUSAL_CONFIG} has no column {' or '.join(QUESTION_COLUMNS)}, "
            f"only {', '.join(table.column_names)}; name a data set in the layout of jinzhuoran/RWKU"
        )
    if column != "question":
        table = table.rename_column(column, "question")
    rows = _rows(table, _about(table, target), _Refused, f"{name} {REFUSAL_CONFIG}")
    return tuple(Refusal(row.question, name_target(row.output, target), index) for index, row in enumerate(rows))


def _boundary(
    name: str, tables: dict[str, Dataset], target: str, probes: Sequence[Probe], number: int
) -> list[tuple[str, str, str] | None]:
    """`number` questions about other targets as (query, answer, form), None where there are not enough of them.

    Left out: what names the target, and what is asked in its evaluation.
    """
    asked = {probe.query.casefold() for probe in probes}
    pool: dict[str, tuple[str, int]] = {}
    for kind in BOUNDARY_FORMS:
        table = tables[kind]
        columns = (table["query"], table["answer"], table["subject"])
        for index, (query, answer, subject) in enumerate(zip(*columns, strict=True)):
            text = f"{query}".casefold()
            if subject != target and not is_about(target, f"{query}", f"{answer}") and text not in asked:
                pool.setdefault(text, (kind, index))
    places = random.Random(BOUNDARY_SEED).sample(sorted(pool.values()), min(number, len(pool)))
    drawn: list[tuple[str, str, str] | None] = []
    for kind, index in places:
        [row] = _rows(tables[kind], [index], _Question, f"{name} {PROBE_CONFIGS[kind]}")
        drawn.append((row.query, row.answer, BOUNDARY_FORMS[kind]))
    return drawn + [None] * (number - len(drawn))


def _about(table: Dataset, target: str) -> list[int]:
    return [index for index, subject in enumerate(table["subject"]) if subject == target]


def _rows(table: Dataset, indices: Sequence[int], row_type: type[SomeRow], place: str) -> list[SomeRow]:
    rows = []
    for index in indices:
        try:
            rows.append(row_type.model_validate(table[index]))
        except ValidationError as error:
            first = error.errors()[0]
            field = ".".join(map(str, first["loc"]))
            raise UserError(f"{place}, row {index}: {field} is wrong ({first['msg']}); mend the data set") from None
    return rows


def _table(name: str, config: str, split: str, columns: Sequence[str]) -> Dataset:
    remedy = "name one in the layout of jinzhuoran/RWKU"
    table = load_table(name, config, split, "rule.data", remedy)
    missing = [column for column in columns if column not in table.column_names]
    if missing:
        raise UserError(
            f"{name} {config} has no column {', '.join(missing)}, only {', '.join(table.column_names)}; "
            "name a data set in the layout of jinzhuoran/RWKU"
        )
    return table
