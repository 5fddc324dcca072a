"""The two training stages of RULE as functions that Ray Train calls on every worker."""

import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from transformers import TrainerCallback

from cluster import training
from cluster.config import Generation, Train
from cluster.generation import Generator, Sampling, TransformersEngine
from cluster.models import chat_ids, load_model, load_tokenizer, stop_ids
from jobs.rule.config import Rebo, Steering
from jobs.rule.data import Item, Refusal, schedule
from jobs.rule.reward import refused

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase, TrainerControl, TrainerState

    from jobs.rule.trainer import ReboTrainer

CHECKED_QUESTIONS = 32


@dataclass(frozen=True)
class SteeringTask:
    """What a worker of stage 1 needs. `check` holds boundary questions that the stopping rule samples for the record."""

    model: Path
    output: Path
    refusals: tuple[Refusal, ...]
    check: tuple[str, ...]
    settings: Steering
    train: Train
    generation: Generation
    max_completion_tokens: int
    seed: int


@dataclass(frozen=True)
class ReboTask:
    """What a worker of stage 2 needs: `model` is the stage-1 policy, `reference` the model that the KL term holds to."""

    model: Path
    reference: Path
    output: Path
    items: tuple[Item, ...]
    settings: Rebo
    train: Train
    generation: Generation
    seed: int


def steer(task: SteeringTask, recorder: training.Recorder) -> None:
    """Stage 1, rejection steering: plain cross-entropy on the refusal alone (RULE, stage 1)."""
    from transformers import DataCollatorForSeq2Seq, Trainer

    training.prepare_worker(task.train)
    tokenizer = load_tokenizer(task.model)
    model = training.trainable(load_model(task.model), task.train)
    rows = [_refusal_row(tokenizer, row, task.settings.max_tokens) for row in task.refusals]
    world = training.world_size()
    steps_per_epoch = -(-len(rows) // task.settings.batch_size)
    with tempfile.TemporaryDirectory(prefix="steer-") as folder:
        arguments = training.arguments(
            folder,
            task.train,
            task.seed,
            per_device_train_batch_size=task.settings.batch_size // world,
            num_train_epochs=task.settings.epochs,
            learning_rate=task.settings.learning_rate,
            lr_scheduler_type=task.settings.schedule,
            warmup_steps=task.settings.warmup_steps,
        )
        stop_after = task.settings.stop_after_epochs
        callbacks = [training.CheckpointCallback(recorder)]
        if task.settings.stop_at_refusal is not None:
            callbacks.append(StopAtRefusal(task, tokenizer, recorder))
        if stop_after is not None and stop_after < task.settings.epochs:
            callbacks.append(StopAtStep(round(stop_after * steps_per_epoch)))
        trainer = Trainer(
            model=model,
            args=arguments,
            train_dataset=rows,
            data_collator=DataCollatorForSeq2Seq(tokenizer, padding=True),
            callbacks=callbacks,
        )
        training.run(trainer, recorder)
        training.save_final(trainer, tokenizer, task.model, task.train, task.output, recorder)


def rebo(task: ReboTask, recorder: training.Recorder) -> None:
    """Stage 2, refusal boundary optimisation."""
    from trl import GRPOConfig

    from jobs.rule.trainer import ReboTrainer

    training.prepare_worker(task.train)
    settings, world = task.settings, training.world_size()
    tokenizer = load_tokenizer(task.model)
    model = training.trainable(load_model(task.model), task.train)
    prompts = [chat_ids(tokenizer, item.prompt) for item in task.items]
    with tempfile.TemporaryDirectory(prefix="rebo-") as folder:
        arguments = training.arguments(
            folder,
            task.train,
            task.seed,
            config_class=GRPOConfig,
            per_device_train_batch_size=settings.prompts_per_step * settings.completions_per_prompt // world,
            num_generations=settings.completions_per_prompt,
            num_iterations=settings.updates_per_rollout,
            steps_per_generation=1,
            max_steps=settings.steps * settings.updates_per_rollout,
            max_completion_length=settings.max_completion_tokens,
            learning_rate=settings.learning_rate,
            lr_scheduler_type="constant",
            weight_decay=settings.weight_decay,
            max_grad_norm=settings.max_grad_norm,
            beta=settings.kl_coefficient,
            temperature=settings.temperature,
            top_p=settings.top_p,
            shuffle_dataset=False,
        )
        trainer = ReboTrainer(
            model=model,
            tokenizer=tokenizer,
            args=arguments,
            settings=settings,
            items=task.items,
            prompts=prompts,
            order=schedule(task.items, settings.steps, settings.prompts_per_step, task.seed),
            engine_of=lambda owner: rollout_engine(owner, task),
            reference=task.reference,
            tokens_per_row=task.train.tokens_per_row,
            callbacks=[training.CheckpointCallback(recorder)],
        )
        training.run(trainer, recorder)
        training.save_final(trainer, tokenizer, task.model, task.train, task.output, recorder)


def rollout_engine(owner: "ReboTrainer", task: ReboTask) -> Generator:
    """The engine of the rollouts: the policy itself, or vLLM beside it with the policy's weights brought in each step."""
    if task.generation.engine == "vllm":
        from cluster.vllm_engine import ColocatedEngine

        context = task.settings.max_prompt_tokens + task.settings.max_completion_tokens
        return ColocatedEngine(owner, task.generation, context)
    policy = owner.accelerator.unwrap_model(owner.model)
    return TransformersEngine(
        policy, owner.processing_class, stop_ids(policy, owner.processing_class), task.generation.max_batch_sequences
    )


def _refusal_row(tokenizer: "PreTrainedTokenizerBase", row: Refusal, max_tokens: int) -> dict[str, list[int]]:
    prompt = chat_ids(tokenizer, row.prompt)
    answer = tokenizer(row.refusal, add_special_tokens=False)["input_ids"] + [tokenizer.eos_token_id]
    ids = (prompt + answer)[:max_tokens]
    return {"input_ids": ids, "attention_mask": [1] * len(ids), "labels": ([-100] * len(prompt) + answer)[:max_tokens]}


class StopAtStep(TrainerCallback):
    """The paper plans three epochs and takes the checkpoint of the second: the schedule stays, the training ends."""

    def __init__(self, last: int) -> None:
        self.last = last

    def on_step_end(self, args: object, state: "TrainerState", control: "TrainerControl", **_: object) -> None:
        """Told by the trainer."""
        if state.global_step >= self.last:
            control.should_training_stop = True


class StopAtRefusal(TrainerCallback):
    """Our extension: stage 1 ends once sampled answers to forget questions refuse often enough.

    A small model soon refuses everything, and then every group of stage 2 has one reward and nothing to learn from.
    All ranks hold the same weights and draw with the same seed, so that they stop together.
    """

    def __init__(self, task: SteeringTask, tokenizer: "PreTrainedTokenizerBase", recorder: training.Recorder) -> None:
        spread = max(1, len(task.refusals) // CHECKED_QUESTIONS)
        forget = [row.prompt for row in task.refusals[::spread]][:CHECKED_QUESTIONS]
        self.questions = {"refusal_forget": forget, "refusal_boundary": list(task.check[:CHECKED_QUESTIONS])}
        self.task = task
        self.tokenizer = tokenizer
        self.recorder = recorder

    def on_step_end(
        self,
        args: object,
        state: "TrainerState",
        control: "TrainerControl",
        model: "PreTrainedModel | None" = None,
        **_: object,
    ) -> None:
        """Told by the trainer."""
        if state.global_step % self.task.settings.check_every:
            return
        policy = getattr(model, "module", model)
        engine = TransformersEngine(
            policy, self.tokenizer, stop_ids(policy, self.tokenizer), self.task.generation.max_batch_sequences
        )
        sampling = Sampling(self.task.max_completion_tokens, temperature=1.0, seed=self.task.seed + state.global_step)
        shares = {}
        for name, questions in self.questions.items():
            answers = engine.generate([chat_ids(self.tokenizer, question) for question in questions], sampling)
            shares[name] = sum(refused(answer.text) for [answer] in answers) / len(answers)
        self.recorder.record(state.global_step, shares)
        if shares["refusal_forget"] >= self.task.settings.stop_at_refusal:
            control.should_training_stop = True
