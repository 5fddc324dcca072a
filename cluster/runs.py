"""A job's run: a folder that one driver at a time works in, and what survives the driver."""

import os
import shutil
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from cluster import session
from cluster.config import Config
from cluster.errors import UserError, paths_named, without_credentials
from cluster.report import machine, read_json, write_json
from cluster.tracking import Tracker, commit, default_uri, masked, masked_command

STATE, REPORT = "state.json", "report.json"
UNPUBLISHED = ".report-"
CLEARED = ".cleared-"


class Run:
    """What a system's own run adds its data to; `state` is what `state.json` in its folder holds.

    state["identity"] is the digest of all that decides the run's result; it is there from the beginning.
    """

    config: Config
    folder: Path
    command: str
    state: dict[str, Any]

    def save(self, **news: Any) -> None:
        """Adds to the state and writes it."""
        self.state |= news
        write_json(self.state, self.folder / STATE)

    @contextmanager
    def phase(self, name: str, goes_on: bool = False) -> Iterator[None]:
        """Times a phase, with what attempts had spent on it that were broken off.

        One that `goes_on` takes up what it had done, so that its times add up; of another one that is done again the
        last time counts.
        """
        start = time.perf_counter()

        def spent() -> float:
            before = self.state.get("broken_off", {}).get(name, 0.0)
            return round(before + time.perf_counter() - start, 2)

        try:
            yield
        except BaseException:
            if (self.folder / STATE).exists():  # else it is no run yet, and its folder stays as it is
                with suppress(OSError):  # a full disk is told by who met it first
                    self.save(broken_off=self.state.get("broken_off", {}) | {name: spent()})
            raise
        known = self.state.get("seconds", {})
        total = spent() + (known.get(name, 0.0) if goes_on else 0.0)
        others = {phase: seconds for phase, seconds in self.state.get("broken_off", {}).items() if phase != name}
        self.save(seconds=known | {name: round(total, 2)}, broken_off=others)


def claim(run: Run, fresh: bool) -> None:
    """Takes up what an earlier driver of the same run left in its folder, or clears it where `fresh` says so.

    Raises:
        UserError: the folder holds something else; nothing is touched then.
    """
    folder, identity = run.folder, run.state["identity"]
    found = read_json(folder / STATE)
    state = found if isinstance(found, dict) and "identity" in found else {}
    if not state and folder.exists() and any(not path.name.startswith(f".{STATE}.") for path in folder.iterdir()):
        raise UserError(f"--out {folder} holds other things than a run; name a new or empty folder")
    if fresh:
        with exclusively(folder):
            _clear(folder)
    elif state and state["identity"] != identity:
        raise UserError(f"{folder} holds a run of another configuration; take another --out, or --fresh to replace it")
    else:
        run.state |= state


def _clear(folder: Path) -> None:
    for leftover in folder.parent.glob(f".{folder.name}{CLEARED}*"):  # of a driver that was killed as it cleared
        shutil.rmtree(leftover, ignore_errors=True)
    if not folder.exists():
        return
    moved = Path(tempfile.mkdtemp(dir=folder.parent, prefix=f".{folder.name}{CLEARED}"))
    try:
        folder.rename(moved)  # at once: what is cleared by halves would be nobody's run
    except OSError:  # a mount point stays where it is
        moved.rmdir()
        for path in sorted(folder.iterdir(), key=lambda path: path.name == STATE):
            shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()
    else:
        shutil.rmtree(moved, ignore_errors=True)


def is_finished(run: Run) -> bool:
    """Whether the run's folder holds its report."""
    state = read_json(run.folder / STATE)
    mine = isinstance(state, dict) and state.get("identity") == run.state["identity"]
    return mine and (run.folder / REPORT).exists()


@contextmanager
def exclusively(folder: Path, wait_s: float = 0) -> Iterator[None]:
    """No two drivers in one folder; the other one has `wait_s` seconds to leave."""
    from filelock import FileLock, Timeout

    lock = FileLock(folder.parent / f".{folder.name}.lock")
    with paths_named():
        folder.parent.mkdir(parents=True, exist_ok=True)
        try:
            lock.acquire(timeout=wait_s)
        except Timeout:
            raise UserError(f"another job is working in {folder}; wait for it, or take another --out") from None
    try:
        yield
    finally:
        lock.release()


@contextmanager
def tracked(
    run: Run, name: str, parameters: Mapping[str, Any], tags: Mapping[str, str], parent: str | None = None
) -> Iterator[Tracker]:
    """The job's MLflow run: a new one, or the one that an earlier driver of this run began; a child of `parent`."""
    tracking, storage = run.config.tracking, session.storage(run.config)
    own = default_uri(storage)
    uri = tracking.uri or os.environ.get("MLFLOW_TRACKING_URI") or own
    with Tracker.open(
        uri,
        tracking.experiment,
        f"{name}-{run.folder.name}",
        parameters,
        dict(tags) | ({"mlflow.parentRunId": parent} if parent else {}),
        run.state.get("mlflow_run_id"),
        storage if uri == own else None,
    ) as tracker:
        with paths_named():
            run.save(mlflow_run_id=tracker.run_id, tracking_uri=without_credentials(uri))
        yield tracker


def publish(content: Mapping[str, Any], folder: Path, tracker: Tracker) -> Path:
    """Puts report.json into a run's folder, where it says that the run is finished: once the tracking server has it."""
    for leftover in folder.glob(f"{UNPUBLISHED}*"):  # of a driver that was killed
        shutil.rmtree(leftover, ignore_errors=True)
    with tempfile.TemporaryDirectory(dir=folder, prefix=UNPUBLISHED) as place:
        path = write_json(content, Path(place) / REPORT)
        tracker.artifact(path)
        os.replace(path, folder / REPORT)
    return folder / REPORT


def provenance(run: Run, tracker: Tracker, packages: Sequence[str]) -> dict[str, Any]:
    """What made a report; `packages` are those whose version can change a figure."""
    from importlib.metadata import version

    return {
        "command": masked_command(run.command),
        "configuration": masked(run.config.model_dump()),
        "machine": machine(),
        "commit": commit(),
        "mlflow": {"uri": without_credentials(tracker.uri), "run_id": tracker.run_id},
        "versions": {name: version(name) for name in packages},
    }
