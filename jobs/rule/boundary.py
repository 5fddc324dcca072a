"""Which boundary questions stage 2 learns from: near or far, how many a forget question, with fill-in forms or not.

The variants of RULE's ablations (boundary kind, boundary ratio, fill-in rows). They change the training questions only:
what is held out, and every probe, stays the same, so that variants can be compared.
"""

import random
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from cluster.errors import UserError
from jobs.rule.config import Boundary
from jobs.rule.data import Item, RuleData, twins

FAR_FILE = "rl_rejection_with_fb_neighbor_finance_business.json"
MORE_FILES = "rl_rejection_with_fb_neighbor_target_r*.json"
Reader = Callable[[Path], tuple[Item, ...]]


def with_boundary(data: RuleData, settings: Boundary, seed: int, read: Reader) -> RuleData:
    """The data with the boundary questions that `settings` ask for; unchanged by the settings' defaults.

    Args:
        data: after the hold-out.
        seed: of the choice, where there are more than `ratio` asks for.
        read: rows of a stage-2 file.

    Raises:
        UserError: the data lack the file of far questions, or have too few for the ratio, or no row is left.
    """
    if settings == Boundary():
        return data
    forget = [item for item in data.items if item.label == "reject"]
    boundary = [item for item in data.items if item.label == "normal"]
    if settings.kind == "none" or settings.ratio == 0:
        boundary = []
    elif settings.kind == "far":
        boundary = _unseen(_far(data, read), data)
    if not settings.fill_in:
        forms = {id(data.items[other]): data.items[one].form for one, other in twins(data.items) or ()}
        forget = [item for item in forget if item.form == "qa"]
        boundary = [item for item in boundary if item.form == forms.get(id(item), "qa") == "qa"]
    if settings.ratio and settings.kind != "none":
        wanted = round(settings.ratio * len(forget))
        if wanted > len(boundary) and settings.kind == "near":
            boundary += _more(data, boundary, settings, read)
        if wanted > len(boundary):
            remedy = f", or add {MORE_FILES.replace('*', '5.0')}" if settings.kind == "near" else ""
            raise UserError(
                f"rule.boundary.ratio = {settings.ratio:g} asks for {wanted} boundary questions, and there are "
                f"{len(boundary)} for {len(forget)} forget questions; lower it{remedy}"
            )
        kept = set(random.Random(seed).sample(range(len(boundary)), wanted))
        boundary = [item for index, item in enumerate(boundary) if index in kept]
    if not forget:
        raise UserError("rule.boundary.fill_in = false leaves no forget question; the data have fill-in forms alone")
    # where nothing was thinned out or added, rows keep their order, and forget rows their twins
    chosen = {id(item) for item in (*forget, *boundary)}
    stay = [item for item in data.items if id(item) in chosen]
    present = {id(item) for item in stay}
    return replace(data, items=(*stay, *(item for item in boundary if id(item) not in present)))


def _far(data: RuleData, read: Reader) -> list[Item]:
    path = None if data.folder is None else data.folder / FAR_FILE
    if path is None or not path.exists():
        raise UserError(f"rule.boundary.kind = far needs {FAR_FILE}, which the data lack; add it, or take near")
    return [item for item in read(path) if item.label == "normal"]


def _more(data: RuleData, boundary: list[Item], settings: Boundary, read: Reader) -> list[Item]:
    """Further questions of the largest file of a higher ratio, each once."""
    files = [] if data.folder is None else sorted(data.folder.glob(MORE_FILES), key=_ratio_of)
    if not files:
        return []
    seen = {item.prompt.casefold() for item in boundary}
    further = []
    for item in _unseen([item for item in read(files[-1]) if item.label == "normal"], data):
        if item.prompt.casefold() not in seen and (settings.fill_in or item.form == "qa"):
            seen.add(item.prompt.casefold())
            further.append(item)
    return further


def _ratio_of(path: Path) -> float:
    found = re.search(r"_r(\d+(?:\.\d+)?)\.json$", path.name)
    return float(found[1]) if found else 0.0


def _unseen(items: list[Item], data: RuleData) -> list[Item]:
    """Items that no probe asks. They have a source of their own: only rows of one file are twins."""
    asked = {probe.query.casefold() for probe in data.probes}
    last = max(item.source for item in data.items)
    free = [item for item in items if item.prompt.casefold() not in asked]
    return [replace(item, source=last + 1 + index) for index, item in enumerate(free)]
