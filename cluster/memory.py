"""Whether a stage of training fits into this machine, from the shape of the model alone.

Bytes are counted as transformers' trainer and accelerate use them: weights, gradients and AdamW's two states stay in
float32, bfloat16 is mixed precision.
"""

import math
import os
import shutil
import stat
from collections.abc import Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

from cluster.config import Generation, Lora, Train
from cluster.errors import UserError
from cluster.model_shape import ModelShape

GIB = 2**30
FLOAT32 = 4
# Measured: a process with torch, transformers and trl, plus what the allocator keeps of freed memory.
PROCESS = round(1.0 * GIB)
VLLM_CACHE = "VLLM_CPU_KVCACHE_SPACE"  # GiB; one where it is not set
# Ray's own processes, the object store (which carries tasks and results only) and the driver.
RESERVE = 3 * GIB
# Ray kills workers above this share of the node's memory; a full GPU fragments.
USABLE = 0.95
Phase = Literal["always", "rollout", "update"]


@dataclass(frozen=True)
class Node:
    """What this machine has, in bytes; `gpus` holds the memory of each.

    cpus: its processors where the cluster may have other machines, so that workers stand elsewhere too; else None.
    """

    memory: int
    gpus: tuple[int, ...]
    disk_free: int
    cpus: int | None = None


def this_node(storage: Path, one_of_several: bool = False) -> Node:
    """Memory (a container's limit where there is one), GPUs, and free disk under `storage`, which need not exist.

    `one_of_several`: whether the cluster may have other nodes.
    """
    import joblib
    import torch
    from ray._common.utils import get_system_memory

    gpus = [torch.cuda.get_device_properties(i).total_memory for i in range(torch.cuda.device_count())]
    existing = next(folder for folder in (storage.absolute(), *storage.absolute().parents) if folder.exists())
    cpus = joblib.cpu_count() if one_of_several else None
    return Node(get_system_memory(), tuple(gpus), shutil.disk_usage(existing).free, cpus)


def freed_by(folders: Iterable[Path]) -> int:
    """Bytes on disk that go with these folders, as far as no other name of a file keeps them.

    Another process may be at work there: what goes meanwhile counts nothing.
    """
    freed = 0
    for folder in folders:
        for place, _, names in os.walk(folder):
            for name in names:
                with suppress(FileNotFoundError):
                    one = os.lstat(os.path.join(place, name))
                    freed += one.st_size if stat.S_ISREG(one.st_mode) and one.st_nlink == 1 else 0
    return freed


@dataclass(frozen=True)
class MemoryRow:
    """One use of memory, in bytes a worker; `phase` says when it is there."""

    name: str
    size: int
    phase: Phase
    note: str = ""


@dataclass(frozen=True)
class MemoryPlan:
    """Memory of one stage. All sizes in bytes.

    place: "memory" or "GPU memory", where a worker's rows lie. present: what that place has for a worker's share, None
    where it could not be checked. engine: of the vLLM engines in the workers of this node.
    host: what loading takes of the node's memory when training is on GPUs. checkpoint: the most on disk at once.
    least_engine: with less of a GPU vLLM would not start.
    """

    rows: tuple[MemoryRow, ...]
    place: str
    workers_here: int
    present: int | None
    engine: int
    host: int
    checkpoint: int
    node: Node
    least_engine: int = 0
    refusal: str | None = None

    @property
    def per_worker(self) -> int:
        """Peak of one worker: what is always there, and the larger of the two phases."""
        size = {
            phase: sum(row.size for row in self.rows if row.phase == phase) for phase in ("always", "rollout", "update")
        }
        return size["always"] + max(size["rollout"], size["update"])

    @property
    def needed(self) -> int:
        """What the workers of this node and their engines need together, or one GPU's worker where there are GPUs."""
        return self.per_worker if self.place == "GPU memory" else self.per_worker * self.workers_here + self.engine

    @property
    def fits(self) -> bool:
        """Whether the plan fits as far as this machine can tell."""
        return self.shortage is None

    @property
    def shortage(self) -> str | None:
        """What is too little, in words; None too where training is on GPUs and this machine has none to compare."""
        if self.present is None:
            return None
        share = next((row.size for row in self.rows if row.name == "engine"), self.least_engine)
        if share < self.least_engine:
            return (
                f"has {gib(share)} of a GPU for vLLM (generation.gpu_memory_utilization), which needs "
                f"{gib(self.least_engine)} for weights, cache and working memory"
            )
        if self.needed > self.present:
            return f"needs {gib(self.needed)} of {self.place}, but {gib(self.present)} are usable"
        host = USABLE * self.node.memory - RESERVE
        if self.host > host:
            loading = f"{gib(self.host)} of memory to load the model in {self.workers_here} workers"
            return f"needs {loading}, but {gib(host)} are usable"
        if self.checkpoint > self.node.disk_free:
            return f"needs {gib(self.checkpoint)} of disk for checkpoints, but {gib(self.node.disk_free)} are free"
        return None


@dataclass(frozen=True)
class Pass:
    """The largest forward and backward pass: its tokens, how many of them need logits, and the least that they can be.

    `train.tokens_per_row` bounds it, where `settings` does not say what does: as "KEY=VALUE", and the tokens with it.
    """

    tokens: int
    kept: int
    smallest: int = 16
    settings: tuple[tuple[str, int], ...] | None = None

    def smaller(self) -> "Iterator[tuple[str, Pass]]":
        """Smaller passes, the largest first, with the setting that makes them so."""
        settings = self.settings
        if settings is None:
            tokens, halves = self.tokens, []
            while tokens > self.smallest:
                tokens = max(self.smallest, tokens // 2)
                halves.append((f"train.tokens_per_row={tokens}", tokens))
            settings = halves
        for setting, tokens in settings:
            yield setting, replace(self, tokens=tokens, kept=math.ceil(self.kept * tokens / self.tokens))


@dataclass(frozen=True)
class Rollouts:
    """Sampling within training: sequences of one worker and tokens of each, prompt included; 0 where there is none.

    `original`: whether the original model is loaded meanwhile, to score what was sampled.
    """

    sequences: int = 0
    tokens: int = 0
    original: bool = False

    def together(self, other: "Rollouts") -> "Rollouts":
        """Enough for either, one after the other."""
        return Rollouts(
            max(self.sequences, other.sequences), max(self.tokens, other.tokens), self.original or other.original
        )


def memory_plan(
    shape: ModelShape,
    train: Train,
    generation: Generation,
    node: Node,
    *,
    largest: Pass,
    rollouts: Rollouts = Rollouts(),
    reference: bool = False,
    colocated_engine: bool = False,
    trained: int | None = None,
) -> MemoryPlan:
    """What a stage needs against what this node has, with a refusal and the smallest change where it does not fit.

    Args:
        reference: whether a frozen second model is held (LoRA needs none: its adapters are switched off).
        colocated_engine: whether vLLM makes the rollouts, with weights of its own, instead of the policy itself.
        trained: number of weights that are trained; None trains all, or the adapters.
    """

    def plan(train: Train, generation: Generation, largest: Pass) -> MemoryPlan:
        return _plan(shape, train, generation, node, largest, rollouts, reference, colocated_engine, trained)

    found = plan(train, generation, largest)
    if found.fits:
        return found
    changes = _changes(train, generation, largest, adaptable=trained is None)
    remedy = next((text for text, *change in changes if plan(*change).fits), None)
    if remedy is None:
        adaptable = train.lora is None and trained is None
        smaller = "a smaller model, LoRA (train.lora)," if adaptable else "a smaller model"
        remedy = f"no single setting is enough: take {smaller} or a larger machine"
    return replace(found, refusal=f"the training {found.shortage}; {remedy}")


def _changes(
    train: Train, generation: Generation, largest: Pass, adaptable: bool
) -> Iterator[tuple[str, Train, Generation, Pass]]:
    """Changes of one setting, the least harmful first."""
    for setting, smaller in largest.smaller():
        yield f"set {setting}", train, generation, smaller
    keeps_units = train.lora is None or not train.lora.dropout  # see `Train`: FSDP cannot recompute with dropout
    if not train.activation_checkpointing and (keeps_units or train.strategy != "fsdp"):
        changed = train.model_copy(update={"activation_checkpointing": True})
        yield "set train.activation_checkpointing=true", changed, generation, largest
    for share in (0.25, 0.3, 0.35, 0.4, 0.45, 0.5, 0.6, 0.7, 0.8, 0.9):
        if train.gpus_per_worker and share > generation.gpu_memory_utilization:
            changed = generation.model_copy(update={"gpu_memory_utilization": share})
            yield f"set generation.gpu_memory_utilization={share}", train, changed, largest
    for size in (64, 32, 16, 8):
        if size < generation.max_batch_sequences:
            changed = generation.model_copy(update={"max_batch_sequences": size})
            yield f"set generation.max_batch_sequences={size}", train, changed, largest
    shardable = keeps_units or not train.activation_checkpointing
    if train.gpus_per_worker and train.num_workers > 1 and train.strategy == "ddp" and shardable:
        yield "set train.strategy=fsdp", train.model_copy(update={"strategy": "fsdp"}), generation, largest
    # Only what divides the present number: batches that could be dealt out equally still can.
    fewer = [n for n in range(train.num_workers - 1, 0, -1) if train.num_workers % n == 0 and not train.gpus_per_worker]
    for number in fewer:
        yield f"set train.num_workers={number}", train.model_copy(update={"num_workers": number}), generation, largest
    if train.lora is None and adaptable:
        changed = train.model_copy(update={"lora": Lora(rank=16, alpha=32)})
        yield "train LoRA adapters (train.lora.rank=16, train.lora.alpha=32)", changed, generation, largest


def _plan(
    shape: ModelShape,
    train: Train,
    generation: Generation,
    node: Node,
    largest: Pass,
    rollouts: Rollouts,
    reference: bool,
    colocated_engine: bool,
    chosen: int | None,
) -> MemoryPlan:
    gpu = bool(train.gpus_per_worker)
    shards = train.num_workers if train.strategy == "fsdp" else 1
    weights = shape.parameters * FLOAT32
    trained = weights if chosen is None else chosen * FLOAT32
    adapters = 0
    if train.lora is not None:
        trained = adapters = shape.lora_parameters(train.lora) * FLOAT32
    shared = f"1/{shards} of the model" if shards > 1 else ""
    rows = [
        MemoryRow("weights", (weights + adapters) // shards, "always", shared or "float32"),
        MemoryRow("optimiser", 2 * trained // shards, "always", "AdamW, two float32 states"),
        MemoryRow("gradients", trained // shards, "update", "float32"),
        *_update_rows(shape, train, largest, shards, trained),
    ]
    if reference and train.lora is None:
        rows.insert(2, MemoryRow("reference", weights // shards, "always", shared or "frozen"))
    here = (
        train.num_workers if node.cpus is None else min(train.num_workers, max(1, node.cpus // train.cpus_per_worker))
    )
    present: int | None = round(USABLE * node.memory) - RESERVE
    engine = host = floor = 0
    if gpu:
        here = min(here, max(1, len(node.gpus) // train.gpus_per_worker))
        present = round(USABLE * min(node.gpus)) if node.gpus else None
        host = here * (PROCESS + weights * (2 if reference and train.lora is None else 1)) if node.gpus else 0
    else:
        rows.insert(0, MemoryRow("process", PROCESS, "always", "Python, torch, transformers"))
    if rollouts.sequences and not colocated_engine:
        rows += _rollout_rows(shape, train, generation, rollouts, shards)
    elif rollouts.sequences:
        size = _engine(shape, train, generation, node, rollouts)
        if gpu:
            share = f"vLLM, {generation.gpu_memory_utilization:.0%} of the GPU"
            rows.append(MemoryRow("engine", size, "always", share))
            floor = _least_engine(shape, train, rollouts)
        else:
            engine = here * size
    if rollouts.original:
        size = shape.parameters * (2 if gpu and train.precision == "bfloat16" else FLOAT32)
        rows.append(MemoryRow("original", size, "rollout", "scores what was sampled"))
    # A checkpoint is written before the last one goes, once by the trainer and once where Ray Train keeps it.
    saved = adapters or weights
    checkpoint = 4 * (saved + 2 * trained)
    place = "GPU memory" if gpu else "memory"
    return MemoryPlan(tuple(rows), place, here, present, engine, host, checkpoint, node, floor)


def _update_rows(shape: ModelShape, train: Train, largest: Pass, shards: int, trained: int) -> Iterator[MemoryRow]:
    """What a forward and backward pass holds.

    A block of the Llama kind keeps, a token: input, normalised input and output of two norms (6 hidden, float32); their
    copies in the precision of the passes, one a projection, when that is not float32 (5 hidden); query, key and value
    with the keys and values repeated for each query head, output of attention and its contiguous copy (5 heads x
    head dimension); gate, its activation, up and their product (4 intermediate); and a row of the mask.
    With activation checkpointing only a block's input is kept, and one block at a time is whole.
    """
    half = train.precision == "bfloat16"
    element = 2 if half else FLOAT32
    attention, tokens = 5 * shape.heads * shape.head_dim, largest.tokens
    block = 6 * shape.hidden * FLOAT32 + (5 * shape.hidden * element if half else 0)
    block = tokens * (block + element * (attention + 4 * shape.intermediate + tokens))
    held, note = block * shape.layers, f"{tokens} tokens x {shape.layers} layers"
    if train.activation_checkpointing:
        held, note = tokens * shape.hidden * FLOAT32 * shape.layers + block, f"{tokens} tokens, checkpointed"
    yield MemoryRow("activations", held, "update", note)
    # The logits and their gradient, and as much again for what the allocator keeps: measured peaks are that high.
    logits = largest.kept * shape.vocabulary * (4 * FLOAT32 + (element if half else 0))
    yield MemoryRow("logits", logits, "update", f"{largest.kept} positions x {shape.vocabulary} words")
    # The embedding's gradient comes in two parts where the head shares its weights; FSDP gathers two blocks at a time.
    working = shape.vocabulary * shape.hidden * FLOAT32
    if shards > 1:
        working += 2 * shape.parameters // shape.layers * element
    elif half:
        working += shape.parameters * element
    if shards == 1 and train.num_workers > 1:
        working += trained
    if train.gpus_per_worker:
        # on a GPU, AdamW works on all weights at once, with one more copy, when the activations are gone
        working = max(working, trained // shards)
    yield MemoryRow("working copies", working, "update", "gradient buckets, weights cast or gathered")


def _rollout_rows(
    shape: ModelShape, train: Train, generation: Generation, rollouts: Rollouts, shards: int
) -> Iterator[MemoryRow]:
    sequences = min(rollouts.sequences, generation.max_batch_sequences)
    element = FLOAT32
    if train.precision == "bfloat16":
        element = 2
        yield MemoryRow("policy that generates", shape.parameters * element, "rollout", "copy in bfloat16")
    yield MemoryRow(
        "KV cache", sequences * rollouts.tokens * _kv(shape, element), "rollout", f"{sequences} x {rollouts.tokens}"
    )
    # Logits, a float32 copy, and what the allocator keeps; under FSDP vLLM is sent gathered weights.
    sampling = sequences * shape.vocabulary * 3 * FLOAT32 + (shape.parameters * FLOAT32 if shards > 1 else 0)
    yield MemoryRow("sampling", sampling, "rollout", "logits and probabilities of one token each")


def _engine(shape: ModelShape, train: Train, generation: Generation, node: Node, rollouts: Rollouts) -> int:
    if node.gpus and train.gpus_per_worker:
        return round(generation.gpu_memory_utilization * min(node.gpus))
    if not train.gpus_per_worker:  # vLLM's CPU build computes in float32, and takes its cache whole
        size = os.environ.get(VLLM_CACHE, "1")
        if not size.isdecimal():
            raise UserError(f"{VLLM_CACHE} = '{size}' is no whole number of GiB; set it to one, or unset it")
        return shape.parameters * FLOAT32 + int(size) * GIB
    element = 2 if train.precision == "bfloat16" else FLOAT32
    cache = min(rollouts.sequences, generation.max_batch_sequences) * rollouts.tokens * _kv(shape, element)
    return shape.parameters * element + cache


def _least_engine(shape: ModelShape, train: Train, rollouts: Rollouts) -> int:
    """Weights, the cache of one sequence, and what vLLM takes for its passes and captured graphs."""
    element = 2 if train.precision == "bfloat16" else FLOAT32
    return shape.parameters * element + rollouts.tokens * _kv(shape, element) + 2 * GIB


def _kv(shape: ModelShape, element: int) -> int:
    return 2 * shape.layers * shape.kv_heads * shape.head_dim * element


def gib(size: float) -> str:
    """Bytes as text."""
    return f"{size / GIB:.2f} GiB"
