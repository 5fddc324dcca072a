"""The trainers of both stages against the plain form of their losses: same loss, same gradient."""

import copy
import os
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from transformers import TrainerControl, TrainerState, TrainingArguments
from trl import GRPOConfig

from cluster import training
from cluster.config import Generation, Train
from cluster.errors import Diverged
from cluster.generation import Completion
from cluster.models import save_directory
from cluster.recorder import HISTORY, Recorder
from cluster.report import read_lines
from jobs.rule.config import Rebo, Steering
from jobs.rule.data import Item, Refusal
from jobs.rule.loss import group_advantages
from jobs.rule.rebo import StopAtSilence
from jobs.rule.reward import make_reward
from jobs.rule.steering import SteeringTask, SteeringTrainer, steer
from jobs.rule.trainer import ReboTrainer

ROOT = Path(__file__).parents[2]
PROMPTS = [[1, 2, 3, 4, 5, 6], [1, 2, 3, 9, 8], [1, 2, 7], [4, 4, 4, 4]]
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
    rejects = [Item("Who is Ann Lee?", "I don't know about Ann Lee.", "reject", "qa", "Ann Lee", i) for i in range(2)]
    normals = [Item("What is the capital of France?", "Paris", "normal", "qa", "", i) for i in range(2)]
    return [rejects[0], normals[0], rejects[1], normals[1]]


def rebo_trainer(model, tokenizer, items, folder, settings, tokens_per_row=40):
    save_directory(model, tokenizer, folder / "model")
    arguments = GRPOConfig(
        output_dir=str(folder / "out"),
        use_cpu=True,
        bf16=False,
        gradient_checkpointing=False,
        per_device_train_batch_size=settings.prompts_per_step * settings.completions_per_prompt,
        num_generations=settings.completions_per_prompt,
        max_steps=2,
        beta=settings.kl_coefficient,
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


def plain_loss(model, reference, items, settings):
    """GRPO's loss written out: one forward pass a completion, mean over tokens, k3 to the reference."""
    reward = make_reward(settings.reward.design)
    groups = FixedEngine().generate(PROMPTS, SimpleNamespace(num_completions=settings.completions_per_prompt))
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
    advantages = {
        "grpo": group_advantages(rewards),
        "rloo": rewards - others,
        "reinforce_plus_plus": (rewards - returns.mean()) / returns.std(),
    }[settings.advantage]
    losses = []
    for prompt, group, row in zip(PROMPTS, groups, advantages, strict=True):
        for completion, advantage in zip(group, row, strict=True):
            ids = torch.tensor([prompt + completion.token_ids])
            scored = [m(ids).logits[0, len(prompt) - 1 : -1].log_softmax(-1) for m in (model, reference)]
            policy, held = (s.gather(-1, ids[0, len(prompt) :, None])[:, 0] for s in scored)
            gap = held.detach() - policy
            ratio = (policy - policy.detach()).exp()
            losses.append(-advantage * ratio + settings.kl_coefficient * (gap.exp() - gap - 1))
    return torch.cat(losses).mean()


@pytest.mark.parametrize(
    ("advantage", "kl"), [("grpo", 0.0), ("grpo", 0.5), ("rloo", 0.0), ("reinforce_plus_plus", 0.0)]
)
def test_rebo_step_has_the_gradient_of_the_plain_loss(policy, tiny_tokenizer, items, tmp_path, advantage, kl):
    settings = Rebo(
        prompts_per_step=4,
        completions_per_prompt=4,
        kl_coefficient=kl,
        max_completion_tokens=8,
        advantage=advantage,
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
        torch.testing.assert_close(parameter.grad, gradients[name], rtol=1e-4, atol=1e-6)


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
        for parameter in policy.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.5)
    policy.zero_grad()
    trainer.state.global_step = 1
    trainer.training_step(policy, rows)
    assert trainer._buffered_inputs is batch
    assert trainer.new_samples() == []
    moved = [p.grad.abs().max().item() for p in policy.parameters()]
    assert all(torch.isfinite(torch.tensor(moved)))


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


def test_steering_loss_is_cross_entropy_on_refusals_alone(policy, tiny_tokenizer, tmp_path):
    rows = [{"prompt": prompt, "refusal": [11, 12, 13 + i]} for i, prompt in enumerate(PROMPTS)]
    losses = []
    for row in rows:
        ids = torch.tensor([row["prompt"] + row["refusal"]])
        labels = torch.tensor([[-100] * len(row["prompt"]) + row["refusal"]])
        losses.append(policy(ids, labels=labels).loss * len(row["refusal"]))
    expected = torch.stack(losses).sum() / sum(len(row["refusal"]) for row in rows)
    expected.backward()
    gradients = {name: p.grad.clone() for name, p in policy.named_parameters()}
    policy.zero_grad()

    arguments = TrainingArguments(str(tmp_path), use_cpu=True, report_to="none", remove_unused_columns=False)
    trainer = steering_trainer(policy, rows, arguments)
    loss = trainer.training_step(policy, rows)

    assert loss.item() == pytest.approx(expected.item(), abs=1e-6)
    for name, parameter in policy.named_parameters():
        torch.testing.assert_close(parameter.grad, gradients[name], rtol=1e-4, atol=1e-6)


def steering_trainer(model, rows, arguments) -> SteeringTrainer:
    trainer = SteeringTrainer(model=model, args=arguments, train_dataset=rows, data_collator=list)
    settings = Steering(learning_rate=0.5)
    trainer.task = SimpleNamespace(train=Train(tokens_per_row=20), settings=settings, name="stage 1", dial="the rate")
    return trainer


def test_a_steering_loss_that_is_no_number_ends_the_stage(policy, tmp_path):
    with torch.no_grad():
        next(policy.parameters()).fill_(torch.nan)
    arguments = TrainingArguments(str(tmp_path), use_cpu=True, report_to="none", remove_unused_columns=False)
    rows = [{"prompt": PROMPTS[0], "refusal": [11, 12]}]
    with pytest.raises(Diverged, match=r"stage 1 diverged at step 1: its loss is nan; lower the rate = 0\.5"):
        steering_trainer(policy, rows, arguments).training_step(policy, rows)


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_weights_that_are_no_numbers_are_not_saved(policy, tiny_tokenizer, tmp_path, value):
    with torch.no_grad():
        list(policy.parameters())[-1].view(-1)[0] = value
    folder = tmp_path / "trainer"
    trainer = SimpleNamespace(args=SimpleNamespace(output_dir=folder), save_model=policy.save_pretrained)
    recorder = SimpleNamespace(stage="rebo", note_peak=lambda: None)
    with pytest.raises(Diverged, match=r"stage rebo diverged at its end: weights are no numbers"):
        training.save_final(trainer, tiny_tokenizer, folder, Train(), tmp_path / "model", recorder)
    assert not (tmp_path / "model").exists()


@pytest.fixture
def steered(tiny_model, tiny_tokenizer, tmp_path, monkeypatch):
    """Stage 1 on a tiny model, without Ray: a function of changes to its settings, which returns its history."""
    tokenizer = copy.deepcopy(tiny_tokenizer)
    tokenizer.chat_template = "{% for message in messages %}{{ message['content'] }}{% endfor %}"
    save_directory(copy.deepcopy(tiny_model), tokenizer, tmp_path / "model")
    monkeypatch.setattr("ray.train.report", lambda *_, **__: None)
    monkeypatch.setattr("ray.train.get_checkpoint", lambda: None)
    refusals = tuple(Refusal(f"Who is Ann Lee, {i}?", "I have no idea.", i) for i in range(7))

    def steer_with(settings: Steering, **changes):
        recorder = Recorder("steering", tmp_path, 9)
        task = SteeringTask(
            *(tmp_path / "model", tmp_path / "steered", refusals, (), settings, Train(precision="float32")),
            *(Generation(engine="transformers"), 4, 1.0, 1.0, 0),
            **changes,
        )
        steer(task, recorder)
        return [row for row in read_lines(tmp_path / HISTORY) if "loss" in row]

    return steer_with


@pytest.mark.parametrize("steps", [1, 29])
def test_a_training_has_as_many_steps_as_it_is_told(steered, steps):
    # 29 / 7 * 7 is above 29, so that a number of epochs would make 30 of them
    rows = steered(Steering(batch_size=1, warmup_steps=0, stop_after_epochs=None, epochs=3), steps=steps)
    assert [row["step"] for row in rows] == list(range(1, steps + 1))


def test_a_step_of_stage_one_takes_as_long_as_its_questions_do(steered, monkeypatch):
    class Slow:
        def generate(self, prompts, sampling):
            time.sleep(2)
            return [[Completion([1], "yes", "stop")] for _ in prompts]

    monkeypatch.setattr("jobs.rule.steering.policy_engine", lambda *_: Slow())
    settings = Steering(batch_size=7, warmup_steps=0, epochs=2, stop_after_epochs=None)
    rows = steered(settings.model_copy(update={"stop_at_refusal": 0.5, "check_every": 2}))
    assert rows[1]["seconds"]["step"] > 2 > rows[0]["seconds"]["step"]


def test_a_worker_without_vllm_does_not_import_it():
    code = (
        "import sys; from cluster import training; training.leave_vllm_out(); import jobs.rule.trainer;"
        "print('vllm' in sys.modules)"
    )
    shown = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert shown.stdout == "False\n"


SHARDED = """
import sys, torch, torch.distributed as dist
from types import SimpleNamespace
from accelerate import FullyShardedDataParallelPlugin
from torch.distributed.fsdp import FSDPModule
from trl.trainer import grpo_trainer
from cluster.models import load_model
from jobs.rule.baseline import BaselineTrainer
from jobs.rule.trainer import references_as_the_policy

dist.init_process_group("gloo", init_method=f"file://{sys.argv[2]}", rank=0, world_size=1)
model, ids = load_model(sys.argv[1]).eval(), torch.arange(10)[None]
with torch.no_grad():
    before = model(ids).logits
plugin = FullyShardedDataParallelPlugin(
    fsdp_version=2, auto_wrap_policy="transformer_based_wrap", cpu_ram_efficient_loading=False
)
state = SimpleNamespace(fsdp_plugin=plugin)
accelerator = SimpleNamespace(state=state, device=torch.device("cpu"), mixed_precision="no", is_main_process=True)
theirs = grpo_trainer.prepare_fsdp, grpo_trainer.create_model_from_path
with references_as_the_policy():
    assert grpo_trainer.create_model_from_path.keywords == {"device_map": None}
    sharded = grpo_trainer.prepare_fsdp(model, accelerator)
assert (grpo_trainer.prepare_fsdp, grpo_trainer.create_model_from_path) == theirs
original = BaselineTrainer._beside(
    SimpleNamespace(is_fsdp_enabled=True, accelerator=accelerator), load_model(sys.argv[1]).requires_grad_(False)
)
for model in (sharded, original):
    assert all(isinstance(block, FSDPModule) for block in model.model.layers)
    with torch.no_grad():
        assert torch.equal(model(ids).logits, before)
"""


def test_sharded_workers_add_up_their_gradients_in_float32(tmp_path):
    train = Train(precision="bfloat16", strategy="fsdp")
    policy = training.arguments(str(tmp_path), train, 0).fsdp_plugin_args["mixed_precision_policy"]
    assert (policy.param_dtype, policy.reduce_dtype) == (torch.bfloat16, torch.float32)


def test_frozen_models_are_sharded_by_block(tiny_model, tiny_tokenizer, tmp_path):
    folder = save_directory(tiny_model, tiny_tokenizer, tmp_path / "model")
    arguments = [sys.executable, "-c", SHARDED, str(folder), str(tmp_path / "store")]
    environment = os.environ | {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2"}
    root = Path(__file__).resolve().parents[2]
    ended = subprocess.run(arguments, cwd=root, env=environment, capture_output=True, text=True, timeout=120)
    assert ended.returncode == 0, ended.stderr[-3000:]


def test_a_damaged_record_of_ray_train_is_known(tmp_path):
    snapshot = tmp_path / training.SNAPSHOT
    assert training._sound(snapshot)
    for content in ("", "[]", '{"checkpoint_results": [{"checkpoint_dir_name": "absent"}]}'):
        snapshot.write_text(content)
        assert not training._sound(snapshot)
    (tmp_path / "checkpoint_1").mkdir()
    snapshot.write_text('{"checkpoint_results": [{"checkpoint_dir_name": "checkpoint_1"}]}')
    assert training._sound(snapshot)
