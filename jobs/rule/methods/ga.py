"""Gradient ascent: the forget corpus is made unlikely (Jang et al. 2023)."""

from jaxtyping import Float
from torch import Tensor

from jobs.rule.methods.base import Defaults, Method, Scored, Step


def ga_loss(texts: Scored) -> Float[Tensor, ""]:
    """The negated cross-entropy, mean over all tokens; it has no lower bound."""
    return texts.share * texts.logprobs.sum() / texts.tokens.sum()


def _objective(step: Step) -> Tensor:
    return ga_loss(step.scored("forget"))


METHOD = Method(
    name="GA",
    source="Jang et al. 2023, Knowledge Unlearning for Mitigating Privacy Risks in Language Models, eq. 1; "
    "RS/src/llmtuner/train/ga of RULE's repository",
    objective=_objective,
    corpora=("forget",),
    defaults=Defaults(learning_rate=6e-8),
    takes_retain_term=True,
)
