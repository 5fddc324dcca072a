"""Stage 1's trainer against the plain form of its loss, and what both stages share."""

import copy
import os
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from transformers import TrainingArguments

from cluster import training
from cluster.config import Generation, Train
from cluster.errors import Diverged
from cluster.generation import Completion
from cluster.models import save_directory
from cluster.recorder import HISTORY, Recorder
from cluster.report import read_lines
from jobs.rule.config import Steering
from jobs.rule.data import Refusal
from jobs.rule.steering import SteeringTask, SteeringTrainer, steer

ROOT = Path(__file__).parents[2]
PROMPTS = [[1, 2, 3, 4, 5, 6], [1, 2, 3, 9, 8], [1, 2, 7], [4, 4, 4, 4]]


@pytest.fixture
def policy(tiny_model):
    """A copy to train: the shared model stays as it is."""
    return copy.deepcopy(tiny_model)


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


SHARDED = """
import sys, torch, torch.distributed as dist
from cluster import training

training.leave_vllm_out()

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
