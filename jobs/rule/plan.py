"""The plan of a RULE run: the batches of both stages, their memory, and whether every question fits."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from cluster.errors import UserError
from cluster.generation import chosen_engine
from cluster.memory import MemoryPlan, Node, Pass, Rollouts, memory_plan
from cluster.model_shape import ModelShape
from cluster.models import chat_ids, load_tokenizer
from cluster.plan import BatchPlan, Plan, batch_plan
from jobs.rule.config import Baseline, RuleConfig, Steering
from jobs.rule.corpora import Sample
from jobs.rule.data import Probe, RuleData
from jobs.rule.methods.base import Method
from jobs.rule.probes import probe_ids

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

STAGES = ("steering", "rebo")
CHECKED_QUESTIONS = 32  # of either side, that `rule.steering.stop_at_refusal` asks


@dataclass(frozen=True)
class Lengths:
    """Sizes of the training data, in tokens of the model's tokenizer with its chat template.

    refusals: rows of stage 1. longest_refusal: question and refusal of the longest one, before any cut.
    longest_prompt, mean_prompt: of the questions of stage 2.
    """

    refusals: int
    longest_refusal: int
    longest_prompt: int
    mean_prompt: float


def rule_plan(
    config: RuleConfig,
    data: RuleData,
    model: Path,
    node: Node,
    wanted: Sequence[str] = STAGES,
    looked_at: str | None = None,
) -> Plan:
    """The plan of the `wanted` stages with the model in directory `model`, against `node`.

    `looked_at`: the stage whose model is asked probes on the way.

    Raises:
        UserError: as `measure` and `stages` do. `Plan.refusal` tells what does not fit.
    """
    shape = ModelShape.of(model)
    sampled = "rebo" in wanted or config.rule.steering.stop_at_refusal is not None
    tokenizer = load_tokenizer(model)
    lengths = measure(config, data, tokenizer, shape.context, sampled)
    asked = {} if looked_at is None else {looked_at: looks(config, data.probes, tokenizer)}
    return stages(config, lengths, shape, node, wanted, asked)


def looks(config: RuleConfig, probes: Sequence[Probe], tokenizer: "PreTrainedTokenizerBase") -> Rollouts:
    """What a look at a model in training samples of a worker at most."""
    evaluation, trace = config.rule.evaluation, config.rule.trace
    asked = len(probes) if trace.probes is None else min(len(probes), 2 * trace.probes)
    longest = max((len(probe_ids(tokenizer, probe, evaluation.prompt_form)) for probe in probes), default=0)
    return Rollouts(
        min(math.ceil(asked / config.train.num_workers), config.generation.max_batch_sequences),
        longest + evaluation.max_new_tokens,
        trace.naturalness,
    )


def measure(
    config: RuleConfig, data: RuleData, tokenizer: "PreTrainedTokenizerBase", context: int, sampled: bool = True
) -> Lengths:
    """Tokenises the training questions; `context` is the longest sequence that the model takes, in tokens.

    `sampled`: whether answers to the questions of stage 2 are.

    Raises:
        UserError: a question is longer than `rebo.max_prompt_tokens`, or leaves no room for a completion in the
            context; or the question of a refusal fills `steering.max_tokens` alone. The row and the remedy are named.
    """
    rule = config.rule
    most = rule.rebo.max_completion_tokens
    prompts = []
    for index, item in enumerate(data.items):
        size = len(chat_ids(tokenizer, item.prompt))
        where = f"question {index} of stage 2 ({_begin(item.prompt)}) has {size} tokens"
        if sampled and size > rule.rebo.max_prompt_tokens:
            allowed = f"rule.rebo.max_prompt_tokens = {rule.rebo.max_prompt_tokens}"
            raise UserError(f"{where}, more than {allowed}; raise it or shorten the question")
        if sampled and size + most > context:
            both = f"with rule.rebo.max_completion_tokens = {most} more than the model's context of {context}"
            raise UserError(f"{where}, {both}; lower it or shorten the question")
        prompts.append(size)
    longest = 0
    for index, row in enumerate(data.refusals):
        size = len(chat_ids(tokenizer, row.prompt))
        allowed = min(rule.steering.max_tokens, context)
        if size >= allowed:
            where = f"question {index} of stage 1 ({_begin(row.prompt)}) has {size} tokens"
            raise UserError(
                f"{where} and leaves none of rule.steering.max_tokens = {allowed} for its refusal; shorten it"
            )
        longest = max(longest, size + 1 + len(tokenizer(row.refusal, add_special_tokens=False)["input_ids"]))
    return Lengths(len(data.refusals), longest, max(prompts), sum(prompts) / len(prompts))


def stages(
    config: RuleConfig,
    lengths: Lengths,
    shape: ModelShape,
    node: Node,
    wanted: Sequence[str] = STAGES,
    asked: Mapping[str, Rollouts] = {},
) -> Plan:
    """Batches and memory of the `wanted` stages; `asked` is what is sampled of a stage beside its training.

    Raises:
        UserError: a batch cannot be dealt equally to the workers. `Plan.refusal` tells what does not fit.
    """
    plans = {"steering": _steering_plan, "rebo": _rebo_plan}
    found = {stage: plans[stage](config, lengths, shape, node, asked.get(stage, Rollouts())) for stage in wanted}
    memory = {stage: memory for stage, (_, memory) in found.items()}
    return Plan(tuple(batches for batches, _ in found.values()), memory)


def steering_steps(settings: Steering, refusals: int) -> int:
    """Optimiser steps of stage 1 over so many refusals, where nothing stops it before."""
    epochs = min(settings.epochs, settings.stop_after_epochs or settings.epochs)
    return round(epochs * math.ceil(refusals / settings.batch_size))


def _steering_plan(
    config: RuleConfig, lengths: Lengths, shape: ModelShape, node: Node, asked: Rollouts
) -> tuple[BatchPlan, MemoryPlan]:
    steering, train, workers = config.rule.steering, config.train, config.train.num_workers
    row = min(lengths.longest_refusal, steering.max_tokens)
    batches = batch_plan(
        "steering",
        "rule.steering.batch_size",
        steering.batch_size,
        steps=steering_steps(steering, lengths.refusals),
        workers=workers,
        group_tokens=row,
        tokens_per_row=train.tokens_per_row,
    )
    here = max(row, min(train.tokens_per_row, steering.batch_size // workers * row))
    if steering.stop_at_refusal is not None:
        answer = lengths.longest_prompt + config.rule.rebo.max_completion_tokens
        asked = asked.together(Rollouts(min(CHECKED_QUESTIONS, config.generation.max_batch_sequences), answer))
    largest = Pass(here, here, smallest=row)
    return batches, memory_plan(shape, train, config.generation, node, largest=largest, rollouts=asked)


def _rebo_plan(
    config: RuleConfig, lengths: Lengths, shape: ModelShape, node: Node, asked: Rollouts
) -> tuple[BatchPlan, MemoryPlan]:
    rebo, train, workers = config.rule.rebo, config.train, config.train.num_workers
    group = rebo.completions_per_prompt * rebo.max_completion_tokens
    batches = batch_plan(
        "rebo",
        "rule.rebo.prompts_per_step",
        rebo.prompts_per_step,
        steps=rebo.steps,
        workers=workers,
        completions_per_prompt=rebo.completions_per_prompt,
        updates_per_batch=rebo.updates_per_rollout,
        group_tokens=math.ceil(lengths.mean_prompt) + group,
        tokens_per_row=train.tokens_per_row,
    )
    largest_group = lengths.longest_prompt + group
    tokens = max(largest_group, min(train.tokens_per_row, rebo.prompts_per_step // workers * largest_group))
    sampled = Rollouts(
        rebo.prompts_per_step // workers * rebo.completions_per_prompt,
        lengths.longest_prompt + rebo.max_completion_tokens,
    )
    memory = memory_plan(
        shape,
        train,
        config.generation,
        node,
        largest=Pass(tokens, math.ceil(tokens * group / (group + lengths.mean_prompt)), smallest=largest_group),
        rollouts=sampled.together(asked),
        reference=rebo.kl_coefficient > 0,
        colocated_engine=chosen_engine(config.generation, train) == "vllm",
    )
    return batches, memory


def settled(settings: Baseline, method: Method, layers: int) -> Baseline:
    """The settings with the method's own values where they are null; RMU steers block 7 of 32, or one as deep."""
    own = {name: getattr(method.defaults, name) for name in ("learning_rate", "batch_size", "beta")}
    own["rmu_layer"] = round(7 / 32 * layers)
    return settings.model_copy(update={name: value for name, value in own.items() if getattr(settings, name) is None})


def baseline_steps(settings: Baseline, corpora: Mapping[str, Sequence[Sample]]) -> int:
    """Optimiser steps over the first corpus, as transformers counts them."""
    rows = len(next(iter(corpora.values())))
    return math.ceil(math.ceil(rows / settings.batch_size) * settings.epochs)


def baseline_plan(
    config: RuleConfig,
    method: Method,
    corpora: Mapping[str, Sequence[Sample]],
    model: Path,
    node: Node,
    probes: Sequence[Probe] = (),
) -> Plan:
    """The plan of another method: a step holds the passes of all its texts at once, for it has one backward pass.

    `probes`: what the model in training is asked on the way.

    Raises:
        UserError: a batch cannot be dealt equally to the workers, or RMU is to steer the last block or one that is
            not there.
    """
    train, shape = config.train, ModelShape.of(model)
    settings = settled(config.rule.baseline, method, shape.layers)
    last = shape.layers - 1
    if method.trains is not None and settings.rmu_layer >= last:
        raise UserError(
            f"rule.baseline.rmu_layer = {settings.rmu_layer}, but block {last} is the model's last, whose output comes "
            "after the final norm alone; take an earlier one"
        )
    tokenizer = load_tokenizer(model)
    sizes = [
        max(min(_size(tokenizer, sample), settings.max_tokens) for sample in samples) for samples in corpora.values()
    ]
    batches = batch_plan(
        "unlearning",
        "rule.baseline.batch_size",
        settings.batch_size,
        steps=baseline_steps(settings, corpora),
        workers=train.num_workers,
        group_tokens=max(sizes),
        tokens_per_row=train.tokens_per_row,
    )
    texts = settings.batch_size // train.num_workers
    fewer = [texts // 2**halving for halving in range(1, texts.bit_length())]
    batch_sizes = tuple(
        (f"rule.baseline.batch_size={count * train.num_workers}", count * sum(sizes)) for count in fewer
    )
    here = texts * sum(sizes)
    memory = memory_plan(
        shape,
        train,
        config.generation,
        node,
        largest=Pass(here, here, settings=batch_sizes),
        rollouts=looks(config, probes, tokenizer) if probes else Rollouts(),
        reference=method.needs_original_model and train.lora is None,
        trained=None if method.trains is None else shape.matrices(trained_names(method.trains, settings.rmu_layer)),
    )
    return Plan((batches,), {"unlearning": memory})


def trained_names(ending: str, last_block: int) -> set[str]:
    """How the names of the matrices end that RMU trains: those in the three blocks up to `last_block`."""
    return {f"layers.{block}.{ending}" for block in range(max(0, last_block - 2), last_block + 1)}


def _size(tokenizer: "PreTrainedTokenizerBase", sample: Sample) -> int:
    prompt = len(chat_ids(tokenizer, sample.prompt)) if sample.prompt else 1
    return prompt + 1 + len(tokenizer(sample.completion, add_special_tokens=False)["input_ids"])


def _begin(text: str) -> str:
    return repr(text if len(text) <= 40 else f"{text[:37]}...")
