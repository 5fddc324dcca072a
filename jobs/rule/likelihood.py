"""Exact token log-probabilities of causal language models, batched by length, with logits only where they are read."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from cluster.generation import shared_beginning
from cluster.kv_cache import roomy_cache

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedModel

# 2**25 float32 logits are 128 MiB; log-softmax and the moments hold a few copies of that.
_LOGITS_AT_ONCE = 2**25
# Tokens; fewer cost less in every sequence than a pass of their own.
_WORTH_SHARING = 8


@dataclass(frozen=True)
class TokenScores:
    """Scores of one continuation of T tokens, float32 on the CPU.

    logprobs: log p(token), shape (T,), nats, <= 0.
    mean, std: mean and standard deviation of log p(z) over the vocabulary for z ~ p at each position, shape (T,), nats.
    """

    logprobs: Tensor
    mean: Tensor
    std: Tensor


def token_logprobs(
    model: PreTrainedModel, sequences: Sequence[list[int]], prompt_lengths: Sequence[int], max_batch_tokens: int
) -> list[Tensor]:
    """Log-probability of each token after the prompt.

    Args:
        model: a causal language model, on any device.
        sequences: token ids of prompt and continuation together.
        prompt_lengths: leading tokens of each sequence that are not scored, from 1 (nothing predicts the first
            token) to the sequence's length.
        max_batch_tokens: most tokens, padding included, of one forward pass; a longer sequence has a pass to itself.
    Returns: per sequence, in the given order, float32 on the CPU, shape (length - prompt length,), nats.
    Raises: ValueError for a prompt length out of range.
    """
    logprobs = [torch.empty(0)] * len(sequences)
    for rows, hidden, targets, lengths in _continuations(model, sequences, prompt_lengths, max_batch_tokens):
        chunks = [
            _logprobs(model, some).gather(-1, ids[:, None]).squeeze(-1).cpu()
            for some, ids in _chunks(model, hidden, targets)
        ]
        for row, values in zip(rows, torch.cat(chunks).split(lengths), strict=True):
            logprobs[row] = values
    return logprobs


def greedy_matches(
    model: PreTrainedModel, sequences: Sequence[list[int]], prompt_lengths: Sequence[int], max_batch_tokens: int
) -> list[Tensor]:
    """Whether each token after the prompt is the likeliest one after what stands before it, shape (length - prompt,).

    Args, order and errors: as `token_logprobs`.
    """
    matches = [torch.empty(0, dtype=torch.bool)] * len(sequences)
    for rows, hidden, targets, lengths in _continuations(model, sequences, prompt_lengths, max_batch_tokens):
        chunks = [(_logprobs(model, some).argmax(-1) == ids).cpu() for some, ids in _chunks(model, hidden, targets)]
        for row, values in zip(rows, torch.cat(chunks).split(lengths), strict=True):
            matches[row] = values
    return matches


def token_scores(
    model: PreTrainedModel, sequences: Sequence[list[int]], prompt_lengths: Sequence[int], max_batch_tokens: int
) -> list[TokenScores]:
    """`token_logprobs` with the moments of log p over the vocabulary, in the same single pass.

    Args, order and errors: as `token_logprobs`.
    Source: Zhang et al. 2024 (Min-K%++), mu = E_{z~p}[log p(z)] and sigma = sqrt(E_{z~p}[(log p(z) - mu)^2]).
    """
    scores = [TokenScores(torch.empty(0), torch.empty(0), torch.empty(0))] * len(sequences)
    for rows, hidden, targets, lengths in _continuations(model, sequences, prompt_lengths, max_batch_tokens):
        chunks = []
        for some, ids in _chunks(model, hidden, targets):
            logp = _logprobs(model, some)
            p = logp.exp()
            mean = (p * logp).sum(-1)
            std = (p * (logp - mean[:, None]).square()).sum(-1).sqrt()
            chunks.append(torch.stack([logp.gather(-1, ids[:, None]).squeeze(-1), mean, std]).cpu())
        for row, values in zip(rows, torch.cat(chunks, dim=1).split(lengths, dim=1), strict=True):
            scores[row] = TokenScores(*values)
    return scores


def next_token_logprobs(
    model: PreTrainedModel, prompts: Sequence[list[int]], candidates: Sequence[list[int]], max_batch_tokens: int
) -> list[Tensor]:
    """Log-probability of each candidate as the next token after a prompt.

    Args:
        prompts: token ids, at least one each.
        candidates: token ids to compare, per prompt.
        max_batch_tokens: as in `token_logprobs`.
    Returns: per prompt, in the given order, float32 on the CPU, shape (number of its candidates,), nats.
    """
    logprobs = [torch.empty(0)] * len(prompts)
    for rows, hidden in _forward(model, prompts, max_batch_tokens):
        last = torch.tensor([len(prompts[row]) - 1 for row in rows], device=hidden.device)
        values = _logprobs(model, hidden[torch.arange(len(rows), device=hidden.device), last]).cpu()
        for row, value in zip(rows, values, strict=True):
            logprobs[row] = value[candidates[row]]
    return logprobs


def _continuations(
    model: PreTrainedModel, sequences: Sequence[list[int]], prompt_lengths: Sequence[int], max_batch_tokens: int
) -> Iterator[tuple[list[int], Tensor, Tensor, list[int]]]:
    """Yield (rows, hidden states (P, H) that predict their scored tokens, those tokens (P,), tokens a row)."""
    for row, (sequence, start) in enumerate(zip(sequences, prompt_lengths, strict=True)):
        if not 1 <= start <= len(sequence):
            raise ValueError(f"Sequence {row} of {len(sequence)} tokens has a prompt of {start}; allowed are 1 to all.")
    for rows, hidden in _forward(model, sequences, max_batch_tokens):
        lengths = [len(sequences[row]) - prompt_lengths[row] for row in rows]
        picked = torch.cat([hidden[i, prompt_lengths[row] - 1 : len(sequences[row]) - 1] for i, row in enumerate(rows)])
        targets = [token for row in rows for token in sequences[row][prompt_lengths[row] :]]
        yield rows, picked, torch.tensor(targets, dtype=torch.long, device=hidden.device), lengths


@torch.no_grad()
def _forward(
    model: PreTrainedModel, sequences: Sequence[list[int]], max_batch_tokens: int
) -> Iterator[tuple[list[int], Tensor]]:
    """Yield (rows, last hidden states (B, L, H)) of batches of similar length, longest first.

    What all sequences of a batch begin with (a chat template's opening, demonstrations) is computed once.
    """
    decoder = model.get_decoder()
    for rows in _batches([len(sequence) for sequence in sequences], max_batch_tokens):
        batch = [sequences[row] for row in rows]
        width, common = len(batch[0]), shared_beginning(batch) if len(batch) > 1 else 0
        # Padding stands on the right, where a causal model cannot see it; its token is therefore any valid one.
        ids = torch.tensor([sequence + [0] * (width - len(sequence)) for sequence in batch], device=model.device)
        mask = torch.tensor([[1] * len(row) + [0] * (width - len(row)) for row in batch], device=model.device)
        if common < _WORTH_SHARING:
            yield rows, decoder(input_ids=ids, attention_mask=mask, use_cache=False).last_hidden_state
            continue
        cache = roomy_cache(model.config, 0)
        beginning = decoder(
            input_ids=ids[:1, :common], attention_mask=mask[:1, :common], past_key_values=cache, use_cache=True
        ).last_hidden_state
        cache.batch_repeat_interleave(len(batch))
        own = decoder(input_ids=ids[:, common:], attention_mask=mask, past_key_values=cache, use_cache=True)
        yield rows, torch.cat([beginning.expand(len(batch), -1, -1), own.last_hidden_state], dim=1)


def _batches(lengths: Sequence[int], max_batch_tokens: int) -> Iterator[list[int]]:
    order = sorted(range(len(lengths)), key=lambda row: -lengths[row])
    while order:
        count = max(1, max_batch_tokens // max(1, lengths[order[0]]))
        yield order[:count]
        order = order[count:]


def _chunks(model: PreTrainedModel, hidden: Tensor, targets: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    size = max(1, _LOGITS_AT_ONCE // model.get_output_embeddings().weight.shape[0])
    return zip(hidden.split(size), targets.split(size), strict=True)


@torch.no_grad()
def _logprobs(model: PreTrainedModel, hidden: Tensor) -> Tensor:
    """Log-softmax over the vocabulary, (P, H) -> (P, V), as the model's own forward would give it."""
    logits = model.get_output_embeddings()(hidden).float()
    config = model.config.get_text_config()
    # Some families change the logits after the head: Cohere multiplies, Granite divides, Gemma caps.
    logits = logits * (getattr(config, "logit_scale", None) or 1.0) / (getattr(config, "logits_scaling", None) or 1.0)
    if cap := getattr(config, "final_logit_softcapping", None):
        logits = cap * torch.tanh(logits / cap)
    return logits.log_softmax(-1)
