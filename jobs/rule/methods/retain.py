"""Terms that hold what is to be kept, added to a loss on what is to be forgotten (RULE's table of baselines)."""

from jaxtyping import Float
from torch import Tensor

from jobs.rule.methods.base import RetainTerm, Scored, Step


def retain_loss(step: Step, term: RetainTerm) -> Float[Tensor, ""]:
    """GDR: cross-entropy on the retain texts. KLR: divergence from the original model on them."""
    return gradient_descent(step.scored("retain")) if term == "GDR" else step.divergence("retain").mean()


def gradient_descent(texts: Scored) -> Float[Tensor, ""]:
    """Cross-entropy, mean over all tokens."""
    return -texts.share * texts.logprobs.sum() / texts.tokens.sum()


def kl_divergence(
    logits: Float[Tensor, "tokens vocabulary"], original: Float[Tensor, "tokens vocabulary"]
) -> Float[Tensor, " tokens"]:
    """KL(original || model) = sum_v q(v) (log q(v) - log p(v)) at each token, as the authors' trainers compute it."""
    logp, logq = logits.float().log_softmax(-1), original.float().log_softmax(-1)
    return (logq.exp() * (logq - logp)).sum(-1)
