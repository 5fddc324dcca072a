"""ReBO, stage 2 of RULE: TRL's GRPO trainer with RULE's rollouts, rewards, advantages and loss in place of TRL's.

Of TRL and transformers it keeps the loop, the optimiser, the reference model, mixed precision, DDP and FSDP, LoRA and
checkpoints. Three things make a step cheaper than TRL's at the same result: what sequences begin with in common is
computed once (`jobs.rule.packing`), logits exist only where a loss needs them, and a group without a gradient gets no
backward pass.
"""

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase, Trainer, TrainerCallback
from trl import GRPOConfig, GRPOTrainer

from cluster import training
from cluster.errors import Diverged
from cluster.generation import Completion, Generator, Sampling
from jobs.rule.config import Rebo
from jobs.rule.data import Item
from jobs.rule.loss import (
    group_advantages,
    k3_divergence,
    leave_one_out_advantages,
    policy_loss,
    token_moments,
    whitened_advantages,
)
from jobs.rule.packing import Group, PackedRow, row_logprobs, rows_of_rank
from jobs.rule.reward import make_reward, refused

PHASES = ("rollout", "reward", "reference", "update", "sync")


@dataclass
class RolloutBatch:
    """What one step learns from: rows, advantage of each completion, and log-probabilities from before the update."""

    rows: list[PackedRow]
    advantages: torch.Tensor
    reference: list[torch.Tensor | None]
    num_tokens: torch.Tensor
    old: list[torch.Tensor] = field(default_factory=list)


@contextmanager
def references_as_the_policy() -> Iterator[None]:
    """TRL loads an FSDP reference over all GPUs of the node, which the workers share, and shards it as one unit.

    Each pass would gather that whole. Here every worker loads it on the CPU, and accelerate shards it by block.
    """
    from accelerate.utils.fsdp_utils import fsdp2_prepare_model
    from trl.trainer import grpo_trainer

    theirs = grpo_trainer.prepare_fsdp, grpo_trainer.create_model_from_path
    grpo_trainer.prepare_fsdp = lambda model, accelerator: fsdp2_prepare_model(accelerator, model).eval()
    grpo_trainer.create_model_from_path = partial(theirs[1], device_map=None)
    try:
        yield
    finally:
        grpo_trainer.prepare_fsdp, grpo_trainer.create_model_from_path = theirs


class ReboTrainer(GRPOTrainer):
    """One optimiser step a rollout batch: exactly on-policy unless `updates_per_rollout` says otherwise.

    Args:
        model: the stage-1 policy, loaded from a directory.
        reference: directory of the reference model (only read where the KL coefficient is positive and without LoRA).
        items: the training questions; `order` holds the indices that each step asks, `prompts_per_step` a step.
        prompts: token ids of each item's prompt.
        engine_of: makes the rollout engine, given the trainer; where it has `sync` and `release`, they are called
            before and after each rollout.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        args: GRPOConfig,
        settings: Rebo,
        items: Sequence[Item],
        prompts: Sequence[list[int]],
        order: Sequence[int],
        engine_of: Callable[["ReboTrainer"], Generator],
        reference: Path,
        tokens_per_row: int,
        callbacks: list[TrainerCallback],
        stop: tuple[str, ...] = (),
    ) -> None:
        from datasets import Dataset

        reward = make_reward(**settings.reward.model_dump())
        dataset = Dataset.from_dict({"prompt": [items[i].prompt for i in order], "item": list(order)})
        # TRL loads the reference from where the configuration says that the policy came from.
        origin = model.config._name_or_path
        model.config._name_or_path = str(reference)
        try:
            with references_as_the_policy():
                super().__init__(
                    model=model,
                    reward_funcs=[_never_called],
                    args=args,
                    train_dataset=dataset,
                    processing_class=tokenizer,
                    callbacks=callbacks,
                )
        finally:
            model.config._name_or_path = origin
        self.settings = settings
        self.items = items
        self.item_prompts = prompts
        self.reward = reward
        self.tokens_per_row = tokens_per_row
        self.stop = stop
        self._samples: list[dict] = []
        self.seconds = dict.fromkeys(PHASES, 0.0)
        self.engine = engine_of(self)

    def _prepare_inputs(self, inputs: list[dict]) -> RolloutBatch:
        # TRL's own count of steps begins at 0 again when a training is resumed
        if self.state.global_step % self.num_iterations == 0 or self._buffered_inputs is None:
            self._buffered_inputs = self._rollout([row["item"] for row in inputs[:: self.num_generations]])
        return self._buffered_inputs

    def training_step(
        self, model: torch.nn.Module, inputs: list[dict], num_items_in_batch: object = None
    ) -> torch.Tensor:
        """Rolls out, then one forward and backward pass a packed row; gradients are exchanged with the last."""
        model.train()
        batch = self._prepare_inputs(inputs)
        first_update = not batch.old
        total = torch.zeros((), device=self.accelerator.device)
        kl_sum = torch.zeros((), device=self.accelerator.device)
        with self._timed("update"):
            for index, row in enumerate(batch.rows):
                last = index + 1 == len(batch.rows)
                with training.exchanging(self.accelerator, model, last), self.compute_loss_context_manager():
                    logprobs = row_logprobs(model, row, self.temperature)
                    if first_update:
                        batch.old.append(logprobs.detach())
                    loss, kl = self._row_loss(logprobs, batch, index)
                    self.accelerator.backward(loss)
                total += loss.detach()
                kl_sum += kl
        self._step += 1
        sums = self.accelerator.reduce(torch.stack([total / self.accelerator.num_processes, kl_sum]), reduction="sum")
        if not torch.isfinite(sums).all():
            raise Diverged(
                f"stage 2 diverged at step {self.state.global_step + 1}: its loss is {sums[0].item():g}; lower "
                f"rule.rebo.learning_rate = {self.settings.learning_rate:g}"
            )
        if self.settings.kl_coefficient:
            self._metrics["train"]["kl"].append((sums[1] / batch.num_tokens).item())
        self._metrics["train"]["policy_loss"].append(sums[0].item())
        for phase, seconds in self.seconds.items():
            self._metrics["train"][f"seconds/{phase}"].append(seconds)
        self.seconds = dict.fromkeys(PHASES, 0.0)
        return total

    def _row_loss(self, logprobs: torch.Tensor, batch: RolloutBatch, index: int) -> tuple[torch.Tensor, torch.Tensor]:
        row, reference = batch.rows[index], batch.reference[index]
        weights = row.counts.float()
        advantages = batch.advantages[row.sequence]
        settings = self.settings
        loss = policy_loss(
            logprobs, batch.old[index], advantages, settings.clip_low, settings.clip_high, settings.dual_clip
        )
        kl_sum = logprobs.new_zeros(())
        if reference is not None:
            kl = k3_divergence(logprobs, reference)
            loss = loss + settings.kl_coefficient * kl
            kl_sum = (kl.detach() * weights).sum()
        # DDP averages over ranks, while the loss is the mean over all tokens of all ranks
        return (loss * weights).sum() * self.accelerator.num_processes / batch.num_tokens, kl_sum

    def _rollout(self, indices: list[int]) -> RolloutBatch:
        settings, device = self.settings, self.accelerator.device
        with self._timed("sync"):
            self.synced()
        with self._timed("rollout"):
            sampling = Sampling(
                max_new_tokens=settings.max_completion_tokens,
                temperature=settings.temperature,
                top_p=settings.top_p,
                num_completions=settings.completions_per_prompt,
                stop=self.stop,
                seed=(self.args.seed * 1_000_003 + self.state.global_step) * 1009 + self.accelerator.process_index,
            )
            completions = self.engine.generate([self.item_prompts[i] for i in indices], sampling)
            self.released()
        with self._timed("reward"):
            rewards = torch.tensor(
                [
                    [self.reward(c.text, self.items[i]) for c in group]
                    for i, group in zip(indices, completions, strict=True)
                ]
            )
            advantages = self._advantages(rewards, completions)
        groups = [
            Group(self.item_prompts[i], [c.token_ids for c in group], number * settings.completions_per_prompt)
            for number, (i, group) in enumerate(zip(indices, completions, strict=True))
        ]
        num_tokens = sum(len(ids) for group in groups for ids in group.completions)
        silent = (advantages == 0).all(dim=1)
        self._record(indices, completions, rewards, silent, num_tokens)
        if settings.kl_coefficient == 0:
            groups = [group for group, is_silent in zip(groups, silent, strict=True) if not is_silent]
        rows = rows_of_rank(groups, self.model, self.accelerator, self.tokens_per_row)
        total = self.accelerator.reduce(torch.tensor(float(num_tokens), device=device), reduction="sum")
        with self._timed("reference"):
            reference = [self._reference_logprobs(row) for row in rows]
        return RolloutBatch(rows, advantages.flatten().to(device), reference, total)

    def synced(self) -> Generator:
        """The engine, with the policy's present weights."""
        sync = getattr(self.engine, "sync", None)
        if sync is not None:
            sync()
        return self.engine

    def released(self) -> None:
        """Frees what the engine needs only while it generates."""
        release = getattr(self.engine, "release", None)
        if release is not None:
            release()

    def _advantages(self, rewards: torch.Tensor, completions: list[list[Completion]]) -> torch.Tensor:
        """Advantage of each completion (groups, completions) by `rebo.advantage`."""
        if self.settings.advantage == "grpo":
            return group_advantages(rewards)
        if self.settings.advantage == "rloo":
            return leave_one_out_advantages(rewards)
        lengths = torch.tensor([[len(c.token_ids) for c in group] for group in completions])
        moments = token_moments(rewards, lengths).to(self.accelerator.device)
        return whitened_advantages(rewards, self.accelerator.reduce(moments, reduction="sum").cpu())

    def _reference_logprobs(self, row: PackedRow) -> torch.Tensor | None:
        if self.settings.kl_coefficient == 0:
            return None
        with torch.no_grad(), self.compute_loss_context_manager():
            if self.ref_model is not None:
                return row_logprobs(self.ref_model, row, self.temperature)
            with self.accelerator.unwrap_model(self.model).disable_adapter():
                return row_logprobs(self.model, row, self.temperature)

    def _record(
        self,
        indices: list[int],
        completions: list[list[Completion]],
        rewards: torch.Tensor,
        silent: torch.Tensor,
        num_tokens: int,
    ) -> None:
        """Means over all ranks of what the rollouts show; a few samples of this rank."""
        forget = torch.tensor([self.items[i].label == "reject" for i in indices])
        refusal = torch.tensor([[float(refused(c.text)) for c in group] for group in completions]).mean(1)
        ended = torch.tensor([[float(c.finish_reason == "stop") for c in group] for group in completions]).mean(1)
        mean = rewards.mean(1)
        columns = {
            "reward": (mean, None),
            "reward_forget": (mean, forget),
            "reward_boundary": (mean, ~forget),
            "refusal_forget": (refusal, forget),
            "refusal_boundary": (refusal, ~forget),
            "zero_advantage_groups": (silent.float(), None),
            "ended": (ended, None),
        }
        sums = []
        for values, chosen in columns.values():
            kept = values if chosen is None else values[chosen]
            sums += [kept.sum(), torch.tensor(float(len(kept)))]
        sums += [torch.tensor(float(num_tokens)), torch.tensor(float(rewards.numel()))]
        reduced = self.accelerator.reduce(torch.stack(sums).to(self.accelerator.device), reduction="sum").tolist()
        for name, total, count in zip([*columns, "completion_tokens"], reduced[::2], reduced[1::2], strict=True):
            if count:
                self._metrics["train"][name].append(total / count)
        self._samples = [
            {
                "step": self.state.global_step + 1,
                "prompt": self.items[i].prompt,
                "label": self.items[i].label,
                "reference": self.items[i].reference,
                "completion": group[0].text,
                "reward": rewards[number, 0].item(),
            }
            for number, (i, group) in list(enumerate(zip(indices, completions, strict=True)))[:4]
        ]

    def new_samples(self) -> list[dict]:
        """A few of the last rollout's completions, handed out once however many updates learn from it."""
        samples, self._samples = self._samples, []
        return samples

    def _save_checkpoint(self, model: torch.nn.Module, trial: object) -> None:
        # TRL writes a model card for each checkpoint; ours is written once, when the job ends
        Trainer._save_checkpoint(self, model, trial)

    @contextmanager
    def _timed(self, phase: str):
        start = time.perf_counter()
        yield
        if self.accelerator.device.type == "cuda":
            torch.cuda.synchronize()
        self.seconds[phase] += time.perf_counter() - start


def _never_called(completions: list, **_: object) -> list[float]:
    """TRL asks for a reward function; ReBO scores in `_rollout`, where it knows the item."""
    raise AssertionError("ReboTrainer scores its rollouts itself")
