"""Stage 2 of RULE, refusal boundary optimisation, as Ray Train runs it on every worker."""

import math
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from transformers import TrainerCallback

from cluster import training
from cluster.config import Generation, Train
from cluster.generation import Generator, chosen_engine, policy_engine
from cluster.models import chat_ids, context_length, load_model, load_tokenizer
from cluster.recorder import Recorder
from jobs.rule.config import Rebo
from jobs.rule.data import Item, schedule
from jobs.rule.looks import Looks
from jobs.rule.trace import Trace

if TYPE_CHECKING:
    from transformers import TrainerControl, TrainerState

    from jobs.rule.trainer import ReboTrainer

SILENT_STEPS = 5


@dataclass(frozen=True)
class ReboTask:
    """What a worker of stage 2 needs: `model` is the stage-1 policy, `reference` what the KL term holds it to."""

    model: Path
    reference: Path
    output: Path
    items: tuple[Item, ...]
    settings: Rebo
    train: Train
    generation: Generation
    seed: int
    stop: tuple[str, ...] = ()
    trace: Trace | None = None


def rebo(task: ReboTask, recorder: Recorder) -> None:
    """On-policy reinforcement over forget and boundary questions (RULE, stage 2)."""
    if chosen_engine(task.generation, task.train) != "vllm":
        training.leave_vllm_out()

    from trl import GRPOConfig

    from jobs.rule.trainer import ReboTrainer

    training.prepare_worker(task.train)
    settings, world = task.settings, training.world_size()
    # Saved between two rollouts alone: the one that further updates learn from is in no checkpoint.
    every = math.ceil(task.train.checkpoint_every / settings.updates_per_rollout) * settings.updates_per_rollout
    tokenizer = load_tokenizer(task.model)
    model = training.trainable(load_model(task.model), task.train)
    prompts = [chat_ids(tokenizer, item.prompt) for item in task.items]
    with recorder.scratch() as folder:
        arguments = training.arguments(
            folder,
            task.train.model_copy(update={"checkpoint_every": every}),
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
        callbacks = [training.CheckpointCallback(recorder, lambda: trainer.new_samples())]
        if settings.stop_at_silent is not None:
            callbacks.append(StopAtSilence(settings.stop_at_silent))
        if task.trace is not None:
            callbacks.append(
                Looks(task.trace, task.train, tokenizer, recorder, lambda: trainer.synced(), lambda: trainer.released())
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
            stop=task.stop,
            tokens_per_row=task.train.tokens_per_row,
            callbacks=callbacks,
        )
        training.run(trainer, recorder)
        training.save_final(trainer, tokenizer, task.model, task.train, task.output, recorder)


class StopAtSilence(TrainerCallback):
    """Our extension: stage 2 ends once nearly all groups earn one reward each, and steps cost rollouts for nothing.

    The share is the mean of the last five steps, over all ranks; it stands in the trainer's own log, and so survives a
    restart.
    """

    def __init__(self, share: float) -> None:
        self.share = share

    def on_log(self, args: object, state: "TrainerState", control: "TrainerControl", **_: object) -> None:
        """Told by the trainer."""
        shares = [row["zero_advantage_groups"] for row in state.log_history if "zero_advantage_groups" in row]
        if len(shares) >= SILENT_STEPS and sum(shares[-SILENT_STEPS:]) / SILENT_STEPS >= self.share:
            training.stop(control)


def rollout_engine(owner: "ReboTrainer", task: ReboTask) -> Generator:
    """The engine of the rollouts: the policy itself, or vLLM beside it, which gets the policy's weights each step."""
    if chosen_engine(task.generation, task.train) == "vllm":
        from cluster.vllm_engine import RolloutEngine

        needed = task.settings.max_prompt_tokens + task.settings.max_completion_tokens
        if task.trace is not None:
            needed = max(needed, task.trace.longest(owner.processing_class))
        context = min(needed, context_length(owner.model))  # the plan has measured the prompts
        return RolloutEngine(owner, task.generation, task.train, context)
    policy = owner.accelerator.unwrap_model(owner.model)
    return policy_engine(policy, owner.processing_class, task.generation, task.train)
