"""The command lines of the project as a user types them, and what a test needs to know of the processes they start."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import psutil

from cluster.processes import birth, free_port
from jobs.rule.world import SETTINGS, World

ROOT = Path(__file__).parents[2]
TIME_LIMIT_S = 400


def clean_environment() -> dict[str, str]:
    """This process's environment without settings of Ray, of the hub and of this project."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("RAY", "HF_"))}
    return kept | {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}


def cluster(*arguments: str, **environment: str) -> subprocess.CompletedProcess:
    """`python -m cluster` to its end."""
    return subprocess.run(
        [sys.executable, "-m", "cluster", *arguments],
        cwd=ROOT,
        env=clean_environment() | environment,
        capture_output=True,
        text=True,
        timeout=200,
        check=False,
    )


def free_ports() -> dict[str, int]:
    """A port for each server that `up` starts."""
    ports: dict[str, int] = {}
    for server in ("dashboard", "ray", "mlflow"):
        ports[server] = free_port(*ports.values())
    return ports


def options(storage: Path, ports: Mapping[str, int]) -> list[str]:
    """The options of `up` for a cluster of two CPUs that meets no other."""
    return ["--storage", str(storage), "--num-cpus", "2"] + [f"--{name}-port={port}" for name, port in ports.items()]


def wait(condition: Callable[[], bool], what: str, seconds: float = 60) -> None:
    """Returns once the condition holds; fails the test after `seconds`."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, f"waited {seconds} s for {what}"
        time.sleep(0.05)


def settings(world: World, changes: Mapping[str, object] = {}) -> list[str]:
    """`--set` options for a run in the tiny world."""
    values = SETTINGS | {"rule.model": world.model, "rule.data": world.data} | dict(changes)
    return [part for key, value in values.items() for part in ("--set", f"{key}={'null' if value is None else value}")]


def rule_command(*arguments: str) -> list[str]:
    """`python -m jobs.rule ...`."""
    return [sys.executable, "-m", "jobs.rule", *arguments]


def rule(storage: Path, *arguments: str) -> subprocess.CompletedProcess:
    """`python -m jobs.rule` to its end, with all results below `storage`."""
    started = start_rule(storage, *arguments)
    try:
        return started.finish()
    finally:
        started.kill()


@dataclass
class Running:
    """A driver in a process group of its own, as a terminal gives it one; its output goes to files."""

    process: subprocess.Popen
    output: Path
    errors: Path

    def finish(self, seconds: float = TIME_LIMIT_S) -> subprocess.CompletedProcess:
        """Waits for the end."""
        status = self.process.wait(seconds)
        return subprocess.CompletedProcess(
            self.process.args, status, self.output.read_text(encoding="utf-8"), self.errors.read_text(encoding="utf-8")
        )

    def descendants(self) -> list[psutil.Process]:
        """Every process below the driver: Ray's servers and workers."""
        try:
            return psutil.Process(self.process.pid).children(recursive=True)
        except psutil.NoSuchProcess:
            return []

    def training_workers(self) -> list[psutil.Process]:
        """The processes of Ray Train's workers."""
        return [process for process in self.descendants() if is_training_worker(process)]

    def interrupt(self) -> None:
        """Ctrl-C: the terminal sends it to the whole foreground group."""
        os.killpg(self.process.pid, signal.SIGINT)

    def kill(self) -> None:
        """Ends the driver and all below it, whatever state they are in."""
        below = self.descendants()
        for process in [*below, self.process]:
            try:
                process.kill()
            except psutil.NoSuchProcess:
                continue
        self.process.wait(30)


def start_rule(storage: Path, *arguments: str) -> Running:
    """`python -m jobs.rule`, not waited for."""
    return start(rule_command(*arguments), storage)


def start(command: Sequence[str], storage: Path) -> Running:
    """A command line, not waited for, with all results below `storage`."""
    storage.mkdir(parents=True, exist_ok=True)
    number = len(list(storage.glob("*.out")))
    output, errors = storage / f"{number}.out", storage / f"{number}.err"
    with output.open("wb") as out, errors.open("wb") as err:
        process = subprocess.Popen(
            command,
            cwd=ROOT,
            env=clean_environment() | {"RAYWARD_STORAGE": str(storage)},
            stdout=out,
            stderr=err,
            stdin=subprocess.DEVNULL,
            start_new_session=True,
        )
    return Running(process, output, errors)


def is_training_worker(process: psutil.Process) -> bool:
    """Whether Ray Train's worker runs in this process, as its title says."""
    try:
        return "RayTrainWorker" in " ".join(process.cmdline())
    except psutil.NoSuchProcess:
        return False


def alive(processes: Sequence[psutil.Process]) -> list[psutil.Process]:
    """Those that still run; a zombie does not."""
    return [process for process in processes if process.is_running() and birth(process.pid) is not None]


def run_folder(storage: Path) -> Path | None:
    """The folder of the one run below `storage`, None while there is none."""
    folders = [path.parent for path in (storage / "rule").glob("*/state.json")]
    return folders[0] if folders else None


def history(storage: Path, stage: str) -> list[dict]:
    """What a run below `storage` has recorded of a stage so far, a row a step."""
    folder = run_folder(storage)
    path = folder / "history.jsonl" if folder else None
    if path is None or not path.exists():
        return []
    rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    return [row for row in rows if row["stage"] == stage]


def last_step(storage: Path, stage: str) -> int:
    """The last step recorded of a stage, 0 before the first."""
    return max((row["step"] for row in history(storage, stage)), default=0)
