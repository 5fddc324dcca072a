"""Negative preference optimisation: ascent that fades where the model has left the original (Zhang et al. 2024)."""

import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from jobs.rule.methods.base import Defaults, Method, Scored, Step


def npo_loss(texts: Scored, beta: float) -> Float[Tensor, ""]:
    """-(2 / beta) mean log sigmoid(-beta (log p - log p_original)), log-probabilities summed over a text."""
    return -2 / beta * F.logsigmoid(-beta * (texts.logprobs - texts.original)).mean()


def _objective(step: Step) -> Tensor:
    return npo_loss(step.scored("forget"), step.settings.beta)


METHOD = Method(
    name="NPO",
    source="Zhang et al. 2024, Negative Preference Optimization, eq. 3; RS/src/llmtuner/train/npo of RULE's repository",
    objective=_objective,
    corpora=("forget",),
    defaults=Defaults(learning_rate=2e-6, batch_size=16, beta=0.2),
    needs_original=True,
    takes_retain_term=True,
)
