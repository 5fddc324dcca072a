"""Token log-probabilities against the model's own unbatched forward pass."""

from __future__ import annotations

import pytest
import torch

from jobs.rule import likelihood
from jobs.rule.likelihood import next_token_logprobs, token_logprobs, token_scores


@pytest.fixture(scope="module")
def sequences():
    generator = torch.Generator().manual_seed(1)
    return [torch.randint(3, 250, (n,), generator=generator).tolist() for n in (7, 23, 1, 12, 40, 12, 3)]


PROMPTS = [3, 1, 1, 12, 39, 5, 2]


def direct(model, sequence, start):
    with torch.no_grad():
        logp = model(torch.tensor([sequence])).logits[0].log_softmax(-1)
    rows = torch.arange(start - 1, len(sequence) - 1)
    return logp[rows], logp[rows, torch.tensor(sequence[start:], dtype=torch.long)]


def test_a_shared_beginning_is_computed_once_and_changes_nothing(tiny_model, sequences):
    opening = sequences[4][:20]
    sharing = [opening + sequence for sequence in sequences]
    starts = [1, 22, 20, 19, 5, 27, 23]  # scored from within the opening, from its end, and after it
    computed = []
    hook = tiny_model.get_decoder().register_forward_pre_hook(
        lambda _, args, kwargs: computed.append(kwargs["input_ids"].numel()), with_kwargs=True
    )
    try:
        scored = token_scores(tiny_model, sharing, starts, 10_000)
    finally:
        hook.remove()
    assert computed == [20, 7 * 40]
    for sequence, start, score in zip(sharing, starts, scored, strict=True):
        torch.testing.assert_close(score.logprobs, direct(tiny_model, sequence, start)[1], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("max_batch_tokens", [1, 64, 10_000])
def test_logprobs_equal_the_unbatched_forward(tiny_model, sequences, max_batch_tokens):
    scored = token_logprobs(tiny_model, sequences, PROMPTS, max_batch_tokens)
    for sequence, start, values in zip(sequences, PROMPTS, scored, strict=True):
        torch.testing.assert_close(values, direct(tiny_model, sequence, start)[1], atol=1e-5, rtol=1e-5)
        assert values.shape == (len(sequence) - start,)
        assert not values.requires_grad


def test_moments_equal_a_direct_sum_over_the_vocabulary(tiny_model, sequences, monkeypatch):
    monkeypatch.setattr(likelihood, "_LOGITS_AT_ONCE", 1500)
    for sequence, start, scores in zip(
        sequences, PROMPTS, token_scores(tiny_model, sequences, PROMPTS, 64), strict=True
    ):
        logp, taken = direct(tiny_model, sequence, start)
        p = logp.double().exp()
        mean = (p * logp).sum(-1)
        variance = (p * logp.double().square()).sum(-1) - mean.square()
        torch.testing.assert_close(scores.logprobs, taken, atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(scores.mean, mean.float(), atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(scores.std, variance.sqrt().float(), atol=1e-4, rtol=1e-4)


def test_next_token_logprobs(tiny_model, sequences):
    candidates = [[5, 9], [7], [3, 4, 200], [10, 11], [1, 2], [8], [6, 5]]
    for sequence, ids, values in zip(
        sequences, candidates, next_token_logprobs(tiny_model, sequences, candidates, 50), strict=True
    ):
        with torch.no_grad():
            expected = tiny_model(torch.tensor([sequence])).logits[0, -1].log_softmax(-1)[ids]
        torch.testing.assert_close(values, expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("family", ["gemma2", "cohere", "granite"])
def test_families_that_change_the_logits_after_the_head(family, sequences):
    from transformers import AutoConfig, AutoModelForCausalLM

    extra = {
        "gemma2": {"head_dim": 8, "final_logit_softcapping": 3.0},
        "cohere": {"logit_scale": 0.3},
        "granite": {"logits_scaling": 4.0},
    }[family]
    torch.manual_seed(2)
    config = AutoConfig.for_model(
        family,
        vocab_size=260,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        initializer_range=0.3,
        **extra,
    )
    model = AutoModelForCausalLM.from_config(config).eval()
    for sequence, start, values in zip(sequences, PROMPTS, token_logprobs(model, sequences, PROMPTS, 64), strict=True):
        torch.testing.assert_close(values, direct(model, sequence, start)[1], atol=1e-4, rtol=1e-4)


def test_a_lora_model_is_scored_with_its_adapter(tiny_model, sequences):
    import copy

    from peft import LoraConfig, get_peft_model

    torch.manual_seed(3)
    model = get_peft_model(
        copy.deepcopy(tiny_model), LoraConfig(r=4, target_modules=["q_proj", "v_proj"], init_lora_weights=False)
    ).eval()
    scored = token_logprobs(model, sequences, PROMPTS, 64)
    torch.testing.assert_close(scored[1], direct(model, sequences[1], 1)[1], atol=1e-5, rtol=1e-5)
    assert not torch.allclose(scored[1], token_logprobs(tiny_model, sequences, PROMPTS, 64)[1])


def test_batches_respect_the_token_limit_and_cover_every_row():
    lengths = [5, 50, 3, 20, 21, 4, 1]
    batches = list(likelihood._batches(lengths, 64))
    assert sorted(row for batch in batches for row in batch) == list(range(7))
    assert all(len(batch) * max(lengths[row] for row in batch) <= 64 for batch in batches)


@pytest.mark.parametrize("start", [0, 4])
def test_a_prompt_length_out_of_range_is_refused(tiny_model, start):
    with pytest.raises(ValueError, match="Sequence 0 of 3 tokens"):
        token_logprobs(tiny_model, [[5, 6, 7]], [start], 64)


def test_no_sequences_give_no_scores(tiny_model):
    assert token_logprobs(tiny_model, [], [], 64) == []
