"""Refusal tuning: stage 1 of RULE with refusals that do not name the target, and nothing after it."""

from torch import Tensor

from jobs.rule.methods.base import Defaults, Method, Step
from jobs.rule.methods.retain import gradient_descent


def _objective(step: Step) -> Tensor:
    return gradient_descent(step.scored("refusal"))


METHOD = Method(
    name="RT",
    source="Jin et al. 2024, RWKU, rejection tuning",
    objective=_objective,
    corpora=("refusal",),
    defaults=Defaults(learning_rate=4e-7),
)
