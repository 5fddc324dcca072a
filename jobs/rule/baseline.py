"""A baseline of RULE, as Ray Train runs it on every worker: its objective over texts in packed rows."""

from collections.abc import Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from transformers import Trainer

from cluster import training
from cluster.config import Generation, Train
from cluster.errors import Diverged, UserError
from cluster.generation import policy_engine
from cluster.models import answered_ids, end_of_turn, load_model, load_tokenizer
from cluster.recorder import Recorder
from jobs.rule import methods
from jobs.rule.config import Baseline
from jobs.rule.corpora import Sample
from jobs.rule.likelihood import token_logprobs
from jobs.rule.looks import Looks
from jobs.rule.methods.base import Corpus, Method, Scored
from jobs.rule.methods.retain import kl_divergence, retain_loss
from jobs.rule.packing import Group, PackedRow, row_logits, row_logprobs, rows_of_rank
from jobs.rule.plan import trained_names
from jobs.rule.steering import SCHEDULES
from jobs.rule.trace import Trace

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


@dataclass(frozen=True)
class BaselineTask:
    """What a worker needs; `settings` has no null left (`jobs.rule.plan.settled`)."""

    method: str
    model: Path
    output: Path
    corpora: Mapping[Corpus, tuple[Sample, ...]]
    settings: Baseline
    train: Train
    generation: Generation
    seed: int
    trace: Trace | None = None


@dataclass(frozen=True)
class Ids:
    """A sample as token ids, and its log-probability before unlearning where the method needs it."""

    prompt: list[int]
    completion: list[int]
    original: float | None


def unlearn(task: BaselineTask, recorder: Recorder) -> None:
    """Trains `task.method` for its epochs over the first of its corpora."""
    training.prepare_worker(task.train)
    method, settings = methods.find(task.method), task.settings
    tokenizer = load_tokenizer(task.model)
    beside = method.needs_original_model and task.train.lora is None  # with LoRA it is the model without its adapters
    original, sharded = None, task.train.strategy == "fsdp"
    if method.needs_original or (beside and not sharded):
        precision = task.train.precision if sharded else "float32"  # FSDP computes in bfloat16 weights, DDP in autocast
        original = load_model(task.model, precision).requires_grad_(False)
    corpora = {
        name: sample_ids(original, tokenizer, samples, settings.max_tokens, method.needs_original, task.train)
        for name, samples in task.corpora.items()
    }
    if not beside:
        original = None  # its memory is the training's
    elif sharded:
        original = load_model(task.model).requires_grad_(False)  # on no GPU until it is shared out
    model = training.trainable(load_model(task.model), task.train)
    if method.trains is not None:
        freeze(model, method.trains, settings.rmu_layer)
    world = training.world_size()
    with recorder.scratch() as folder:
        arguments = training.arguments(
            folder,
            task.train,
            task.seed,
            per_device_train_batch_size=settings.batch_size // world,
            num_train_epochs=settings.epochs,
            learning_rate=settings.learning_rate,
            lr_scheduler_type=SCHEDULES[settings.schedule],
            warmup_steps=settings.warmup_steps,
            max_grad_norm=settings.max_grad_norm,
            remove_unused_columns=False,
        )
        callbacks = [training.CheckpointCallback(recorder)]
        if task.trace is not None:
            engine = partial(policy_engine, model, tokenizer, task.generation, task.train)
            callbacks.append(Looks(task.trace, task.train, tokenizer, recorder, engine))
        trainer = BaselineTrainer(
            model=model,
            args=arguments,
            train_dataset=joined(corpora, method.corpora, task.seed),
            data_collator=lambda batch: batch,
            callbacks=callbacks,
        )
        trainer.prepare(method, settings, task.train, original, task.seed)
        training.run(trainer, recorder)
        training.save_final(trainer, tokenizer, task.model, task.train, task.output, recorder)


class BaselineTrainer(Trainer):
    """One forward pass a packed row, one backward pass a step."""

    def prepare(
        self, method: Method, settings: Baseline, train: Train, original: "PreTrainedModel | None", seed: int
    ) -> None:
        """What `transformers` does not hand through its constructor."""
        self.method, self.settings, self.tokens_per_row, self.direction_seed = (
            method,
            settings,
            train.tokens_per_row,
            seed,
        )
        self.lora = train.lora is not None
        self.original = None if original is None else self._beside(original)

    def training_step(
        self, model: torch.nn.Module, inputs: Sequence[dict[Corpus, Ids]], num_items_in_batch: Any = None
    ) -> Tensor:
        """The method's objective and its retain term; a loss that is no number ends the run.

        Raises:
            Diverged: the loss is not finite.
        """
        model.train()
        step = TrainingStep(self, model, inputs)
        with self.compute_loss_context_manager():
            loss = self.method.objective(step)
            if self.method.retain_term is not None:
                loss = loss + self.settings.retain_coefficient * retain_loss(step, self.method.retain_term)
        if not torch.isfinite(loss):
            raise Diverged(
                f"{self.method.name} diverged at step {self.state.global_step + 1}: its loss is {loss.item()}; "
                f"lower rule.baseline.learning_rate = {self.settings.learning_rate}"
            )
        self.accelerator.backward(loss)
        return loss.detach()

    def _beside(self, original: "PreTrainedModel") -> torch.nn.Module:
        """The original as the model in training is held: on this worker's device, or shared out with FSDP."""
        if not self.is_fsdp_enabled:
            return original.to(self.accelerator.device).eval()
        from accelerate.utils.fsdp_utils import fsdp2_prepare_model

        return fsdp2_prepare_model(self.accelerator, original).eval()

    @contextmanager
    def as_original(self, model: torch.nn.Module):
        """The model before unlearning, in the training's precision: a second one, or this one less its adapters."""
        with torch.no_grad(), self.accelerator.autocast():
            if self.lora:
                with self.accelerator.unwrap_model(model).disable_adapter():
                    yield model
            else:
                yield self.original


class TrainingStep:
    """A batch of each corpus under the model in training (`methods.base.Step`)."""

    def __init__(self, trainer: BaselineTrainer, model: torch.nn.Module, inputs: Sequence[dict[Corpus, Ids]]) -> None:
        self.trainer, self.model, self.inputs = trainer, model, inputs
        self.settings = trainer.settings

    def scored(self, corpus: Corpus) -> Scored:
        """See `Step`."""
        texts = [row[corpus] for row in self.inputs]
        device = self.trainer.accelerator.device
        logprobs, of = [], []
        for row in self._rows(corpus):
            # where none counts, the empty selection still takes part in the backward pass
            logprobs.append(row_logprobs(self.model, row, 1.0)[row.counts])
            of.append(row.sequence[row.counts])
        by_token, text_of = torch.cat(logprobs), torch.cat(of)
        total = torch.zeros(len(texts), device=device).index_add(0, text_of, by_token)
        tokens = torch.tensor([float(len(text.completion)) for text in texts], device=device)
        original = None
        if texts[0].original is not None:
            original = torch.tensor([text.original for text in texts], device=device)
        return Scored(total, tokens, original, self.share(corpus), by_token[text_of.argsort(stable=True)])

    def divergence(self, corpus: Corpus) -> Tensor:
        """See `Step`."""
        parts = []
        for row in self._rows(corpus):
            with self.trainer.as_original(self.model) as original:
                reference = row_logits(original, row)
            parts.append(kl_divergence(row_logits(self.model, row), reference)[counted(row)])
        return torch.cat(parts) * self.share(corpus)

    def activations(self, corpus: Corpus) -> tuple[Tensor, Tensor]:
        """See `Step`."""
        steered, kept = [], []
        for row in self._rows(corpus):
            with self.trainer.as_original(self.model) as original:
                kept.append(self._block_output(original, row)[counted(row)])
            steered.append(self._block_output(self.model, row)[counted(row)])
        return torch.cat(steered), torch.cat(kept)

    def share(self, corpus: Corpus) -> Tensor:
        """See `Step`; gradients are averaged over workers, however long their texts."""
        accelerator = self.trainer.accelerator
        tokens = torch.tensor(float(sum(len(row[corpus].completion) for row in self.inputs)), device=accelerator.device)
        return tokens / accelerator.reduce(tokens, reduction="mean")

    def direction(self) -> Tensor:
        """See `Step`."""
        config = self.trainer.accelerator.unwrap_model(self.model).config.get_text_config()
        generator = torch.Generator().manual_seed(self.trainer.direction_seed)
        vector = torch.rand(config.hidden_size, generator=generator)
        return (vector / vector.norm()).to(self.trainer.accelerator.device)

    def _block_output(self, model: torch.nn.Module, row: PackedRow) -> Tensor:
        output = model(
            input_ids=row.input_ids,
            position_ids=row.position_ids,
            attention_mask=row.attention_mask,
            logits_to_keep=1,
            output_hidden_states=True,
            use_cache=False,
        )
        return output.hidden_states[self.settings.rmu_layer + 1][row.keep]

    def _rows(self, corpus: Corpus) -> list[PackedRow]:
        groups = [Group(row[corpus].prompt, [row[corpus].completion], i) for i, row in enumerate(self.inputs)]
        return rows_of_rank(groups, self.model, self.trainer.accelerator, self.trainer.tokens_per_row)


def counted(row: PackedRow) -> Tensor:
    """Of the kept positions the one that predicts each token: one that texts share counts for each of them."""
    return row.scored[row.counts]


def sample_ids(
    model: "PreTrainedModel | None",
    tokenizer: "PreTrainedTokenizerBase",
    samples: Sequence[Sample],
    max_tokens: int,
    with_original: bool,
    train: Train,
) -> list[Ids]:
    """Token ids, cut at `max_tokens`, with the end token; log-probabilities under `model` where asked for.

    A text without a prompt is predicted from its first token: the beginning token where the tokenizer puts one.
    """
    rows = []
    for sample in samples:
        if sample.prompt:
            prompt, completion = answered_ids(tokenizer, sample.prompt, sample.completion)
            end = end_of_turn(tokenizer)
        else:
            ids = tokenizer(sample.completion)["input_ids"]
            prompt, completion, end = ids[:1], ids[1:], tokenizer.eos_token_id
        if completion[-1:] != [end]:  # some tokenizers end a text themselves
            completion = [*completion, end]
        rows.append((prompt, completion[: max(1, max_tokens - len(prompt))]))
    original: list[float | None] = [None] * len(rows)
    if with_original:
        device, sharded = "cuda" if train.gpus_per_worker else "cpu", train.strategy == "fsdp"
        sequences, starts = [prompt + completion for prompt, completion in rows], [len(prompt) for prompt, _ in rows]
        # in the precision of the training, so that before its first step nothing differs
        with torch.autocast(device, torch.bfloat16, enabled=train.precision == "bfloat16" and not sharded):
            # where training shares out its weights, the whole ones leave little room beside them
            scores = token_logprobs(model.to(device), sequences, starts, (1 if sharded else 4) * train.tokens_per_row)
        original = [score.sum().item() for score in scores]
    return [Ids(*row, score) for row, score in zip(rows, original, strict=True)]


def joined(corpora: Mapping[Corpus, Sequence[Ids]], order: Sequence[Corpus], seed: int) -> list[dict[Corpus, Ids]]:
    """A row a text of the first corpus, with one of each other: pairs stay pairs, retain texts are dealt at random."""
    first = corpora[order[0]]
    generator = torch.Generator().manual_seed(seed)
    rows: list[dict[Corpus, Ids]] = [{order[0]: text} for text in first]
    for name in order[1:]:
        texts = corpora[name]
        dealt = torch.randperm(len(texts), generator=generator).tolist() if name == "retain" else range(len(texts))
        for index, row in enumerate(rows):
            row[name] = texts[dealt[index % len(texts)]]
    return rows


def freeze(model: torch.nn.Module, trained: str, last_block: int) -> None:
    """Leaves a gradient only to matrices whose names end in `trained`, in the three blocks up to `last_block`."""
    wanted = trained_names(trained, last_block)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name.removesuffix(".weight").endswith(tuple(wanted)))
    if not any(parameter.requires_grad for parameter in model.parameters()):
        raise UserError(f"the model has no weights that end in {', '.join(sorted(wanted))}, which the method trains")
