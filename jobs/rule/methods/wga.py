"""Gradient ascent whose tokens count less the less likely they are already (Wang et al. 2025)."""

from jaxtyping import Float
from torch import Tensor

from jobs.rule.methods.base import Defaults, Method, Scored, Step


def wga_loss(texts: Scored, beta: float) -> Float[Tensor, ""]:
    """Mean over all tokens of p^beta log p, where p^beta is a weight without a gradient.

    An ascent runs away on tokens that are forgotten already: the gradient of log p grows as p falls, that of this does
    not.
    """
    weights = (beta * texts.token_logprobs.detach()).exp()
    return texts.share * (weights * texts.token_logprobs).sum() / texts.tokens.sum()


def _objective(step: Step) -> Tensor:
    return wga_loss(step.scored("forget"), step.settings.beta)


METHOD = Method(
    name="WGA",
    source="Wang et al. 2025, Rethinking LLM Unlearning Objectives; beta as in open-unlearning",
    objective=_objective,
    corpora=("forget",),
    defaults=Defaults(learning_rate=1e-5, beta=1.0),
    takes_retain_term=True,
)
