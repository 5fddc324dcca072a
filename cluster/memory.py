"""Whether a stage of training fits into this machine, from the shape of the model alone.

Bytes are counted as transformers' trainer and accelerate use them: weights, gradients and AdamW's two states stay in
float32, bfloat16 is mixed precision.
"""

import json
import math
import re
import shutil
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

from cluster.config import Generation, Lora, Train
from cluster.errors import UserError

GIB = 2**30
FLOAT32 = 4
# Measured: a process with torch, transformers and trl, plus what the allocator keeps of freed memory.
PROCESS = round(1.0 * GIB)
# Ray's own processes, the object store (which carries tasks and results only) and the driver.
RESERVE = 3 * GIB
# Ray kills workers above this share of the node's memory; a full GPU fragments.
USABLE = 0.95
Phase = Literal["always", "rollout", "update"]


@dataclass(frozen=True)
class ModelShape:
    """What memory depends on. `linears` are name, inputs and outputs of each matrix inside the layers."""

    parameters: int
    layers: int
    hidden: int
    intermediate: int
    heads: int
    kv_heads: int
    head_dim: int
    vocabulary: int
    context: int
    linears: tuple[tuple[str, int, int], ...]

    @classmethod
    def of(cls, directory: Path) -> "ModelShape":
        """The model in a checked Hugging Face directory; only its configuration and safetensors headers are read."""
        from safetensors import safe_open
        from transformers import AutoConfig

        config = AutoConfig.from_pretrained(directory, local_files_only=True, trust_remote_code=False).get_text_config()
        shapes = {}
        for file in _weight_files(directory):
            with safe_open(file, framework="numpy") as tensors:
                shapes |= {name: tensors.get_slice(name).get_shape() for name in tensors.keys()}  # noqa: SIM118
        heads = config.num_attention_heads
        return cls(
            parameters=sum(math.prod(shape) for shape in shapes.values()),
            layers=config.num_hidden_layers,
            hidden=config.hidden_size,
            intermediate=getattr(config, "intermediate_size", None) or 4 * config.hidden_size,
            heads=heads,
            kv_heads=getattr(config, "num_key_value_heads", None) or heads,
            head_dim=getattr(config, "head_dim", None) or config.hidden_size // heads,
            vocabulary=config.vocab_size,
            context=config.max_position_embeddings,
            linears=tuple(
                (name.removesuffix(".weight"), shape[1], shape[0])
                for name, shape in shapes.items()
                if len(shape) == 2 and re.search(r"\.\d+\.", name)
            ),
        )

    def lora_parameters(self, lora: Lora) -> int:
        """Weights of the adapters: rank x (inputs + outputs) of each adapted matrix.

        Raises:
            UserError: no matrix has a name of the given form.
        """
        chosen = [
            inputs + outputs
            for name, inputs, outputs in self.linears
            if lora.target_modules == "all-linear" or re.fullmatch(lora.target_modules, name)
        ]
        if not chosen:
            example = self.linears[0][0] if self.linears else "model.layers.0.mlp.up_proj"
            raise UserError(
                f"train.lora.target_modules = {lora.target_modules} fits the name of no matrix of the model, such as "
                f"{example}; give a regular expression of whole names, or all-linear"
            )
        return lora.rank * sum(chosen)


def _weight_files(directory: Path) -> list[Path]:
    """Those that transformers reads: some authors put the same weights beside them in another form."""
    index = directory / "model.safetensors.index.json"
    if index.exists():
        return sorted(
            {directory / name for name in json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()}
        )
    return sorted(file for file in directory.glob("*.safetensors") if not file.name.startswith("consolidated"))


@dataclass(frozen=True)
class Node:
    """What this machine has, in bytes; `gpus` holds the memory of each."""

    memory: int
    gpus: tuple[int, ...]
    disk_free: int


def this_node(storage: Path) -> Node:
    """Memory (a container's limit where there is one), GPUs, and free disk under `storage`, which need not exist."""
    import torch
    from ray._common.utils import get_system_memory

    gpus = [torch.cuda.get_device_properties(i).total_memory for i in range(torch.cuda.device_count())]
    existing = next(folder for folder in (storage.absolute(), *storage.absolute().parents) if folder.exists())
    return Node(get_system_memory(), tuple(gpus), shutil.disk_usage(existing).free)


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
    where it could not be checked. engine: of generation engines in processes of their own, on this node.
    host: what loading takes of the node's memory when training is on GPUs. checkpoint: the most on disk at once.
    """

    rows: tuple[MemoryRow, ...]
    place: str
    workers_here: int
    present: int | None
    engine: int
    host: int
    checkpoint: int
    node: Node
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
    """Sampling within training: sequences of one worker and tokens of each, prompt included; 0 where there is none."""

    sequences: int = 0
    tokens: int = 0


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
) -> MemoryPlan:
    """What a stage needs against what this node has, with a refusal and the smallest change where it does not fit.

    Args:
        reference: whether a frozen second model is held (LoRA needs none: its adapters are switched off).
        colocated_engine: whether vLLM makes the rollouts, with weights of its own, instead of the policy itself.
    """

    def plan(train: Train, generation: Generation, largest: Pass) -> MemoryPlan:
        return _plan(shape, train, generation, node, largest, rollouts, reference, colocated_engine)

    found = plan(train, generation, largest)
    if found.fits:
        return found
    remedy = next((text for text, *change in _changes(train, generation, largest) if plan(*change).fits), None)
    if remedy is None:
        smaller = "a smaller model, LoRA (train.lora)," if train.lora is None else "a smaller model"
        remedy = f"no single setting is enough: take {smaller} or a larger machine"
    return replace(found, refusal=f"the training {found.shortage}; {remedy}")


def _changes(train: Train, generation: Generation, largest: Pass) -> Iterator[tuple[str, Train, Generation, Pass]]:
    """Changes of one setting, the least harmful first."""
    for setting, smaller in largest.smaller():
        yield f"set {setting}", train, generation, smaller
    if not train.activation_checkpointing:
        changed = train.model_copy(update={"activation_checkpointing": True})
        yield "set train.activation_checkpointing=true", changed, generation, largest
    for size in (64, 32, 16, 8):
        if size < generation.max_batch_sequences:
            changed = generation.model_copy(update={"max_batch_sequences": size})
            yield f"set generation.max_batch_sequences={size}", train, changed, largest
    if train.gpus_per_worker and train.num_workers > 1 and train.strategy == "ddp":
        yield "set train.strategy=fsdp", train.model_copy(update={"strategy": "fsdp"}), generation, largest
    # Only what divides the present number: batches that could be dealt out equally still can.
    fewer = [n for n in range(train.num_workers - 1, 0, -1) if train.num_workers % n == 0 and not train.gpus_per_worker]
    for number in fewer:
        yield f"set train.num_workers={number}", train.model_copy(update={"num_workers": number}), generation, largest
    if train.lora is None:
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
) -> MemoryPlan:
    gpu = bool(train.gpus_per_worker)
    shards = train.num_workers if train.strategy == "fsdp" else 1
    weights = shape.parameters * FLOAT32
    trained = weights if train.lora is None else shape.lora_parameters(train.lora) * FLOAT32
    adapters = 0 if train.lora is None else trained
    shared = f"1/{shards} of the model" if shards > 1 else ""
    rows = [
        MemoryRow("weights", (weights + adapters) // shards, "always", shared or "float32"),
        MemoryRow("optimiser", 2 * trained // shards, "always", "AdamW, two float32 states"),
        MemoryRow("gradients", trained // shards, "update", "float32"),
        *_update_rows(shape, train, largest, shards, trained),
    ]
    if reference and train.lora is None:
        rows.insert(2, MemoryRow("reference", weights // shards, "always", shared or "frozen"))
    here = train.num_workers
    present: int | None = round(USABLE * node.memory) - RESERVE
    engine = host = 0
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
            rows.append(
                MemoryRow("engine", size, "always", f"vLLM, {generation.gpu_memory_utilization:.0%} of the GPU")
            )
        else:
            engine = here * size
    # A checkpoint is written before the last one goes, once by the trainer and once where Ray Train keeps it.
    checkpoint = 4 * 3 * trained
    place = "GPU memory" if gpu else "memory"
    return MemoryPlan(tuple(rows), place, here, present, engine, host, checkpoint, node)


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
    element = 2 if train.precision == "bfloat16" else FLOAT32
    cache = min(rollouts.sequences, generation.max_batch_sequences) * rollouts.tokens * _kv(shape, element)
    process = 0 if train.gpus_per_worker else PROCESS
    return process + shape.parameters * element + cache


def _kv(shape: ModelShape, element: int) -> int:
    return 2 * shape.layers * shape.kv_heads * shape.head_dim * element


def gib(size: float) -> str:
    """Bytes as text."""
    return f"{size / GIB:.2f} GiB"
