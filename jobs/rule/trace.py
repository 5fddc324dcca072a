"""The path of a training: what the model still knows of the target and of the rest, asked every few steps.

Comparisons draw the path (RULE, trade-off figure), and searches end a trial early by it.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from cluster.errors import UserError
from jobs.rule.config import Evaluation, Rule
from jobs.rule.data import FORGET_KINDS, RETAINED_KINDS, Probe
from jobs.rule.probes import Answer, facts, probe_ids, recalled

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

AXES = ("forgotten", "retained")
NATURALNESS = "naturalness"


@dataclass(frozen=True)
class Trace:
    """Which probes a training asks, and how often: after each `every` steps and after the last.

    With `original`, the directory of the model before unlearning, naturalness is scored as well, of answers about
    `target`. `attacks` scores as attacks do (`jobs.rule.probes.leaked`), not by RULE's own recall.
    """

    every: int
    probes: tuple[Probe, ...]
    settings: Evaluation
    stop: tuple[str, ...] = ()
    original: Path | None = None
    target: str = ""
    attacks: bool = False

    def longest(self, tokenizer: "PreTrainedTokenizerBase") -> int:
        """Tokens of the longest probe with its answer."""
        return self.settings.max_new_tokens + max(
            len(probe_ids(tokenizer, probe, self.settings.prompt_form)) for probe in self.probes
        )


def trace_of(rule: Rule, answers: Sequence[Answer], original: Path, target: str) -> Trace | None:
    """What `rule.trace` asks for, given the answers of the model in `original`; None where it never looks.

    Raises:
        UserError: the original answers no forget probe, or no retained one.
    """
    if rule.trace.every is None:
        return None
    probes = known_probes(answers, rule.evaluation.known_threshold, rule.trace.probes)
    path = original if rule.trace.naturalness else None
    return Trace(rule.trace.every, probes, rule.evaluation, rule.stop, path, target)


def require_probes(probes: Sequence[Probe]) -> None:
    """Raises UserError where no probe asks for the target, or none for the rest, whatever the original knows."""
    for name, kinds in zip(AXES, (FORGET_KINDS, RETAINED_KINDS), strict=True):
        if not any(probe.kind in kinds for probe in probes):
            raise UserError(
                f"the data have no probe that could be {name} ({', '.join(kinds)}), so that nothing can be compared, "
                "attacked, searched or traced; add such files (docs/rule.md, section 1)"
            )


def known_probes(original: Sequence[Answer], threshold: float, limit: int | None) -> tuple[Probe, ...]:
    """Probes that the original answers, evenly thinned out to `limit` a side: forget ones, then retained ones.

    Raises:
        UserError: a side has none.
    """
    is_known = recalled(original, threshold)
    chosen: list[Probe] = []
    for name, kinds in zip(AXES, (FORGET_KINDS, RETAINED_KINDS), strict=True):
        side = [a.probe for a, knows in zip(original, is_known, strict=True) if knows and a.probe.kind in kinds]
        if not side:
            raise UserError(f"the original model answers no probe that could be {name}; take other data or model")
        count = len(side) if limit is None else min(limit, len(side))
        chosen += [side[index * len(side) // count] for index in range(count)]
    return tuple(chosen)


def scores(
    probes: Sequence[Probe], recalls: Sequence[float], natural: Sequence[float] | None = None
) -> dict[str, list[float]]:
    """1 - recall of each forget probe, recall of each other one, in their order; 0 to 1, more is better.

    `natural`, from 0 to 1 for each probe, adds that of forget probes.
    """
    forget = [index for index, probe in enumerate(probes) if probe.kind in FORGET_KINDS]
    retained = [recall for probe, recall in zip(probes, recalls, strict=True) if probe.kind in RETAINED_KINDS]
    found = dict(zip(AXES, ([1 - recalls[index] for index in forget], retained), strict=True))
    return found if natural is None else found | {NATURALNESS: [natural[index] for index in forget]}


def asked_for(probes: Sequence[Probe]) -> dict[str, list[str]]:
    """The fact behind each number of `scores`."""
    forget, retained = (
        facts([probe for probe in probes if probe.kind in kinds]) for kinds in (FORGET_KINDS, RETAINED_KINDS)
    )
    return {**dict(zip(AXES, (forget, retained), strict=True)), NATURALNESS: forget}


def look_file(folder: Path, step: int) -> Path:
    """Where a run keeps the scores of the look after `step`."""
    return folder / "looks" / f"{step:06d}.json"
