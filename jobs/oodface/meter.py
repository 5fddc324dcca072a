"""How busy a GPU is while a worker makes a shard."""

import logging
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache
from typing import Any

import torch

EVERY_S = 0.2
logger = logging.getLogger(__name__)


@contextmanager
def gpu_use(device: torch.device) -> Iterator[dict[str, Any]]:
    """Fills, when the block ends, gpu_busy and gpu_peak_memory_gib; nothing for a processor.

    gpu_busy is the mean of NVML's utilisation, the share of time in which some kernel ran, 0 to 1; it counts what other
    processes do on that GPU too. The memory is what this process' tensors had at most.
    """
    found: dict[str, Any] = {}
    if device.type != "cuda":
        yield found
        return
    samples: list[int] = []
    ended = threading.Event()

    def sample() -> None:
        while not ended.wait(EVERY_S):
            try:
                samples.append(torch.cuda.utilization(device))
            except Exception as error:  # NVML's own, whose module is only there with a GPU; a MIG slice has no figure
                _warn(str(device), str(error))
                return

    torch.cuda.reset_peak_memory_stats(device)
    thread = threading.Thread(target=sample, daemon=True)
    thread.start()
    try:
        yield found
    finally:
        ended.set()
        thread.join()
    if samples:  # a shard may be done before the first look
        found["gpu_busy"] = sum(samples) / len(samples) / 100
    found["gpu_peak_memory_gib"] = torch.cuda.max_memory_allocated(device) / 2**30


@lru_cache
def _warn(device: str, reason: str) -> None:
    """Once a process, not once a shard."""
    logger.warning("how busy %s is cannot be told: %s", device, reason)
