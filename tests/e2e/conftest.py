"""What the end-to-end tests share: the tiny world, and one finished run in it."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path

import pytest
from filelock import FileLock

from jobs.rule import world as worlds
from jobs.rule import world_facts
from jobs.rule.world import World, build
from tests.e2e import commands


@pytest.fixture(scope="session")
def world(request, tmp_path_factory) -> World:
    """The tiny world, kept in pytest's cache until what makes it changes."""
    if not hasattr(request.config, "cache"):  # -p no:cacheprovider
        return build(tmp_path_factory.mktemp("world"))
    kept = request.config.cache.mkdir("rayward-world")
    folder, partial = kept / fingerprint(), kept / "partial"
    with FileLock(kept.with_suffix(".lock")):  # xdist's processes share the cache
        if not folder.exists():
            shutil.rmtree(kept)
            build(partial)
            partial.rename(folder)
    return World(folder / "model", folder / "gold", folder / "data")


def fingerprint() -> str:
    """What a kept world depends on: the code that makes it and the libraries that train it."""
    import torch
    import transformers

    content = b"".join(Path(module.__file__).read_bytes() for module in (worlds, world_facts))
    versions = f"{torch.__version__} {transformers.__version__}".encode()
    return hashlib.sha256(content + versions).hexdigest()[:16]


@dataclass(frozen=True)
class Finished:
    """A run that nothing disturbed."""

    storage: Path
    command: list[str]
    process: subprocess.CompletedProcess
    report: dict

    @property
    def folder(self) -> Path:
        return commands.run_folder(self.storage)


@pytest.fixture(scope="session")
def finished(world, tmp_path_factory) -> Finished:
    """`python -m jobs.rule run` in the tiny world, to its end; one for all of xdist's processes."""
    base = tmp_path_factory.getbasetemp()
    base = base.parent if "PYTEST_XDIST_WORKER" in os.environ else base
    storage, ended = base / "finished", base / "finished.json"
    command = ["run", *commands.settings(world)]
    with FileLock(base / "finished.lock"):
        if not ended.exists():
            shutil.rmtree(storage, ignore_errors=True)
            storage.mkdir()
            run = commands.rule(storage, *command)
            assert run.returncode == 0, run.stdout[-4000:] + run.stderr[-4000:]
            ended.write_text(json.dumps([run.stdout, run.stderr]))
    process = subprocess.CompletedProcess(command, 0, *json.loads(ended.read_text()))
    return Finished(storage, command, process, json.loads((commands.run_folder(storage) / "report.json").read_text()))
