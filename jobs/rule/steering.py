"""Stage 1 of RULE, rejection steering, as Ray Train runs it on every worker."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from transformers import Trainer, TrainerCallback

from cluster import training
from cluster.config import Generation, Train
from cluster.errors import Diverged
from cluster.generation import Sampling, policy_engine
from cluster.models import answered_ids, chat_ids, end_of_turn, load_model, load_tokenizer
from cluster.recorder import Recorder
from jobs.rule.config import Steering
from jobs.rule.data import Refusal
from jobs.rule.looks import Looks
from jobs.rule.packing import Group, row_logprobs, rows_of_rank
from jobs.rule.plan import CHECKED_QUESTIONS
from jobs.rule.reward import refused
from jobs.rule.trace import Trace

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase, TrainerControl, TrainerState

# The plain "constant" of transformers knows no warm-up.
SCHEDULES = {"cosine": "cosine", "constant": "constant_with_warmup"}


@dataclass(frozen=True)
class SteeringTask:
    """What a worker of stage 1 needs.

    The stopping rule samples as stage 2 will (`max_completion_tokens`, `temperature`, `top_p`, `stop`), and also asks
    `check`, boundary questions, for the record. With `steps` there are so many, whatever `settings.epochs` says. `name`
    and `dial`, the key of its learning rate, say what diverged.
    """

    model: Path
    output: Path
    refusals: tuple[Refusal, ...]
    check: tuple[str, ...]
    settings: Steering
    train: Train
    generation: Generation
    max_completion_tokens: int
    temperature: float
    top_p: float
    seed: int
    stop: tuple[str, ...] = ()
    trace: Trace | None = None
    steps: int | None = None
    name: str = "stage 1"
    dial: str = "rule.steering.learning_rate"


def steer(task: SteeringTask, recorder: Recorder) -> None:
    """Plain cross-entropy on the refusal alone (RULE, stage 1)."""
    training.prepare_worker(task.train)
    tokenizer = load_tokenizer(task.model)
    model = training.trainable(load_model(task.model), task.train)
    rows = [refusal_ids(tokenizer, row, task.settings.max_tokens) for row in task.refusals]
    world = training.world_size()
    steps_per_epoch = -(-len(rows) // task.settings.batch_size)
    with recorder.scratch() as folder:
        arguments = training.arguments(
            folder,
            task.train,
            task.seed,
            per_device_train_batch_size=task.settings.batch_size // world,
            num_train_epochs=task.settings.epochs,
            max_steps=task.steps or -1,
            learning_rate=task.settings.learning_rate,
            lr_scheduler_type=SCHEDULES[task.settings.schedule],
            warmup_steps=task.settings.warmup_steps,
            remove_unused_columns=False,
        )
        stop_after = task.settings.stop_after_epochs
        callbacks = [training.CheckpointCallback(recorder)]
        if task.settings.stop_at_refusal is not None:
            callbacks.insert(0, StopAtRefusal(task, tokenizer, recorder))  # its questions are part of a step's seconds
        if stop_after is not None and stop_after < task.settings.epochs:
            callbacks.append(StopAtStep(round(stop_after * steps_per_epoch)))
        if task.trace is not None:
            engine = partial(policy_engine, model, tokenizer, task.generation, task.train)
            callbacks.append(Looks(task.trace, task.train, tokenizer, recorder, engine))
        trainer = SteeringTrainer(
            model=model,
            args=arguments,
            train_dataset=rows,
            data_collator=lambda batch: batch,
            callbacks=callbacks,
        )
        trainer.task = task
        training.run(trainer, recorder)
        training.save_final(trainer, tokenizer, task.model, task.train, task.output, recorder)


class SteeringTrainer(Trainer):
    """Cross-entropy over packed rows: the template's beginning is computed once a row, logits at refusals only."""

    task: SteeringTask

    def training_step(
        self, model: torch.nn.Module, inputs: Sequence[dict[str, list[int]]], num_items_in_batch: Any = None
    ) -> torch.Tensor:
        """One forward and backward pass a row; the loss is the mean over all refusal tokens of all ranks.

        Raises:
            Diverged: the loss is not finite.
        """
        model.train()
        device = self.accelerator.device
        groups = [Group(row["prompt"], [row["refusal"]], index) for index, row in enumerate(inputs)]
        rows = rows_of_rank(groups, model, self.accelerator, self.task.train.tokens_per_row)
        tokens = torch.tensor(float(sum(len(row["refusal"]) for row in inputs)), device=device)
        tokens = self.accelerator.reduce(tokens, reduction="sum")
        share = self.accelerator.num_processes / tokens
        total = torch.zeros((), device=device)
        for index, row in enumerate(rows):
            last = index + 1 == len(rows)
            with training.exchanging(self.accelerator, model, last), self.compute_loss_context_manager():
                loss = -(row_logprobs(model, row, 1.0) * row.counts).sum() * share
                self.accelerator.backward(loss)
            total += loss.detach()
        loss = self.accelerator.reduce(total, reduction="mean")
        if not torch.isfinite(loss):  # the same on every rank
            raise Diverged(
                f"{self.task.name} diverged at step {self.state.global_step + 1}: its loss is {loss.item()}; "
                f"lower {self.task.dial} = {self.task.settings.learning_rate}"
            )
        return loss


def refusal_ids(tokenizer: "PreTrainedTokenizerBase", row: Refusal, max_tokens: int) -> dict[str, list[int]]:
    """Token ids of question and refusal, the latter with the end token and cut so that both fit `max_tokens`."""
    prompt, refusal = answered_ids(tokenizer, row.prompt, row.refusal)
    return {"prompt": prompt, "refusal": [*refusal, end_of_turn(tokenizer)][: max_tokens - len(prompt)]}


class StopAtStep(TrainerCallback):
    """The paper plans three epochs and takes the checkpoint of the second: the schedule stays, the training ends."""

    def __init__(self, last: int) -> None:
        self.last = last

    def on_step_end(self, args: object, state: "TrainerState", control: "TrainerControl", **_: object) -> None:
        """Told by the trainer."""
        if state.global_step >= self.last:
            training.stop(control)


class StopAtRefusal(TrainerCallback):
    """Our extension: stage 1 ends once sampled answers to forget questions refuse often enough.

    A small model soon refuses everything, and then every group of stage 2 has one reward and nothing to learn from.
    All ranks hold the same weights and draw with the same seed, but a token may differ where machines do: rank 0
    decides.
    """

    def __init__(self, task: SteeringTask, tokenizer: "PreTrainedTokenizerBase", recorder: Recorder) -> None:
        spread = max(1, len(task.refusals) // CHECKED_QUESTIONS)
        forget = [row.prompt for row in task.refusals[::spread]][:CHECKED_QUESTIONS]
        self.questions = {"refusal_forget": forget}
        if task.check:
            self.questions["refusal_boundary"] = list(task.check[:CHECKED_QUESTIONS])
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
        engine = policy_engine(policy, self.tokenizer, self.task.generation, self.task.train)
        sampling = Sampling(
            self.task.max_completion_tokens,
            self.task.temperature,
            self.task.top_p,
            stop=self.task.stop,
            seed=self.task.seed + state.global_step,
        )
        shares = {}
        for name, questions in self.questions.items():
            answers = engine.generate([chat_ids(self.tokenizer, question) for question in questions], sampling)
            shares[name] = sum(refused(answer.text) for [answer] in answers) / len(answers)
        shares = training.gathered(shares)[0]
        self.recorder.record(state.global_step, shares)
        if shares["refusal_forget"] >= self.task.settings.stop_at_refusal:
            training.stop(control)
