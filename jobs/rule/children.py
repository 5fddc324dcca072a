"""The runs of a comparison: each an ordinary run in a process of its own, as many at once as the cluster has room for.

Entries share the original's answers and stage 1 (`jobs.rule.shared`).
"""

import ctypes
import os
import re
import signal
import subprocess
import sys
import threading
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import yaml

from cluster import session
from cluster.config import ENVIRONMENT_PREFIX, STORAGE_VARIABLE
from cluster.errors import JobFailure
from jobs.rule import job, stages
from jobs.rule.config import RuleConfig
from jobs.rule.entries import Entry

PROGRESS = re.compile(r"step \d+/\d+|evaluation[ :]|error: ")
WORKER = re.compile(r"^\x1b\[\d+m\([^)]*\)\x1b\[0m ")  # how Ray begins a line of a worker
END_GRACE_S = 60
PR_SET_PDEATHSIG = 1  # linux/prctl.h
_PRCTL = ctypes.CDLL(None).prctl  # found now: after a fork nothing may be loaded


class Processes:
    """The runs of this comparison; once it ends, those that still run are ended and none starts any more."""

    def __init__(self) -> None:
        self._running: list[subprocess.Popen] = []
        self._turn = threading.Lock()
        self._ended = False

    def start(self, command: list[str], environment: dict[str, str]) -> subprocess.Popen:
        """Starts a run whose two outputs are one stream of lines.

        Raises:
            JobFailure: the comparison has ended.
        """
        with self._turn:
            if self._ended:
                raise JobFailure("the comparison was ended")
            process = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                encoding="utf-8",
                errors="replace",
                env=environment,
                start_new_session=True,
                preexec_fn=_end_with_parent,
            )
            self._running.append(process)
        return process

    def end(self) -> None:
        """As on Ctrl-C: each run frees its workers and can be continued."""
        with self._turn:
            self._ended = True
            left = [process for process in self._running if process.poll() is None]
        for process in left:
            process.terminate()
        for process in left:
            try:
                process.wait(END_GRACE_S)
            except subprocess.TimeoutExpired:
                process.kill()


def _end_with_parent() -> None:
    # A killed driver cannot end its runs, and they would hold their folders against the next one.
    _PRCTL(PR_SET_PDEATHSIG, signal.SIGTERM)


def trained(own: Mapping[Entry, job.Run], shared: Path) -> dict[str, str]:
    """Runs every entry without a report, a process each; returns why entries failed."""
    import ray

    if not own:
        return {}
    address = ray.get_runtime_context().gcs_address
    processes = Processes()
    slots = stages.slots(own.values())
    with ThreadPoolExecutor(min(slots, len(own))) as pool:
        try:
            results = list(pool.map(lambda entry: _run(entry, own[entry], shared, address, processes), own))
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            processes.end()
            raise
    return {entry.name: why for entry, why in zip(own, results, strict=True) if why is not None}


def _run(entry: Entry, own: job.Run, shared: Path, address: str, processes: Processes) -> str | None:
    """Trains and evaluates one entry unless that is done; returns what it said where it failed."""
    folder = own.folder
    if (folder / "report.json").exists():
        print(f"[{entry.name}] is finished", flush=True)
        return None
    file, log_path = beside(folder, ".yaml"), beside(folder, ".log")
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(yaml.safe_dump(settings(entry, own, address)), encoding="utf-8")
    command = [sys.executable, "-m", "jobs.rule", "run", "--shared", str(shared)]
    command += ["--config", str(file), "--out", str(folder)]
    last = ""
    with log_path.open("w", encoding="utf-8") as log:
        process = processes.start(command, environment(own.config))
        for line in process.stdout:
            log.write(line)
            log.flush()
            last = line.strip() or last
            if PROGRESS.search(line):
                print(f"[{entry.name}] {WORKER.sub('', line).rstrip()}", flush=True)
        status = process.wait()
    return None if status == 0 else f"{last.removeprefix('error: ')} (exit status {status}; {log_path})"


def settings(entry: Entry, own: job.Run, address: str) -> dict[str, Any]:
    """The whole configuration of an entry's run: on this cluster, and its model registered under a name of its own."""
    config = own.config
    registered = config.tracking.register_as or job.registered_name(own)
    parts = {
        "cluster": {"address": address, "storage": str(session.storage(config))},
        "tracking": {"register_as": f"{registered}-{entry.slug}", "uri": None},  # `environment` has it
    }
    changed = {name: getattr(config, name).model_copy(update=values) for name, values in parts.items()}
    return config.model_copy(update=changed).model_dump()


def environment(config: RuleConfig) -> dict[str, str]:
    """This process's, less what stands in the run's file, with the tracking address, which may hold a password."""
    outer = (ENVIRONMENT_PREFIX, STORAGE_VARIABLE)
    kept = {name: value for name, value in os.environ.items() if not name.startswith(outer)}
    return kept | ({"MLFLOW_TRACKING_URI": config.tracking.uri} if config.tracking.uri else {})


def beside(folder: Path, suffix: str) -> Path:
    """A file beside a run's folder; a learning rate has a dot, so that this is not `Path.with_suffix`."""
    return folder.with_name(f"{folder.name}{suffix}")
