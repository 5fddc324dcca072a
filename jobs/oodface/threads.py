"""What OpenCV computes image by image on processors, beside a GPU too: on several threads, for it lets others run."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

One = TypeVar("One")
Result = TypeVar("Result")

_pool: ThreadPoolExecutor | None = None


def use_threads(count: int) -> None:
    """How many threads `each` has in this process from now on; 1, as at first, is the caller's own."""
    global _pool
    replaced, _pool = _pool, ThreadPoolExecutor(count) if count > 1 else None
    if replaced is not None:
        replaced.shutdown(wait=False)


def _forget() -> None:
    global _pool
    _pool = None


# a forked child has the pool without its threads, and would wait for them for ever
os.register_at_fork(after_in_child=_forget)


def each(function: Callable[[One], Result], images: Iterable[One]) -> list[Result]:
    """The function of each image alone, in their order, so that nothing depends on the number of threads."""
    return list(map(function, images) if _pool is None else _pool.map(function, images))
