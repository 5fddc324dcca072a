"""vLLM behind the generation interface: on a directory (evaluation), or beside a policy in training (rollouts).

The CPU build needs float32 and eager mode, and takes new weights through the worker's `reload_weights`: its packed
linear layers free the tensors that `load_weights` would write to. On a GPU the rollout engine syncs as TRL does.
"""

import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from trl.generation.vllm_generation import VLLMGeneration

from cluster.config import Generation, Train
from cluster.errors import UserError
from cluster.generation import Completion, Sampling, cut, stopped_after
from cluster.memory import VLLM_CACHE
from cluster.models import end_of_turn, load_tokenizer

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase
    from trl import GRPOTrainer
    from vllm import LLM

BATCHED_TOKENS = 4096  # of one pass on a GPU, as TRL has it


class VllmEngine:
    """An engine with the model in `path`; `max_tokens` is prompt and completion together."""

    def __init__(self, path: Path, settings: Generation, train: Train, max_tokens: int, seed: int) -> None:
        self.tokenizer = load_tokenizer(path)
        self.llm = start_llm(
            str(path),
            gpu=bool(train.gpus_per_worker),
            dtype=train.precision,
            max_model_len=max_tokens,
            max_num_seqs=settings.max_batch_sequences,
            gpu_memory_utilization=settings.gpu_memory_utilization,
            seed=seed,
        )

    def generate(self, prompts: Sequence[Sequence[int]], sampling: Sampling) -> list[list[Completion]]:
        """See `cluster.generation.Generator.generate`."""
        return complete(self.llm, self.tokenizer, prompts, sampling)


class RolloutEngine(VLLMGeneration):
    """vLLM in the training process: TRL's weight names and FSDP gathering, Rayward's interface."""

    def __init__(self, trainer: "GRPOTrainer", settings: Generation, train: Train, max_tokens: int) -> None:
        self.dtype = train.precision
        self.gpu = trainer.accelerator.device.type == "cuda"
        super().__init__(
            trainer.model,
            trainer.accelerator,
            trainer.processing_class,
            mode="colocate",
            gpu_memory_utilization=settings.gpu_memory_utilization,
            max_model_length=max_tokens,
            max_num_seqs=settings.max_batch_sequences,
        )

    def _init_vllm(self) -> None:
        import torch
        from trl.trainer.utils import ensure_master_addr_port

        accelerator = self.accelerator
        os.environ["RANK"] = str(accelerator.process_index)
        os.environ["LOCAL_RANK"] = str(accelerator.local_process_index)
        os.environ["WORLD_SIZE"] = str(accelerator.num_processes)
        ensure_master_addr_port()
        threads = torch.get_num_threads()
        self.llm = start_llm(
            self.model.name_or_path,
            gpu=self.gpu,
            dtype=self.dtype,
            max_model_len=self.max_model_length,
            max_num_seqs=self.max_num_seqs,
            gpu_memory_utilization=self.gpu_memory_utilization,
            seed=accelerator.process_index,
            distributed_executor_backend="external_launcher",
        )
        torch.set_num_threads(threads)
        self._llm_weights_sleeping = False
        accelerator.wait_for_everyone()

    def sync(self) -> None:
        """Brings the policy's present weights into the engine and forgets the prefixes computed with the old ones."""
        if self.gpu:
            self.sync_weights()
            return
        worker = self.llm.llm_engine.model_executor.driver_worker
        worker = getattr(worker, "worker", worker)
        worker.reload_weights(weights_iterator=self._iter_named_params(), is_checkpoint_format=True)
        self.llm.reset_prefix_cache()

    def generate(self, prompts: Sequence[Sequence[int]], sampling: Sampling) -> list[list[Completion]]:
        """See `cluster.generation.Generator.generate`."""
        return complete(self.llm, self.processing_class, prompts, sampling)


def start_llm(path: str, *, gpu: bool, dtype: str, gpu_memory_utilization: float, **options: Any) -> "LLM":
    """A vLLM engine inside this process.

    Raises:
        UserError: vLLM is not installed.
    """
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "WARNING")
    os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
    if gpu:
        options |= {"gpu_memory_utilization": gpu_memory_utilization}
        # its own choice on large GPUs, 16384, makes room for passes that are never made
        options |= {"max_num_batched_tokens": max(BATCHED_TOKENS, options["max_model_len"], options["max_num_seqs"])}
    else:
        os.environ.setdefault(VLLM_CACHE, "1")
        # Bound threads would all sit on one core, with the training threads of this process beside them.
        os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", "nobind")
        options |= {"enforce_eager": True}
        dtype = "float32"
    try:
        from vllm import LLM
    except ImportError:
        raise UserError("generation.engine = vllm needs vLLM; run `make env`, or take transformers") from None
    return LLM(path, dtype=dtype, trust_remote_code=False, **options)


def complete(
    llm: "LLM", tokenizer: "PreTrainedTokenizerBase", prompts: Sequence[Sequence[int]], sampling: Sampling
) -> list[list[Completion]]:
    """Completions by vLLM; stop strings are cut afterwards, so that they mean the same in both engines."""
    import torch
    from vllm import SamplingParams
    from vllm.platforms import current_platform

    # The CPU build takes no seed of a request; it draws from this process's generator, which is put back afterwards.
    seeded = not current_platform.is_cpu()
    end = end_of_turn(tokenizer)
    ends = [] if end is None else [end]  # beside those of the model's generation settings
    parameters = [
        SamplingParams(
            n=sampling.num_completions,
            temperature=sampling.temperature,
            top_p=sampling.top_p,
            max_tokens=sampling.max_new_tokens,
            # vLLM counts up from here for the completions of one prompt; prompts must not share their noise
            seed=(sampling.seed * 1_000_003 + index) * 1009 % 2**63 if seeded else None,
            stop_token_ids=ends,
            detokenize=False,
        )
        for index in range(len(prompts))
    ]
    with torch.random.fork_rng(enabled=not seeded):
        if not seeded:
            torch.manual_seed(sampling.seed)
        outputs = llm.generate([{"prompt_token_ids": list(ids)} for ids in prompts], parameters, use_tqdm=False)
    return [
        [_completion(tokenizer, list(one.token_ids), one.finish_reason, sampling.stop) for one in output.outputs]
        for output in outputs
    ]


def _completion(
    tokenizer: "PreTrainedTokenizerBase", token_ids: list[int], finish_reason: str, stop: tuple[str, ...]
) -> Completion:
    end = stopped_after(tokenizer, token_ids, stop)
    text = cut(tokenizer.decode(token_ids, skip_special_tokens=True), stop)
    return Completion(token_ids[:end], text, "stop" if end is not None or finish_reason == "stop" else "length")
