"""Stage 2's trainer against the plain form of its loss: same loss, same gradient, on one worker and on two."""

import copy
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from transformers import TrainerControl, TrainerState
from trl import GRPOConfig

from cluster import processes
from cluster.config import Lora
from cluster.errors import Diverged
from cluster.generation import Completion
from cluster.models import save_directory
from cluster.training import with_lora
from jobs.rule.config import Rebo
from jobs.rule.data import Item
from jobs.rule.loss import group_advantages
from jobs.rule.rebo import StopAtSilence
from jobs.rule.reward import make_reward
from jobs.rule.trainer import ReboTrainer

ROOT = Path(__file__).parents[2]
PROMPTS = [[1, 2, 3, 4, 5, 6], [1, 2, 3, 9, 8], [1, 2, 7], [4, 4, 4, 4]]
FORGET = Item("Who is Ann Lee?", "I don't know about Ann Lee.", "reject", "qa", "Ann Lee", 0)
NORMAL = Item("What is the capital of France?", "Paris", "normal", "qa", "", 0)
TEXTS = ["I don't know about Ann Lee.", "She is a baker.", "Paris", "I have no idea."]


class FixedEngine:
    """Rollouts known beforehand: completion k of any prompt is TEXTS[k] with made-up token ids."""

    def generate(self, prompts, sampling):
        return [
            [
                Completion([10 + k, 20 + len(prompt), *range(30, 30 + k)], TEXTS[k], "stop")
                for k in range(sampling.num_completions)
            ]
            for prompt in prompts
        ]


@pytest.fixture
def policy(tiny_model):
    """A copy to train: the shared model stays as it is."""
    return copy.deepcopy(tiny_model)


@pytest.fixture
def items():
    return [FORGET, NORMAL, replace(FORGET, source=1), replace(NORMAL, source=1)]


def rebo_trainer(model, tokenizer, items, folder, settings, tokens_per_row=40, world=1):
    save_directory(model, tokenizer, folder / "model")
    arguments = GRPOConfig(
        output_dir=str(folder / "out"),
        use_cpu=True,
        bf16=False,
        gradient_checkpointing=False,
        per_device_train_batch_size=settings.prompts_per_step * settings.completions_per_prompt // world,
        num_generations=settings.completions_per_prompt,
        max_steps=2,
        beta=settings.kl_coefficient,
        temperature=settings.temperature,
        report_to="none",
        shuffle_dataset=False,
        learning_rate=1e-2,
    )
    return ReboTrainer(
        model=model,
        tokenizer=tokenizer,
        args=arguments,
        settings=settings,
        items=items,
        prompts=PROMPTS,
        order=[0, 1, 2, 3] * 2,
        engine_of=lambda owner: FixedEngine(),
        reference=folder / "model",
        tokens_per_row=tokens_per_row,
        callbacks=[],
    )


def rollouts(settings):
    """The groups of completions of all prompts."""
    return FixedEngine().generate(PROMPTS, SimpleNamespace(num_completions=settings.completions_per_prompt))


def token_logprobs(model, settings):
    """Log-probabilities of each completion's tokens, one forward pass a completion, in order."""
    found = []
    for prompt, group in zip(PROMPTS, rollouts(settings), strict=True):
        for completion in group:
            ids = torch.tensor([prompt + completion.token_ids])
            scored = (model(ids).logits[0, len(prompt) - 1 : -1] / settings.temperature).log_softmax(-1)
            found.append(scored.gather(-1, ids[0, len(prompt) :, None])[:, 0])
    return found


def plain_advantages(items, settings):
    """Of each completion, in order."""
    reward, groups = make_reward(settings.reward.design), rollouts(settings)
    rewards = torch.tensor([[reward(c.text, item) for c in group] for item, group in zip(items, groups, strict=True)])
    returns = torch.tensor(
        [
            r
            for row, group in zip(rewards, groups, strict=True)
            for r, c in zip(row, group, strict=True)
            for _ in c.token_ids
        ]
    )
    others = (rewards.sum(1, keepdim=True) - rewards) / (rewards.shape[1] - 1)
    return {
        "grpo": group_advantages(rewards),
        "rloo": rewards - others,
        "reinforce_plus_plus": (rewards - returns.mean()) / returns.std(),
    }[settings.advantage].flatten()


def plain_loss(model, reference, items, settings):
    """GRPO's loss written out: mean over tokens, k3 to the reference."""
    losses = []
    scored = token_logprobs(model, settings), token_logprobs(reference, settings)
    for policy, held, advantage in zip(*scored, plain_advantages(items, settings), strict=True):
        gap = held.detach() - policy
        ratio = (policy - policy.detach()).exp()
        losses.append(-advantage * ratio + settings.kl_coefficient * (gap.exp() - gap - 1))
    return torch.cat(losses).mean()


@pytest.mark.parametrize(
    ("advantage", "kl", "temperature"),
    [
        ("grpo", 0.0, 1.0),
        ("grpo", 0.5, 1.0),
        ("grpo", 0.5, 0.7),
        ("rloo", 0.0, 1.0),
        ("reinforce_plus_plus", 0.0, 1.2),
    ],
)
def test_rebo_step_has_the_gradient_of_the_plain_loss(
    policy, tiny_tokenizer, items, tmp_path, advantage, kl, temperature
):
    settings = Rebo(
        prompts_per_step=4,
        completions_per_prompt=4,
        kl_coefficient=kl,
        max_completion_tokens=8,
        advantage=advantage,
        temperature=temperature,
    )
    trainer = rebo_trainer(policy, tiny_tokenizer, items, tmp_path, settings)
    reference = trainer.ref_model
    if reference is not None:
        with torch.no_grad():
            for parameter in reference.parameters():
                parameter.mul_(0.9)
    else:
        reference = policy
    expected = plain_loss(policy, reference, items, settings)
    expected.backward()
    gradients = {name: p.grad.clone() for name, p in policy.named_parameters()}
    policy.zero_grad()

    rows = [{"item": index} for index in (0, 1, 2, 3) for _ in range(4)]
    loss = trainer.training_step(policy, rows)

    assert loss.item() == pytest.approx(expected.item(), abs=1e-6)
    for name, parameter in policy.named_parameters():
        torch.testing.assert_close(parameter.grad, gradients[name], rtol=1e-4, atol=1e-6 if temperature == 1 else 1e-5)


def test_adapters_are_held_to_the_model_without_them(policy, tiny_tokenizer, items, tmp_path):
    settings = Rebo(prompts_per_step=4, completions_per_prompt=4, kl_coefficient=0.5, max_completion_tokens=8)
    base, adapted = copy.deepcopy(policy), with_lora(policy, Lora(rank=4, alpha=8))
    trainer = rebo_trainer(adapted, tiny_tokenizer, items, tmp_path, settings)
    adapters = {name: p for name, p in adapted.named_parameters() if p.requires_grad}
    assert all("lora_" in name for name in adapters)
    with torch.no_grad():
        for parameter in adapters.values():
            parameter.normal_(std=0.1)
    expected = plain_loss(adapted, base, items, settings)
    gradients = torch.autograd.grad(expected, list(adapters.values()))
    loss = trainer.training_step(adapted, [{"item": index} for index in (0, 1, 2, 3) for _ in range(4)])
    assert loss.item() == pytest.approx(expected.item(), abs=1e-6)
    for parameter, gradient in zip(adapters.values(), gradients, strict=True):
        torch.testing.assert_close(parameter.grad, gradient, rtol=1e-4, atol=1e-6)
    assert trainer._metrics["train"]["kl"][0] > 0.01


def test_two_workers_make_the_step_of_one(tiny_model, tiny_tokenizer, tmp_path):
    tokenizer = copy.deepcopy(tiny_tokenizer)
    tokenizer.chat_template = "{% for message in messages %}{{ message['content'] }}{% endfor %}"
    save_directory(tiny_model, tokenizer, tmp_path / "model")
    program = Path(__file__).with_name("two_workers.py")
    port = str(processes.free_port())
    workers = [
        subprocess.Popen(
            [sys.executable, program, str(rank), str(tmp_path), port],
            env=os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in (0, 1)
    ]
    for worker in workers:
        _, told = worker.communicate(timeout=300)
        assert worker.returncode == 0, told[-3000:]


def test_groups_without_a_gradient_get_no_row(policy, tiny_tokenizer, items, tmp_path):
    settings = Rebo(prompts_per_step=4, completions_per_prompt=2, kl_coefficient=0, max_completion_tokens=8)
    trainer = rebo_trainer(policy, tiny_tokenizer, items, tmp_path, settings)
    trainer.reward = lambda text, item: 1.0
    batch = trainer._rollout([0, 1, 2, 3])
    assert len(batch.rows) == 1
    assert (batch.rows[0].sequence == -1).all()
    trainer.training_step(policy, [{"item": index} for index in (0, 0, 1, 1, 2, 2, 3, 3)])
    assert all(p.grad is None or not p.grad.any() for p in policy.parameters())


def test_forget_questions_alone_make_a_step(policy, tiny_tokenizer, items, tmp_path):
    settings = Rebo(prompts_per_step=2, completions_per_prompt=2, kl_coefficient=0, max_completion_tokens=8)
    trainer = rebo_trainer(policy, tiny_tokenizer, items, tmp_path, settings)
    trainer._rollout([0, 2])
    assert trainer._metrics["train"]["reward_forget"] == trainer._metrics["train"]["reward"]
    assert "reward_boundary" not in trainer._metrics["train"]
    assert "refusal_boundary" not in trainer._metrics["train"]


@pytest.mark.parametrize(
    ("shares", "stops"),
    [([1.0] * 4, False), ([1.0] * 5, True), ([0.0, 0.8, 0.9, 0.7, 0.8, 0.8], True), ([1.0] * 5 + [0.0] * 2, False)],
)
def test_a_silent_stage_ends(shares, stops):
    rows = [row for share in shares for row in ({"zero_advantage_groups": share}, {"train_runtime": 1.0})]
    control = TrainerControl()
    StopAtSilence(0.8).on_log(None, TrainerState(log_history=rows), control)
    assert control.should_training_stop == stops


def test_second_update_of_a_rollout_is_clipped(policy, tiny_tokenizer, items, tmp_path):
    settings = Rebo(prompts_per_step=4, completions_per_prompt=4, kl_coefficient=0, updates_per_rollout=2)
    trainer = rebo_trainer(policy, tiny_tokenizer, items, tmp_path, settings)
    trainer.num_iterations = 2
    rows = [{"item": index} for index in (0, 1, 2, 3) for _ in range(4)]
    trainer.training_step(policy, rows)
    assert len(trainer.new_samples()) == 4
    batch = trainer._buffered_inputs
    with torch.no_grad():
        before = token_logprobs(policy, settings)
        torch.manual_seed(1)
        for parameter in policy.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.05)
    policy.zero_grad()
    advantages = plain_advantages(items, settings)
    losses, kinds = [], set()
    for now, old, advantage in zip(token_logprobs(policy, settings), before, advantages, strict=True):
        for ratio in (now - old).exp():
            # PPO's loss with both clips, a token at a time
            held = min(max(ratio, 1 - settings.clip_low), 1 + settings.clip_high)
            loss = max(-advantage * ratio, -advantage * held)
            if advantage < 0 and loss > -advantage * settings.dual_clip:
                loss = -advantage * settings.dual_clip
            losses.append(loss + 0 * ratio)
            kinds.add((bool(advantage < 0), loss.item() == (-advantage * ratio).item()))
    assert kinds >= {(True, True), (True, False), (False, True), (False, False)}  # clipped and not, on either side
    expected = torch.stack(losses).mean()
    expected.backward()
    gradients = {name: p.grad.clone() for name, p in policy.named_parameters()}
    policy.zero_grad()

    trainer.state.global_step = 1
    loss = trainer.training_step(policy, rows)
    assert trainer._buffered_inputs is batch
    assert trainer.new_samples() == []
    assert loss.item() == pytest.approx(expected.item(), abs=1e-5)
    for name, parameter in policy.named_parameters():
        torch.testing.assert_close(parameter.grad, gradients[name], rtol=1e-3, atol=1e-5)


def test_a_resumed_training_learns_from_the_rollout_of_its_step(policy, tiny_tokenizer, items, tmp_path):
    settings = Rebo(prompts_per_step=4, completions_per_prompt=4, kl_coefficient=0, updates_per_rollout=3)
    trainer = rebo_trainer(policy, tiny_tokenizer, items, tmp_path, settings)
    trainer.num_iterations = 3
    rows = [{"item": index} for index in (0, 1, 2, 3) for _ in range(4)]
    batches = []
    for trainer.state.global_step in (8, 9, 10, 11, 12):  # TRL counts from 0 in a resumed trainer
        trainer.training_step(policy, rows)
        batches.append(trainer._buffered_inputs)
    last_of_its_rollout, *three, first_of_the_next = batches
    assert three[0] is three[1] is three[2]
    assert len({id(batch) for batch in (last_of_its_rollout, three[0], first_of_the_next)}) == 3


def test_a_rebo_loss_that_is_no_number_ends_the_stage(policy, tiny_tokenizer, items, tmp_path):
    settings = Rebo(prompts_per_step=4, completions_per_prompt=4, kl_coefficient=0.1, learning_rate=0.5)
    trainer = rebo_trainer(policy, tiny_tokenizer, items, tmp_path, settings)
    with torch.no_grad():
        next(policy.parameters()).fill_(torch.nan)
    rows = [{"item": index} for index in (0, 1, 2, 3) for _ in range(4)]
    with pytest.raises(Diverged, match=r"stage 2 diverged at step 1: its loss is nan; lower .*learning_rate = 0\.5"):
        trainer.training_step(policy, rows)
