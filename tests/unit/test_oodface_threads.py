"""Threads beside a worker, whatever becomes of its process."""

from __future__ import annotations

import multiprocessing
import threading

import pytest

from jobs.oodface import threads


@pytest.fixture(autouse=True)
def _alone():
    yield
    threads.use_threads(1)


def _doubled() -> None:
    assert threads.each(lambda one: 2 * one, range(8)) == list(range(0, 16, 2))


@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
def test_a_forked_child_does_not_wait_for_threads_that_it_has_not():
    threads.use_threads(4)
    together = threading.Barrier(4)  # so that all four have started: a pool with fewer starts more in the child
    threads.each(lambda _: together.wait(30), range(4))
    child = multiprocessing.get_context("fork").Process(target=_doubled)
    child.start()
    child.join(20)
    if child.is_alive():
        child.kill()
        child.join()
    assert child.exitcode == 0
    _doubled()  # the parent goes on with its own
    assert threads._pool is not None


def test_a_replaced_pool_ends():
    threads.use_threads(4)
    _doubled()
    replaced = threads._pool  # whose threads end by themselves only when nobody holds it any more
    threads.use_threads(2)
    for one in replaced._threads:
        one.join(10)
        assert not one.is_alive()
    _doubled()
