"""NPO without a reference: log-probabilities a token against a margin (Fan et al. 2024)."""

import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from jobs.rule.methods.base import Defaults, Method, Scored, Step


def simnpo_loss(texts: Scored, beta: float, gamma: float) -> Float[Tensor, ""]:
    """-(2 / beta) mean log sigmoid(beta (-log p / length - gamma)), as RULE's repository has it.

    The margin stands within beta; where it stands outside, as -beta log p / length - margin, that margin is beta gamma.
    """
    return -2 / beta * F.logsigmoid(beta * (-texts.logprobs / texts.tokens - gamma)).mean()


def _objective(step: Step) -> Tensor:
    return simnpo_loss(step.scored("forget"), step.settings.beta, step.settings.gamma)


METHOD = Method(
    name="SimNPO",
    source="Fan et al. 2024, Simplicity Prevails; RS/src/llmtuner/train/simpo of RULE's repository",
    objective=_objective,
    corpora=("forget",),
    defaults=Defaults(learning_rate=2e-6, batch_size=16),
    takes_retain_term=True,
)
