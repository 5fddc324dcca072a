"""The mathematics of ReBO (RULE, stage 2): group advantages, k3 divergence, clipped policy loss. Tensors only."""

import torch
from jaxtyping import Float
from torch import Tensor

ADVANTAGE_EPSILON = 1e-6


def group_advantages(rewards: Float[Tensor, "groups completions"]) -> Float[Tensor, "groups completions"]:
    """(r - mean) / (std + 1e-6) within each group, standard deviation with n - 1 (GRPO as RULE runs it).

    A group with one reward for all has advantage 0 and teaches nothing.
    """
    # Counted from the first reward: the mean of equal rewards such as 0.7 is rounded, and 1e-6 would not hide that.
    shifted = rewards - rewards[:, :1]
    centred = shifted - shifted.mean(dim=1, keepdim=True)
    return centred / (shifted.std(dim=1, keepdim=True) + ADVANTAGE_EPSILON)


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
