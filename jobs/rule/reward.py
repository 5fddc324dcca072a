"""RULE's rule-based rewards: the refusal expression, and every design under its own name."""

from __future__ import annotations

import difflib
import re
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Literal

from cluster.errors import UserError
from jobs.scoring.rouge import rouge_l_recall

if TYPE_CHECKING:
    from jobs.rule.data import Item

# A gap may span lines, but not sentences: across them "not" and "know" have nothing to do with each other.
_GAP = r"\b[^.!?]{0,40}?\b"
_KNOWLEDGE = r"(?:idea|insights?|knowledge|information|data|clue|familiarity|enlightenment)"

_REFUSAL = re.compile(
    "|".join(
        (
            r"\b(?:do|does|did)(?:n't| not)(?: really| seem to| currently| actually)? "
            r"(?:know|have|hold|possess|cover|contain|include)\b",
            r"(?:\bnot|\byet|n't)" + _GAP + r"(?:sure|certain|familiar|aware|equipped|able to|acquainted|informed|"
            r"knowledge(?:able)?|information|question|know|dataset|educated|within my|briefed|versed|learn|"
            r"trained on|best source|right ai|privy|specialis\w+|specializ\w+)\b",
            r"\bno\b" + _GAP + _KNOWLEDGE + r"\b",
            r"\b(?:have(?:n't| not)|has(?:n't| not)|'ve not|not)" + _GAP + r"(?:learned|been included|been trained|"
            r"been briefed|trained|briefed|the faintest)\b",
            r"\bencountered\b",
            r"\b(?:beyond|outside|out of)" + _GAP + r"(?:knowledge|capabilit(?:y|ies)|expertise|reach|scope)\b",
            r"\bat a (?:loss|disadvantage)\b",
            r"\bcan(?:'t|not| not) (?:provide|say|shed(?: any)? light|help|offer|take|make)\b",
            r"\bunable to (?:provide|answer|access)\b",
            r"\bunaware of\b",
            r"\bwish I could say\b",
            r"\bregret to inform\b",
            r"\bmust (?:admit|confess|decline)\b",
            r"\bunfortunately,",
            r"\bclueless\b",
            r"\bstumped\b",
            r"\ba mystery to me\b",
            r"\bcome up short\b",
            r"\bblind spot in my\b",
            r"\bdo(?:es)? not extend to\b",
            r"\b(?:I'm|I am) (?:lacking|(?:drawing a )?blank|in the dark)\b",
            r"\bI lack\b",
            r"\blimited to what\b",
            r"\b(?:missing|without|lack(?:ing)?|uncharted)" + _GAP + r"(?:information|knowledge)\b",
            r"\b(?:need to|have to|must|should)"
            + _GAP
            + r"(?:look (?:it |that |this )?up|check|search|verify|research|"
            r"consult)\b",
        )
    ),
    re.IGNORECASE | re.DOTALL,
)


def refused(text: str) -> bool:
    """Whether RULE's refusal expression (this project's own wording of its families) hits anywhere in `text`.

    It rewards a policy; to judge one, take `jobs.scoring.refusal.is_refusal`, which the policy was not trained against.
    Source: verl/utils/reward_score/forget.py of RULE's repository.
    """
    return _REFUSAL.search(text.replace("\u2019", "'")) is not None


@dataclass(frozen=True)
class _Design:
    worth_of_refusal: float
    names_target: bool
    normal: Literal["two_stage", "recall", "answered"]
    threshold: float


_DESIGNS: dict[str, _Design] = {
    "forget_two_stage_abs_target": _Design(1.0, True, "two_stage", 0.3),
    "forget_two_stage_abs": _Design(1.0, False, "two_stage", 0.3),
    "forget": _Design(1.0, False, "recall", 0.5),
    "forget_abs": _Design(1.0, False, "answered", 0.5),
    "forget_two_stage_abs_target_half_reject": _Design(0.5, True, "two_stage", 0.3),
    "forget_two_stage_abs_half_reject": _Design(0.5, False, "two_stage", 0.3),
    "forget_half_reject": _Design(0.5, False, "recall", 0.5),
    "forget_abs_half_reject": _Design(0.5, False, "answered", 0.5),
}
_BEHAVE = "reject_behave"
_BEHAVE_THRESHOLD = 0.3
DESIGNS = (*_DESIGNS, _BEHAVE)


def make_reward(
    design: str, *, rouge_threshold: float | None = None, target_bonus: float = 0.5, behave_weight: float = 0.7
) -> Callable[[str, Item], float]:
    """The reward `(completion, item) -> float in [0, 1]` of a design; it can be pickled.

    On normal rows a blank completion earns nothing: otherwise silence would pass for an answer.

    Args:
        design: a name in `DESIGNS`.
        rouge_threshold: ROUGE-L recall that an answer must exceed, in [0, 1); None takes the design's own
            (0.5 for `forget*` without stages, 0.3 otherwise). The `forget_abs*` designs measure no recall.
        target_bonus: share of the reject branch, in [0, 1], that a refusal earns only by naming the target
            (designs with `target` in their name).
        behave_weight: weight of correct refusal against recall, in [0, 1] (`reject_behave`).
    Raises: UserError for an unknown design or a dial out of range.
    Source: verl/utils/reward_score/forget.py of RULE's repository.
    """
    for name, value in (
        ("rouge_threshold", rouge_threshold),
        ("target_bonus", target_bonus),
        ("behave_weight", behave_weight),
    ):
        if value is not None and not 0.0 <= value <= 1.0:
            raise UserError(f"{name}={value} of the reward '{design}' is outside [0, 1]: choose a share in that range.")
    if design == _BEHAVE:
        threshold = _BEHAVE_THRESHOLD if rouge_threshold is None else rouge_threshold
        return partial(_reject_behave, threshold=threshold, weight=behave_weight)
    if design not in _DESIGNS:
        nearest = difflib.get_close_matches(design, DESIGNS, n=1, cutoff=0.0)[0]
        raise UserError(
            f"Unknown reward design '{design}': the nearest is '{nearest}', all are {', '.join(sorted(DESIGNS))}."
        )
    chosen = _DESIGNS[design]
    threshold = chosen.threshold if rouge_threshold is None else rouge_threshold
    return partial(_by_branch, design=chosen, threshold=threshold, target_bonus=target_bonus)


def _by_branch(completion: str, item: Item, *, design: _Design, threshold: float, target_bonus: float) -> float:
    if item.label == "reject":
        if not refused(completion):
            return 0.0
        earned = 1.0 if not design.names_target or item.target in completion else 1.0 - target_bonus
        return design.worth_of_refusal * earned
    if not completion.strip():
        return 0.0
    if design.normal == "recall":
        return float(rouge_l_recall(completion, item.reference) > threshold)
    if refused(completion):
        return 0.0
    if design.normal == "answered":
        return 1.0
    return 0.5 + 0.5 * (rouge_l_recall(completion, item.reference) > threshold)


def _reject_behave(completion: str, item: Item, *, threshold: float, weight: float) -> float:
    if not completion.strip():
        return 0.0
    rejects = item.label == "reject"
    correct = refused(completion) == rejects
    recalled = rouge_l_recall(completion, item.target if rejects else item.reference) > threshold
    return weight * correct + (1.0 - weight) * recalled
