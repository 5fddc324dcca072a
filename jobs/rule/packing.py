"""Shared prefixes: whatever sequences of a row begin with in common is computed once.

A row is a trie of all its prompts and completions, laid out flat. A token sees its ancestors only and carries the
position it would have alone, so that every log-probability, and hence the loss and its gradient, is that of the plain
form; only the work is less. Completions share a prompt, and refusals share their words; a last token predicts nothing
and is not computed.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
from jaxtyping import Bool, Int
from torch import Tensor

if TYPE_CHECKING:
    from accelerate import Accelerator


@dataclass(frozen=True)
class Group:
    """A prompt and its completions as token ids; `first` is the index of its first completion in the batch."""

    prompt: list[int]
    completions: list[list[int]]
    first: int


@dataclass(frozen=True)
class PackedRow:
    """One forward pass. T tokens, K positions whose logits are needed, N completion tokens to score.

    `attention_mask` is None for a single path: the model's own mask is right then, whatever its layers attend to.
    `scored` (N,) indexes the K kept positions: the one that predicts the token; `targets` (N,) is the token;
    `sequence` (N,) is the completion in the batch that it belongs to, -1 for a token that weighs nothing.
    """

    input_ids: Int[Tensor, "1 T"]
    position_ids: Int[Tensor, "1 T"]
    attention_mask: Bool[Tensor, "1 1 T T"] | None
    keep: Bool[Tensor, "1 T"]
    scored: Int[Tensor, " N"]
    targets: Int[Tensor, " N"]
    sequence: Int[Tensor, " N"]

    @property
    def counts(self) -> Bool[Tensor, " N"]:
        """Which tokens weigh anything."""
        return self.sequence >= 0

    def to(self, device: torch.device) -> "PackedRow":
        """The row on another device."""
        moved = {name: None if tensor is None else tensor.to(device) for name, tensor in vars(self).items()}
        return PackedRow(**moved)


def plan_rows(groups: Sequence[Group], tokens_per_row: int) -> list[list[Group]]:
    """Groups dealt to rows of at most `tokens_per_row` tokens (one group at least), largest first, first fit."""
    rows: list[list[Group]] = []
    room: list[int] = []
    sized = [(_size(group), group) for group in groups]
    for size, group in sorted(sized, key=lambda pair: (-pair[0], pair[1].first)):
        fitting = next((i for i, free in enumerate(room) if free >= size), None)
        if fitting is None:
            rows.append([])
            room.append(tokens_per_row)
            fitting = len(rows) - 1
        rows[fitting].append(group)
        room[fitting] -= size
    return rows


def plain_rows(groups: Sequence[Group]) -> list[list[Group]]:
    """One completion a row, nothing shared: for models whose layers cannot take a mask, and the oracle of the tests."""
    return [
        [Group(group.prompt, [completion], group.first + offset)]
        for group in groups
        for offset, completion in enumerate(group.completions)
    ]


def rows_of_rank(
    groups: Sequence[Group], model: torch.nn.Module, accelerator: "Accelerator", tokens_per_row: int
) -> list[PackedRow]:
    """This rank's groups in packed rows on its device, as many on every rank and one at least.

    DDP and FSDP want every rank in every forward pass: one with fewer rows gets some that weigh nothing.
    """
    device = accelerator.device
    shared = can_share(accelerator.unwrap_model(model).config)
    plan = plan_rows(groups, tokens_per_row) if shared else plain_rows(groups)
    most = int(accelerator.gather(torch.tensor([len(plan)], device=device)).max())
    shortest = pack([Group([0], [[0]], -1)])
    rows = [pack(row) for row in plan] + [shortest] * (max(most, 1) - len(plan))
    return [row.to(device) for row in rows]


def pack(groups: Sequence[Group]) -> PackedRow:
    """Lays the groups of one row out flat; every completion has a token at least."""
    ids: list[int] = []
    parents: list[int] = []
    positions: list[int] = []
    children: dict[tuple[int, int], int] = {}

    def path(tokens: Sequence[int], node: int) -> list[int]:
        found = []
        for token in tokens:
            child = children.get((node, token))
            if child is None:
                child = children[node, token] = len(ids)
                ids.append(token)
                parents.append(node)
                positions.append(positions[node] + 1 if node >= 0 else 0)
            node = child
            found.append(node)
        return found

    predictors: list[int] = []
    targets: list[int] = []
    sequence: list[int] = []
    for group in groups:
        end = path(group.prompt, -1)[-1]
        for offset, completion in enumerate(group.completions):
            predictors += [end, *path(completion[:-1], end)]
            targets += completion
            sequence += [group.first + offset] * len(completion)

    rank = {node: index for index, node in enumerate(sorted(set(predictors)))}
    kept = torch.zeros(len(ids), dtype=torch.bool)
    kept[list(rank)] = True
    alone = parents == list(range(-1, len(ids) - 1))
    return PackedRow(
        input_ids=torch.tensor(ids)[None],
        position_ids=torch.tensor(positions)[None],
        attention_mask=None if alone else _mask(parents),
        keep=kept[None],
        scored=torch.tensor([rank[node] for node in predictors]),
        targets=torch.tensor(targets),
        sequence=torch.tensor(sequence),
    )


def _mask(parents: Sequence[int]) -> Bool[Tensor, "1 1 T T"]:
    """Which tokens each token sees: itself, and what its parent sees."""
    sees = np.eye(len(parents), dtype=bool)
    for token, parent in enumerate(parents):
        if parent >= 0:
            sees[token] |= sees[parent]
    return torch.from_numpy(sees)[None, None]


def row_logprobs(model: torch.nn.Module, row: PackedRow, temperature: float) -> Tensor:
    """Log-probability (N,) of each completion token at `temperature`; logits only at the K needed positions."""
    return _TokenLogprobs.apply(row_logits(model, row), row.scored, row.targets, temperature)


def row_logits(model: torch.nn.Module, row: PackedRow) -> Tensor:
    """Logits (K, V) at the needed positions."""
    logits = model(
        input_ids=row.input_ids,
        position_ids=row.position_ids,
        attention_mask=row.attention_mask,
        logits_to_keep=row.keep,
        use_cache=False,
    ).logits
    return logits.reshape(-1, logits.shape[-1])


class _TokenLogprobs(torch.autograd.Function):
    """log_softmax(logits / temperature)[scored, targets] in float32 at least, whatever the logits' precision.

    Written by hand because logits are the largest tensor there is: autograd passes over them nine times, this four.
    """

    @staticmethod
    def forward(ctx, logits: Tensor, scored: Tensor, targets: Tensor, temperature: float) -> Tensor:
        """logits (K, V), scored (N,) rows of them, targets (N,) -> (N,)."""
        normalisers = torch.cat([(_wide(part) / temperature).logsumexp(-1) for part in logits.split(_ROWS)])
        ctx.save_for_backward(logits, scored, targets, normalisers)
        ctx.temperature = temperature
        return _wide(logits[scored, targets]) / temperature - normalisers[scored]

    @staticmethod
    def backward(ctx, gradient: Tensor) -> tuple[Tensor | None, ...]:
        """d logprob / d logit = (1[target] - softmax) / temperature, summed over the tokens that one row predicts."""
        logits, scored, targets, normalisers = ctx.saved_tensors
        gradient = gradient / ctx.temperature
        by_row = torch.zeros_like(normalisers).index_add_(0, scored, gradient)
        flow = torch.empty_like(logits)
        order = scored.argsort()
        starts = torch.arange(0, len(logits) + _ROWS, _ROWS, device=scored.device)
        edges = torch.searchsorted(scored[order], starts).tolist()
        parts = zip(logits.split(_ROWS), flow.split(_ROWS), by_row.split(_ROWS), normalisers.split(_ROWS), strict=True)
        for index, (part, out, total, normaliser) in enumerate(parts):
            shares = (_wide(part) / ctx.temperature).sub_(normaliser[:, None]).exp_()
            torch.mul(shares, -total[:, None], out=shares)
            # before it is rounded: in bfloat16 both terms of a sure token would cancel out
            here = order[edges[index] : edges[index + 1]]
            shares.index_put_((scored[here] - index * _ROWS, targets[here]), gradient[here], accumulate=True)
            out.copy_(shares)
        return flow, None, None, None


def _wide(values: Tensor) -> Tensor:
    return values.to(torch.promote_types(values.dtype, torch.float32))


_ROWS = 16  # of logits at a time: a few MB, which stay in the processor's cache


def can_share(config: object) -> bool:
    """Whether every layer of the model attends to the whole past, so that a mask alone separates completions."""
    text = config.get_text_config()
    layers = getattr(text, "layer_types", None)
    if layers is not None:
        return all(layer == "full_attention" for layer in layers)
    return getattr(text, "sliding_window", None) is None and hasattr(text, "num_attention_heads")


def _size(group: Group) -> int:
    children: dict[tuple[int, int], int] = {}
    for completion in group.completions:
        node = 0
        for token in completion[:-1]:
            node = children.setdefault((node, token), len(children) + 1)
    return len(group.prompt) + len(children)
