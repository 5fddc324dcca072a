"""What a training on several workers shows and keeps while it runs; rank 0 writes it."""

import json
import logging
import shutil
import tempfile
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from safetensors import SafetensorError

from cluster.errors import JobFailure, TryAgain, UserError
from cluster.report import read_json, read_lines, write_json, write_lines

if TYPE_CHECKING:
    from cluster.tracking import Tracker

SCRATCH = ".trainer-"
NOTHING = 1 << 20  # bytes that are free on a full disk
FULL = ("No space left", "unexpected pos")  # the system's words of a full disk, and torch's: "unexpected pos 64 vs 0"
HISTORY = "history.jsonl"
SAMPLES = "training_samples.jsonl"
SILENCE_S = 60  # before a tracking store that did not answer is asked again

logger = logging.getLogger(__name__)


@dataclass
class Recorder:
    """What training shows while it runs: a line a step on the console, `history.jsonl`, and the job's MLflow run.

    Only rank 0 writes. Steps after the checkpoint that a resumed run starts from are dropped and written anew. A
    tracking store that falls silent holds up no training: it gets what it missed when it answers again.
    """

    stage: str
    folder: Path
    total_steps: int
    tracking_uri: str | None = None
    run_id: str | None = None
    _attached: "Tracker | None" = None
    _ask_again: float = 0.0

    @property
    def checkpoints(self) -> Path:
        """Where Ray Train keeps the stage's checkpoints until its model is there."""
        return self.folder / f"train-{self.stage}"

    @contextmanager
    def scratch(self) -> Iterator[str]:
        """A folder for the trainer's own checkpoints, for the block.

        It lies where the results do, whose disk the plan looks at; `fit` removes what a killed worker left of it.

        Raises:
            TryAgain: a checkpoint could not be written for want of room.
        """
        self.checkpoints.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=SCRATCH, dir=self.checkpoints, ignore_cleanup_errors=True) as folder:
            try:
                yield folder
            except (OSError, RuntimeError, SafetensorError) as error:
                # What was full may have room again: Ray Train removes old checkpoints meanwhile.
                said = any(words in str(error) for words in FULL)
                if not said and shutil.disk_usage(folder).free > NOTHING:
                    raise
                raise TryAgain(
                    f"No space left in {self.checkpoints} for a checkpoint; free some and run the same command again "
                    "to continue"
                ) from error

    def record(self, step: int, figures: dict[str, Any], samples: list[dict] = ()) -> None:
        """Adds `figures` to the row of `step`."""
        if rank() != 0:
            return
        rows = read_lines(self.folder / HISTORY)
        here = [row for row in rows if row["stage"] == self.stage and row["step"] == step]
        others = [row for row in rows if row not in here]
        present = here[0] if here else {"stage": self.stage, "step": step}
        self._write([*others, present | _nested(figures)])
        if samples:
            with (self.folder / SAMPLES).open("a", encoding="utf-8") as file:
                file.writelines(
                    json.dumps({"stage": self.stage, **sample}, ensure_ascii=False) + "\n" for sample in samples
                )
        shown = {key: value for key, value in figures.items() if isinstance(value, int | float) and "/" not in key}
        print(
            f"{self.stage} step {step}/{self.total_steps}  " + "  ".join(f"{k} {v:.3g}" for k, v in shown.items()),
            flush=True,
        )
        self._send(step, _numbers(figures))

    def catch_up(self) -> None:
        """Sends what the store missed of the stage, by its driver; a silent store is only warned of."""
        self._attached, self._ask_again = None, 0.0
        self._send(0, {})

    def rewind(self, step: int) -> None:
        """Forgets what was recorded of this stage after `step`."""
        if rank() == 0:
            for name in (HISTORY, SAMPLES):
                rows = read_lines(self.folder / name)
                self._write([row for row in rows if row["stage"] != self.stage or row["step"] <= step], name)

    def note_peak(self) -> None:
        """Keeps this worker's highest memory for the report, and that of its GPU."""
        import torch

        found = {"gib": peak_memory_gib()}
        if torch.cuda.is_available():
            found["gpu_gib"] = torch.cuda.max_memory_reserved() / 2**30
        rounded = {name: round(value, 2) for name, value in found.items()}
        write_json(rounded, self.folder / f"peak-{self.stage}.json")

    def _write(self, rows: list[dict], name: str = HISTORY) -> None:
        write_lines(rows, self.folder / name)

    def _send(self, step: int, numbers: Mapping[str, float]) -> None:
        if self.run_id is None or self.tracking_uri is None or time.monotonic() < self._ask_again:
            return
        from cluster.tracking import Tracker

        asked = time.monotonic()
        try:
            if self._attached is None:
                tracker = Tracker.attach(self.tracking_uri, self.run_id)
                for row in read_lines(self.folder / HISTORY):  # what it has is not sent twice
                    if row["stage"] == self.stage:
                        tracker.metrics(_numbers(_flat(row)), row["step"], self.stage)
                self._attached = tracker
            else:
                self._attached.metrics(numbers, step, self.stage)
        except (UserError, JobFailure) as error:
            now = time.monotonic()
            # a server that hangs takes minutes to say so
            self._attached, self._ask_again = None, now + max(SILENCE_S, 10 * (now - asked))
            logger.warning("training goes on without it, and its figures are sent later: %s", error)


def rank() -> int:
    """This worker's rank, 0 outside a process group."""
    import torch.distributed as dist

    return dist.get_rank() if dist.is_available() and dist.is_initialized() else 0


def peak_memory_gib() -> float:
    """Highest resident memory of this process so far, in GiB, less the pages of shared memory that it has now.

    Those are of Ray's object store: every process shows the ones that it ever read, the node holds them once. A lower
    bound where many were first read after the peak, but no less than what the process itself holds now.
    """
    import resource

    peak, now = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, _resident_kib()
    return max(peak - now.get("RssShmem", 0), now.get("RssAnon", 0) + now.get("RssFile", 0)) / 2**20


def _resident_kib() -> dict[str, int]:
    status = Path("/proc/self/status")  # of Linux; elsewhere the peak is told whole
    lines = status.read_text().splitlines() if status.exists() else []
    return {line.partition(":")[0]: int(line.split()[1]) for line in lines if line.startswith("Rss")}


def peaks(folder: Path, of: Literal["gib", "gpu_gib"] = "gib") -> dict[str, float]:
    """Highest memory of a training worker, or of its GPU, by stage, in GiB, as the recorders of a run noted it."""
    found = {path.stem.removeprefix("peak-"): read_json(path) for path in sorted(folder.glob("peak-*.json"))}
    return {stage: content[of] for stage, content in found.items() if content and of in content}


def _numbers(figures: Mapping[str, Any]) -> dict[str, float]:
    return {key: float(value) for key, value in figures.items() if isinstance(value, int | float) and key != "step"}


def _flat(row: Mapping[str, Any]) -> dict[str, Any]:
    """The reverse of `_nested`."""
    inner = {key: value for key, value in row.items() if isinstance(value, Mapping)}
    below = {f"{key}/{name}": value for key, values in inner.items() for name, value in values.items()}
    return {key: value for key, value in row.items() if key not in inner} | below


def _nested(figures: dict[str, Any]) -> dict[str, Any]:
    """ "seconds/rollout" becomes {"seconds": {"rollout": ...}}."""
    row: dict[str, Any] = {}
    for key, value in figures.items():
        head, slash, tail = key.partition("/")
        if slash:
            row.setdefault(head, {})[tail] = value
        else:
            row[key] = value
    return row
