"""ReBO's mathematics against cases worked out by hand, closed forms and autograd."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from jobs.rule.loss import (
    group_advantages,
    k3_divergence,
    leave_one_out_advantages,
    policy_loss,
    token_moments,
    whitened_advantages,
)

LOW, HIGH, DUAL = 0.2, 0.3, 3.0


def loss_at(ratio: float, advantage: float) -> tuple[float, float]:
    """Loss of one token and its gradient in the log-probability."""
    logprobs = torch.tensor([ratio], dtype=torch.float64).log().requires_grad_()
    loss = policy_loss(logprobs, torch.zeros(1), torch.tensor([advantage]), LOW, HIGH, DUAL)
    (gradient,) = torch.autograd.grad(loss.sum(), logprobs)
    return loss.item(), gradient.item()


def test_advantages_by_hand():
    rewards = torch.tensor([[1.0, 0.0, 0.0, 1.0], [0.0, 0.0, 0.0, 2.0]])
    # standard deviations with n - 1: sqrt(4 * 0.25 / 3) and sqrt((3 * 0.25 + 2.25) / 3)
    spread = 3**-0.5
    expected = torch.tensor(
        [
            [0.5 / (spread + 1e-6), -0.5 / (spread + 1e-6), -0.5 / (spread + 1e-6), 0.5 / (spread + 1e-6)],
            [-0.5 / (1 + 1e-6), -0.5 / (1 + 1e-6), -0.5 / (1 + 1e-6), 1.5 / (1 + 1e-6)],
        ]
    )
    torch.testing.assert_close(group_advantages(rewards), expected, rtol=1e-6, atol=0)


@pytest.mark.parametrize("completions", range(2, 17))
@pytest.mark.parametrize("reward", [0.0, 0.3, 0.5, 0.7, 1.0])
def test_one_reward_for_all_gives_no_advantage(reward, completions):
    assert torch.equal(group_advantages(torch.full((2, completions), reward)), torch.zeros(2, completions))


def test_groups_do_not_mix():
    rewards = torch.tensor([[0.0, 1.0, 0.5], [0.25, 0.0, 0.0]])
    alone = torch.cat([group_advantages(row[None]) for row in rewards])
    torch.testing.assert_close(group_advantages(rewards), alone)


def test_leave_one_out_by_hand():
    rewards = torch.tensor([[1.0, 0.0, 0.0, 0.5], [0.7, 0.7, 0.7, 0.7]])
    expected = torch.tensor([[1 - 0.5 / 3, -0.5, -0.5, 0.5 - 1 / 3], [0.0, 0.0, 0.0, 0.0]])
    torch.testing.assert_close(leave_one_out_advantages(rewards), expected)
    assert torch.equal(leave_one_out_advantages(rewards)[1], expected[1])


def test_whitening_is_that_of_the_tokens_laid_out():
    rewards = torch.tensor([[1.0, 0.0], [0.5, 0.5]])
    lengths = torch.tensor([[3, 1], [2, 4]])
    tokens = torch.tensor([1.0] * 3 + [0.0] + [0.5] * 2 + [0.5] * 4)
    expected = (rewards - tokens.mean()) / (tokens.var() + 1e-8).sqrt()
    torch.testing.assert_close(whitened_advantages(rewards, token_moments(rewards, lengths)), expected)
    parts = [token_moments(rewards[:1], lengths[:1]), token_moments(rewards[1:], lengths[1:])]
    torch.testing.assert_close(whitened_advantages(rewards, sum(parts)), expected)


@pytest.mark.parametrize("reward", [0.0, 0.3, 0.7])
def test_whitening_of_one_reward_for_all_stays_small(reward):
    rewards = torch.full((3, 4), reward)
    advantages = whitened_advantages(rewards, token_moments(rewards, torch.full((3, 4), 5)))
    assert advantages.abs().max() < 1e-3


@settings(deadline=None)
@given(st.lists(st.tuples(st.floats(-20, 0), st.floats(-20, 0)), min_size=1, max_size=20))
def test_k3_is_never_negative_and_zero_where_both_agree(pairs):
    policy, reference = torch.tensor(pairs, dtype=torch.float64).T
    assert (k3_divergence(policy, reference) >= -1e-12).all()
    assert torch.equal(k3_divergence(policy, policy), torch.zeros_like(policy))


def test_k3_averages_to_the_divergence():
    generator = torch.Generator().manual_seed(0)
    policy, reference = torch.randn(2, 12, generator=generator, dtype=torch.float64).log_softmax(-1)
    exact = (policy.exp() * (policy - reference)).sum()
    estimates = k3_divergence(policy, reference)
    torch.testing.assert_close((policy.exp() * estimates).sum(), exact)
    drawn = policy.exp().multinomial(200_000, replacement=True, generator=generator)
    error = estimates[drawn].std() / 200_000**0.5
    assert (estimates[drawn].mean() - exact).abs() < 5 * error


@pytest.mark.parametrize(
    ("ratio", "advantage", "loss", "gradient"),
    [
        # a good token: the gain stops at 1 + high, a fall below 1 - low is still punished
        (1.0, 2.0, -2.0, -2.0),
        (1.25, 2.0, -2.5, -2.5),
        (1.5, 2.0, -2.6, 0.0),
        (0.5, 2.0, -1.0, -1.0),
        # a bad token: the gain stops at 1 - low, a rise is punished up to the dual clip
        (1.0, -2.0, 2.0, 2.0),
        (0.9, -2.0, 1.8, 1.8),
        (0.5, -2.0, 1.6, 0.0),
        (2.5, -2.0, 5.0, 5.0),
        (4.0, -2.0, 6.0, 0.0),
        (4.0, 0.0, 0.0, 0.0),
    ],
)
def test_each_clip_region_by_hand(ratio, advantage, loss, gradient):
    assert loss_at(ratio, advantage) == pytest.approx((loss, gradient), abs=1e-6)


@settings(deadline=None)
@given(st.floats(0.05, 6), st.floats(-3, 3))
def test_the_loss_bounds_the_plain_surrogate_from_above_unless_dual_clipped(ratio, advantage):
    loss, _ = loss_at(ratio, advantage)
    surrogate = -advantage * ratio
    if advantage < 0:
        assert loss <= -advantage * DUAL + 1e-6
        assert loss >= min(surrogate, -advantage * DUAL) - 1e-6
    else:
        assert loss >= surrogate - 1e-6


def test_on_policy_the_gradient_is_minus_advantage_times_that_of_the_logprob():
    generator = torch.Generator().manual_seed(1)
    logits = torch.randn(5, 7, generator=generator, dtype=torch.float64, requires_grad=True)
    tokens = torch.tensor([0, 3, 6, 2, 2])
    advantages = torch.tensor([1.5, -0.5, 0.0, 2.0, -1.0], dtype=torch.float64)
    logprobs = logits.log_softmax(-1)[torch.arange(5), tokens]
    loss = policy_loss(logprobs, logprobs.detach(), advantages, LOW, HIGH, DUAL).sum()
    (gradient,) = torch.autograd.grad(loss, logits, retain_graph=True)
    (expected,) = torch.autograd.grad((-advantages * logprobs).sum(), logits)
    torch.testing.assert_close(gradient, expected)
