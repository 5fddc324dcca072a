"""The mathematics of ReBO (RULE, stage 2): advantages, k3 divergence, clipped policy loss. Tensors only."""

import torch
from jaxtyping import Float, Int
from torch import Tensor

ADVANTAGE_EPSILON = 1e-6
WHITENING_EPSILON = 1e-8


def group_advantages(rewards: Float[Tensor, "groups completions"]) -> Float[Tensor, "groups completions"]:
    """(r - mean) / (std + 1e-6) within each group, standard deviation with n - 1 (GRPO as RULE runs it).

    A group with one reward for all has advantage 0 and teaches nothing.
    """
    return _centred(rewards) / (rewards.std(dim=1, keepdim=True) + ADVANTAGE_EPSILON)


def leave_one_out_advantages(rewards: Float[Tensor, "groups completions"]) -> Float[Tensor, "groups completions"]:
    """r - mean of the other rewards of its group (RLOO, Ahmadian et al. 2024)."""
    completions = rewards.shape[1]
    return _centred(rewards) * completions / (completions - 1)


def _centred(rewards: Tensor) -> Tensor:
    # Counted from the first reward: the mean of equal rewards such as 0.7 is rounded, and 1e-6 would not hide that.
    shifted = rewards - rewards[:, :1]
    return shifted - shifted.mean(dim=1, keepdim=True)


def token_moments(
    rewards: Float[Tensor, "groups completions"], lengths: Int[Tensor, "groups completions"]
) -> Float[Tensor, "3"]:
    """Number, sum and sum of squares of the tokens' returns; the sums of several ranks add up."""
    weights = lengths.to(torch.float64)
    values = rewards.to(torch.float64)
    return torch.stack([weights.sum(), (weights * values).sum(), (weights * values.square()).sum()])


def whitened_advantages(
    rewards: Float[Tensor, "groups completions"], moments: Float[Tensor, "3"]
) -> Float[Tensor, "groups completions"]:
    """(r - mean) / sqrt(variance + 1e-8) over all tokens of the batch (REINFORCE++ as RULE runs it, Hu 2025).

    Without discount the return of every token is the reward of its completion, so that a completion counts as often as
    it has tokens. The variance has n - 1. `moments` are `token_moments` over all ranks.
    """
    number, total, squares = moments.unbind()
    mean = total / number
    variance = (squares - number * mean.square()).clamp(min=0) / (number - 1).clamp(min=1)
    return ((rewards.to(moments.dtype) - mean) / (variance + WHITENING_EPSILON).sqrt()).to(rewards.dtype)


def k3_divergence(logprobs: Float[Tensor, " tokens"], reference: Float[Tensor, " tokens"]) -> Float[Tensor, " tokens"]:
    """exp(d) - d - 1 with d = reference - policy: unbiased, low variance, never negative (Schulman's k3)."""
    difference = reference - logprobs
    return difference.exp() - difference - 1


def policy_loss(
    logprobs: Float[Tensor, " tokens"],
    old_logprobs: Float[Tensor, " tokens"],
    advantages: Float[Tensor, " tokens"],
    clip_low: float,
    clip_high: float,
    dual_clip: float,
) -> Float[Tensor, " tokens"]:
    """Clipped policy-gradient loss of each token, to be minimised (PPO; asymmetric as DAPO; dual clip, Ye et al. 2020).

    With one update a rollout batch the ratio is 1 and only its gradient matters, as in RULE's runs. The dual clip
    bounds the loss of a token with negative advantage by -dual_clip * advantage.
    """
    ratio = (logprobs - old_logprobs).exp()
    clipped = ratio.clamp(1 - clip_low, 1 + clip_high)
    loss = torch.maximum(-advantages * ratio, -advantages * clipped)
    bounded = torch.minimum(loss, -advantages * dual_clip)
    return torch.where(advantages < 0, bounded, loss)
