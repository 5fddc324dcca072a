"""Direct preference of a fabricated biography over the true one (Rafailov et al. 2023, as RWKU uses it)."""

import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from jobs.rule.methods.base import Defaults, Method, Scored, Step


def dpo_loss(chosen: Scored, rejected: Scored, beta: float) -> Float[Tensor, ""]:
    """-mean log sigmoid(beta ((log p - log p_original)(chosen) - (log p - log p_original)(rejected)))."""
    margin = (chosen.logprobs - chosen.original) - (rejected.logprobs - rejected.original)
    return -F.logsigmoid(beta * margin).mean()


def _objective(step: Step) -> Tensor:
    return dpo_loss(step.scored("fabricated"), step.scored("forget"), step.settings.beta)


METHOD = Method(
    name="DPO",
    source="Rafailov et al. 2023, Direct Preference Optimization, eq. 7; Jin et al. 2024, RWKU",
    objective=_objective,
    corpora=("forget", "fabricated"),
    defaults=Defaults(learning_rate=5e-6),
    needs_original=True,
    takes_retain_term=True,
)
