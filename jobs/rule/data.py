"""What RULE trains on and asks: RWKU folders as its authors publish them, MUSE-Books, the hub's RWKU, the demo."""

import random
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from cluster.errors import UserError
from jobs.rule.rows import Row, Text, load_rows

DEMO = Path(__file__).parent / "demo"
DEMO_NAME = "demo"  # of it, in `rule.data`
PROBE_FILES = {
    "forget_fb": "forget_level1.json",
    "forget_qa": "forget_level2.json",
    "forget_aa": "forget_level3.json",
    "neighbor_fb": "neighbor_level1.json",
    "neighbor_qa": "neighbor_level2.json",
    "general": "general_qa.json",
}
FORGET_KINDS = ("forget_fb", "forget_qa", "forget_aa")
NEIGHBOR_KINDS = ("neighbor_fb", "neighbor_qa")
RETAINED_KINDS = (*NEIGHBOR_KINDS, "general")
HELDOUT_FORGET_KINDS = ("heldout_forget_qa", "heldout_forget_fb")
HELDOUT_BOUNDARY_KINDS = ("heldout_boundary_qa", "heldout_boundary_fb")


@dataclass(frozen=True)
class Item:
    """A question of stage 2 with what its reward needs.

    label: "reject" (a forget question) or "normal" (a boundary question). form: "qa" or "fb" (fill in the blank).
    target: the name that a refusal should hold, "" on normal rows. source: the forget question it stems from.
    """

    prompt: str
    reference: str
    label: str
    form: str
    target: str
    source: int


@dataclass(frozen=True)
class Refusal:
    """A row of stage 1: a forget question and the refusal to learn for it."""

    prompt: str
    refusal: str
    source: int


@dataclass(frozen=True)
class Probe:
    """A held-out question; `kind` is a key of PROBE_FILES or a held-out kind, `type` the attack of an AA probe."""

    query: str
    answer: str
    kind: str
    type: str
    subject: str


@dataclass(frozen=True)
class RuleData:
    """Everything about one target. `folder` is where further benchmark files may lie, or None (hub)."""

    target: str
    refusals: tuple[Refusal, ...]
    items: tuple[Item, ...]
    probes: tuple[Probe, ...]
    folder: Path | None


class _Intro(Row):
    target: Text


class _Reject(Row):
    instruction: Text
    output: Text


class _Neighbor(Row):
    question: Text
    answer: Text


class _MuseReject(_Reject):
    neighbor_question: _Neighbor


class _Rl(Row):
    prompt: Text
    solution: list[str]


class _Probe(Row):
    query: Text
    answer: Text
    type: str = ""
    subject: str = ""


def load_data(source: str, target: str | None, held_out_share: float, seed: int) -> RuleData:
    """Reads, checks and splits the data of one target.

    Args:
        source: "demo", a folder in RWKU or MUSE-Books layout, or "hub:jinzhuoran/RWKU".
        target: name of the target; only the hub data set needs it.
        held_out_share: share of the forget questions kept out of training, each with its fill-in form and twins.
        seed: of the choice which ones.

    Raises:
        UserError: missing folder or file, malformed JSON or row (file and row named), empty forget or boundary set.
    """
    if source.startswith("hub:"):
        from jobs.rule.hub import load_hub

        data = load_hub(source.removeprefix("hub:"), target)
    else:
        folder = data_folder(source)
        data = _load_rwku(folder) if (folder / "intro.json").exists() else _load_muse(folder)
        if target is not None and target != data.target:
            raise UserError(f"rule.target = {target}, but {source} is about {data.target}; leave rule.target out")
    if not data.refusals or not any(item.label == "reject" for item in data.items):
        raise UserError(f"{source} has no forget question; RULE needs some to learn what to refuse")
    if not any(item.label == "normal" for item in data.items):
        raise UserError(f"{source} has no boundary question; RULE needs some to learn what to keep answering")
    return hold_out(data, held_out_share, seed)


def data_folder(source: str) -> Path | None:
    """The folder that `rule.data` names, None for the hub.

    Raises:
        UserError: there is no such folder here.
    """
    if source.startswith("hub:"):
        return None
    folder = DEMO if source == DEMO_NAME else Path(source).expanduser()
    if not folder.is_dir():
        raise UserError(f"rule.data = {source} is no folder that this machine sees; name one, or 'demo'")
    return folder


def hold_out(data: RuleData, share: float, seed: int) -> RuleData:
    """Moves `share` of the forget questions, with all that stems from them, from training to the probes.

    One forget question at least stays in training.

    Raises:
        UserError: stage 1 and stage 2 do not stem from the same questions, or a side would be left without a row.
    """
    sources = sorted({item.source for item in data.items})
    if share and {row.source for row in data.refusals} != set(sources):
        raise UserError(
            f"stage 2 has {len(sources)} blocks of questions and stage 1 {len(data.refusals)} rows, but a question is "
            "held out with its block: let block i stem from row i (docs/rule.md), or take rule.held_out_share=0"
        )
    chosen = set(random.Random(seed).sample(sources, min(round(share * len(sources)), len(sources) - 1)))
    if not chosen:
        return data
    held = [item for item in data.items if item.source in chosen]
    train = tuple(item for item in data.items if item.source not in chosen)
    # A question that occurs twice (RWKU keeps duplicates) must not be trained on once and held out once.
    trained = {item.prompt.casefold() for item in train}
    subject = data.target
    probes = [
        Probe(item.prompt, item.reference, f"heldout_{side}_{item.form}", item.form, subject)
        for item in held
        for side in ["forget" if item.label == "reject" else "boundary"]
        if item.prompt.casefold() not in trained
    ]
    asked = {probe.query.casefold() for probe in probes}
    refusals = tuple(row for row in data.refusals if row.source not in chosen and row.prompt.casefold() not in asked)
    for name, left in (
        ("forget question of stage 1", refusals),
        ("forget question of stage 2", [item for item in train if item.label == "reject"]),
        ("boundary question", [item for item in train if item.label == "normal"]),
    ):
        if not left:
            raise UserError(f"rule.held_out_share = {share} leaves no {name} to train on; lower it, or give more data")
    return replace(data, items=train, refusals=refusals, probes=data.probes + tuple(probes))


def schedule(items: Sequence[Item], steps: int, prompts_per_step: int, seed: int) -> list[int]:
    """Indices of the items that each step asks, `steps * prompts_per_step` in all.

    Where each forget question has a boundary twin of its form (as in the paper's 1:1 file), twins are asked in the same
    step: they differ by whom they ask about and little else, so that what their gradients share cancels out. Otherwise
    each step has both sides in the proportion of the set. Both ways walk the set in a new random order an epoch.
    """
    length = steps * prompts_per_step
    pairs = twins(items)
    if pairs is not None:
        stream = _shuffled(pairs, seed)
        return [index for _ in range(-(-length // 2)) for index in next(stream)][:length]
    sides = {label: [i for i, item in enumerate(items) if item.label == label] for label in ("reject", "normal")}
    share = len(sides["reject"]) / len(items)
    streams = {label: _shuffled(indices, seed + order) for order, (label, indices) in enumerate(sides.items())}
    chosen = []
    for position in range(length):
        forget = int((position + 1) * share + 1e-9) > int(position * share + 1e-9)
        chosen.append(next(streams["reject" if forget else "normal"]))
    return chosen


def twins(items: Sequence[Item]) -> list[tuple[int, int]] | None:
    """(forget, boundary) pairs of one source; None where the two sides of a source do not match in number."""
    by_source: dict[int, dict[str, list[int]]] = {}
    for index, item in enumerate(items):
        by_source.setdefault(item.source, {"reject": [], "normal": []})[item.label].append(index)
    if any(len(sides["reject"]) != len(sides["normal"]) for sides in by_source.values()):
        return None
    pairs = []
    for sides in by_source.values():
        # a few of the authors' boundary rows lack their blank: they stand behind those of question form, as their twins
        ordered = [sorted(indices, key=lambda i: items[i].form == "fb") for indices in sides.values()]
        pairs += sorted(zip(*ordered, strict=True), key=lambda pair: items[pair[0]].form)
    return pairs


def _shuffled(indices: list, seed: int) -> Iterator:
    generator = random.Random(seed)
    while True:
        order = list(indices)
        generator.shuffle(order)
        yield from order


def form_of(prompt: str) -> str:
    """ "fb" where the prompt has a blank to fill in, else "qa"."""
    return "fb" if "___" in prompt else "qa"


def _load_rwku(folder: Path) -> RuleData:
    target = _required(folder / "intro.json", _Intro)[0].target
    rejects = _required(folder / "reject_target.json", _Reject)
    refusals = tuple(Refusal(row.instruction, row.output, index) for index, row in enumerate(rejects))
    probes = [probe for kind, name in PROBE_FILES.items() for probe in _probes(folder / name, kind)]
    if not any(probe.kind == "general" for probe in probes):
        probes += general_probes(target)
    items = read_items(folder / "rl_rejection_with_fb_neighbor_target.json", target)
    return RuleData(target, refusals, items, tuple(probes), folder)


def read_items(path: Path, target: str) -> tuple[Item, ...]:
    """Rows of a stage-2 file about `target`.

    Rows stand in blocks, each opened by the forget rows of one question: a block is one source.
    """
    items: list[Item] = []
    source, previous = -1, "normal"
    for index, row in enumerate(_required(path, _Rl)):
        label = {"<reject>": "reject", "<normal>": "normal"}.get(row.solution[0] if row.solution else "")
        if label is None or len(row.solution) < 2:
            raise UserError(
                f"{path}, row {index}: solution must be ['<reject>' or '<normal>', reference]; mend the row."
            )
        if label == "reject" and previous == "normal":
            source += 1
        previous = label
        named = row.solution[2].strip() if len(row.solution) > 2 else ""
        name = (named or target) if label == "reject" else ""
        items.append(Item(row.prompt, row.solution[1], label, form_of(row.prompt), name, max(source, 0)))
    return tuple(items)


def load_target(folder: Path) -> str | None:
    """Whom a folder in RWKU's layout is about; None for one without `intro.json`."""
    rows = load_rows(folder / "intro.json", _Intro)
    return None if rows is None else rows[0].target


def _probes(path: Path, kind: str) -> list[Probe]:
    rows = load_rows(path, _Probe) or []
    return [Probe(row.query, row.answer, kind, row.type, row.subject) for row in rows]


def general_probes(target: str) -> list[Probe]:
    """The demo's questions of general knowledge, but for those about the target, which it is right to refuse."""
    probes = _probes(DEMO / PROBE_FILES["general"], "general")
    return [probe for probe in probes if not is_about(target, probe.query, probe.answer)]


def is_about(target: str, query: str, answer: str) -> bool:
    """Whether a question or its answer names the target, or the answer is a part of that name, as "Einstein"."""
    name, told = target.casefold(), answer.casefold()
    words = set(re.findall(r"\w+", told))
    return name in query.casefold() or name in told or (bool(words) and words <= set(re.findall(r"\w+", name)))


def _load_muse(folder: Path) -> RuleData:
    path = folder / "reject_with_neighbor_target_qa_only.json"
    if not path.exists():
        raise UserError(f"{folder} has neither intro.json (RWKU) nor {path.name} (MUSE-Books); check rule.data")
    rows = _required(path, _MuseReject)
    refusals, items = [], []
    for source, row in enumerate(rows):
        refusals.append(Refusal(row.instruction, row.output, source))
        items.append(Item(row.instruction, row.output, "reject", "qa", "Harry Potter", source))
        twin = row.neighbor_question
        items.append(Item(twin.question, twin.answer, "normal", "qa", "", source))
    probes = []
    for split, kind in (("forget", "forget_qa"), ("retain", "neighbor_qa")):
        for row in load_rows(folder / f"knowmem_{split}_qa.json", _Neighbor) or []:
            probes.append(Probe(row.question, row.answer, kind, "knowmem", "Harry Potter"))
    probes += general_probes("Harry Potter")
    return RuleData("Harry Potter", tuple(refusals), tuple(items), tuple(probes), folder)


def _required(path: Path, row_type: type[Row]) -> list:
    rows = load_rows(path, row_type)
    if rows is None:
        raise UserError(f"{path} is missing; the RWKU layout needs it (see docs/rule.md)")
    return rows
