"""Shared prefixes: the packed form gives the plain form's loss and gradient, and no completion is lost or doubled."""

from __future__ import annotations

import copy
import random
from collections import Counter

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import GemmaConfig, LlamaConfig, MistralConfig, Qwen3Config

from jobs.rule.loss import k3_divergence, policy_loss
from jobs.rule.packing import Group, _TokenLogprobs, can_share, pack, plain_rows, plan_rows, row_logprobs

VOCABULARY = 200


@pytest.fixture(scope="module")
def model(tiny_model):
    """In float64, so that what is compared is the arrangement and not its rounding."""
    return copy.deepcopy(tiny_model).double()


def tokens(generator: random.Random, length: int) -> list[int]:
    return [generator.randrange(3, VOCABULARY) for _ in range(length)]


def random_groups(seed: int) -> list[Group]:
    """Prompts with a common beginning, two of them identical, completions of 1 to 9 tokens."""
    generator = random.Random(seed)
    beginning = tokens(generator, generator.randrange(6))
    prompts = [beginning + tokens(generator, generator.randrange(1, 9)) for _ in range(generator.randrange(1, 5))]
    prompts.append(list(prompts[0]))
    groups, first = [], 0
    for prompt in prompts:
        completions = [tokens(generator, generator.randrange(1, 10)) for _ in range(generator.randrange(1, 5))]
        completions.append(tokens(generator, 1))
        groups.append(Group(prompt, completions, first))
        first += len(completions)
    return groups


def refusals(seed: int) -> list[Group]:
    """Completions that begin alike, as refusals do, and end at different places."""
    generator = random.Random(seed)
    words = tokens(generator, 8)
    groups, first = [], 0
    for prompt in (tokens(generator, 4), tokens(generator, 3)):
        completions = [words[: generator.randrange(1, 9)] + tokens(generator, 2) for _ in range(5)]
        groups.append(Group(prompt, completions, first))
        first += len(completions)
    return groups


CASES = {
    "one completion begins another": [Group([5, 6], [[8, 9], [8, 9, 10, 11], [8]], 0)],
    **{f"refusals {seed}": refusals(seed) for seed in range(3)},
    "identical prompts": [Group([5, 6, 7], [[8, 9], [10]], 0), Group([5, 6, 7], [[8, 9], [11, 12, 13]], 2)],
    "identical completions": [Group([5, 6], [[8, 9], [8, 9], [8, 9]], 0)],
    "one token each": [Group([5], [[8], [9]], 0), Group([6], [[8]], 2)],
    "one prompt begins another": [Group([5, 6, 7, 8], [[9, 10]], 0), Group([5, 6], [[7, 8], [11]], 1)],
    "nothing in common": [Group([5, 6], [[7]], 0), Group([15, 6], [[7]], 1)],
    **{f"random {seed}": random_groups(seed) for seed in range(8)},
}


def loss_of(model, rows: list[list[Group]], number: int) -> tuple[torch.Tensor, torch.Tensor]:
    """ReBO's loss over all rows, and its gradient in all parameters; policy off its old and reference values."""
    advantages = torch.linspace(-2, 2, number, dtype=torch.float64)
    model.zero_grad()
    total = torch.zeros((), dtype=torch.float64)
    for groups in rows:
        row = pack(groups)
        logprobs = row_logprobs(model, row, 0.7)
        old = logprobs.detach() + 0.1 * torch.sin(row.targets)
        reference = logprobs.detach() + 0.2 * torch.cos(row.targets)
        loss = policy_loss(logprobs, old, advantages[row.sequence], 0.2, 0.3, 3.0)
        loss = (loss + 0.05 * k3_divergence(logprobs, reference)).sum()
        loss.backward()
        total += loss.detach()
    return total, torch.cat([parameter.grad.flatten() for parameter in model.parameters()])


@pytest.mark.parametrize("tokens_per_row", [1, 30, 10_000])
@pytest.mark.parametrize("name", CASES)
def test_loss_and_gradient_are_those_of_the_plain_form(model, name, tokens_per_row):
    groups = CASES[name]
    number = sum(len(group.completions) for group in groups)
    loss, gradient = loss_of(model, plan_rows(groups, tokens_per_row), number)
    plain_loss, plain_gradient = loss_of(model, plain_rows(groups), number)
    torch.testing.assert_close(loss, plain_loss, rtol=1e-5, atol=0)
    assert (gradient - plain_gradient).norm() <= 1e-5 * plain_gradient.norm()
    assert plain_gradient.norm() > 0


@pytest.mark.parametrize("name", CASES)
def test_logprobs_equal_an_unpacked_forward_pass(model, name):
    groups = CASES[name]
    row = pack(groups)
    with torch.no_grad():
        packed = row_logprobs(model, row, 1.3)
        for group in groups:
            for offset, completion in enumerate(group.completions):
                logits = model(torch.tensor([group.prompt + completion])).logits[0, len(group.prompt) - 1 : -1]
                wanted = (logits / 1.3).log_softmax(-1)[range(len(completion)), completion]
                mine = row.sequence == group.first + offset
                torch.testing.assert_close(packed[mine].double(), wanted, rtol=1e-5, atol=1e-5)
                assert row.targets[mine].tolist() == completion


def test_a_sliding_window_is_kept_in_the_plain_form():
    from transformers import MistralConfig, MistralForCausalLM

    torch.manual_seed(0)
    config = MistralConfig(
        vocab_size=64,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        sliding_window=4,
    )
    model = MistralForCausalLM(config).eval()
    assert not can_share(config)
    prompt, completion = list(range(3, 13)), [20, 21, 22]
    [groups] = plain_rows([Group(prompt, [completion], 0)])
    with torch.no_grad():
        mine = row_logprobs(model, pack(groups), 1.0)
        logits = model(torch.tensor([prompt + completion])).logits[0, len(prompt) - 1 : -1]
    torch.testing.assert_close(mine, logits.log_softmax(-1)[range(3), completion])


@pytest.mark.parametrize("precision", [torch.float32, torch.bfloat16])
def test_the_gradient_of_token_logprobs_is_autograds(precision):
    torch.manual_seed(0)
    logits = torch.randn(40, 100).to(precision).requires_grad_()
    scored, targets, weights = torch.randint(0, 40, (60,)), torch.randint(0, 100, (60,)), torch.randn(60)
    mine = _TokenLogprobs.apply(logits, scored, targets, 0.7)
    (flow,) = torch.autograd.grad((mine * weights).sum(), logits)
    plain = (logits.float() / 0.7).log_softmax(-1)[scored, targets]
    (plain_flow,) = torch.autograd.grad((plain * weights).sum(), logits)
    torch.testing.assert_close(mine, plain, rtol=1e-5, atol=1e-5)
    assert flow.dtype == precision
    tolerance = 1e-5 if precision == torch.float32 else 2e-2
    torch.testing.assert_close(flow, plain_flow, rtol=tolerance, atol=tolerance)


def test_a_sure_token_keeps_its_gradient_in_bfloat16():
    logits = torch.zeros(20, 50)
    logits[:, 3] = 10.0  # p = .998
    logits = logits.bfloat16().requires_grad_()
    (flow,) = torch.autograd.grad(
        _TokenLogprobs.apply(logits, torch.arange(20), torch.full((20,), 3), 1.0).sum() * 1.3e-4, logits
    )
    expected = 1.3e-4 * (1 - logits[0].float().softmax(-1)[3])
    assert flow[:, 3].float() == pytest.approx(expected.item(), rel=2**-8)


def test_what_is_shared_is_laid_out_once():
    groups = [Group([1, 2, 3, 4], [[7, 8], [9]], 0), Group([1, 2, 5], [[6]], 2)]
    row = pack(groups)
    assert row.input_ids.tolist() == [[1, 2, 3, 4, 7, 5]]
    assert row.position_ids.tolist() == [[0, 1, 2, 3, 4, 2]]
    assert row.keep.nonzero()[:, 1].tolist() == [3, 4, 5]
    assert row.scored.tolist() == [0, 1, 0, 2]
    assert row.sequence.tolist() == [0, 0, 1, 2]
    sees = [mask.nonzero().squeeze(-1).tolist() for mask in row.attention_mask[0, 0]]
    assert sees == [[0], [0, 1], [0, 1, 2], [0, 1, 2, 3], [0, 1, 2, 3, 4], [0, 1, 5]]


def test_completions_share_the_words_that_they_begin_with():
    row = pack([Group([1, 2], [[7, 8, 9], [7, 8, 3], [7, 4], [7, 8, 9]], 0)])
    assert row.input_ids.tolist() == [[1, 2, 7, 8]]
    assert row.attention_mask is None
    assert row.scored.tolist() == [0, 1, 2, 0, 1, 2, 0, 1, 0, 1, 2]
    assert row.targets.tolist() == [7, 8, 9, 7, 8, 3, 7, 4, 7, 8, 9]
    assert row.sequence.tolist() == [0, 0, 0, 1, 1, 1, 2, 2, 3, 3, 3]


def test_a_row_moves_whole():
    row = pack(CASES["identical prompts"]).to(torch.device("meta"))
    assert all(tensor.is_meta for tensor in vars(row).values())


sizes = st.lists(st.tuples(st.integers(1, 30), st.lists(st.integers(1, 20), min_size=1, max_size=6)), max_size=25)


@settings(deadline=None)
@given(sizes, st.integers(1, 150))
def test_planning_loses_and_doubles_nothing_and_keeps_the_budget(sizes, tokens_per_row):
    groups, first = [], 0
    for prompt, completions in sizes:
        groups.append(Group([1] * prompt, [[2] * length for length in completions], first))
        first += len(completions)
    rows = plan_rows(groups, tokens_per_row)
    assert sorted(g.first for row in rows for g in row) == [g.first for g in groups]
    assert all(row for row in rows)
    for row in rows:
        size = pack(row).input_ids.shape[1]
        assert size <= tokens_per_row or len(row) == 1
        assert size <= sum(len(g.prompt) + sum(map(len, g.completions)) for g in row)
    assert rows == plan_rows(groups[::-1], tokens_per_row)


@settings(deadline=None)
@given(sizes)
def test_the_plain_form_has_each_completion_in_a_row_of_its_own(sizes):
    groups, first = [], 0
    for prompt, completions in sizes:
        groups.append(Group([1] * prompt, [[2] * length for length in completions], first))
        first += len(completions)
    rows = plain_rows(groups)
    scored = Counter(sequence for row in rows for sequence in pack(row).sequence.tolist())
    lengths = [length for _, completions in sizes for length in completions]
    assert scored == dict(enumerate(lengths))
    assert len(rows) == len(lengths)


def test_only_models_that_see_their_whole_past_share():
    assert can_share(LlamaConfig())
    assert can_share(GemmaConfig())
    assert can_share(Qwen3Config(num_hidden_layers=2))
    assert can_share(MistralConfig(sliding_window=None))
    assert not can_share(MistralConfig(sliding_window=4096))
    assert not can_share(
        Qwen3Config(num_hidden_layers=2, layer_types=["full_attention", "sliding_attention"], sliding_window=8)
    )
