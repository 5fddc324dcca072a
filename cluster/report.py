"""`report.json`: what a job found, with intervals, digests and timings, written last and whole."""

import hashlib
import json
import os
import platform
import tempfile
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cluster.errors import UserError


@dataclass(frozen=True)
class Metric:
    """A score: its value, 95 % confidence interval, number of items and the seed of any resampling."""

    value: float
    ci95: tuple[float, float]
    n: int
    seed: int

    def to_json(self) -> dict:
        """The form that stands in `report.json`."""
        return {"value": self.value, "ci95": list(self.ci95), "n": self.n, "seed": self.seed}

    @classmethod
    def from_json(cls, content: Mapping[str, Any]) -> "Metric":
        """What `to_json` gave."""
        return cls(content["value"], tuple(content["ci95"]), content["n"], content["seed"])


def write_json(content: object, path: Path) -> Path:
    """Writes `content` to `path` as `write_text` does."""
    return write_text(json.dumps(content, indent=1, ensure_ascii=False) + "\n", path)


def write_lines(rows: Iterable[Mapping[str, Any]], path: Path) -> Path:
    """Writes a JSON Lines file as `write_text` does."""
    return write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), path)


def write_text(text: str, path: Path, mode: int = 0o644) -> Path:
    """Writes a file so that a reader sees the old one or the new one, never a part, even after power was cut.

    Before it has `mode` its owner alone can read it.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.chmod(temporary, mode)
        os.replace(temporary, path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise
    return path


def read_json(path: Path) -> dict | None:
    """The content of a file that `write_json` made, or None where there is none yet.

    Raises:
        UserError: the file is no JSON any more.
    """
    if not path.exists():
        return None
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise UserError(f"{path} is damaged ({error}); move it away and repeat the command") from None


def read_lines(path: Path) -> list[dict]:
    """The rows of a JSON Lines file; none where there is none yet.

    Lines end at a line feed only: texts may hold other separators (U+2028), which JSON leaves as they are. What stands
    behind the last one is a line that its writer did not finish, and is left out.

    Raises:
        UserError: a line is no JSON any more.
    """
    if not path.exists():
        return []
    *lines, _ = path.read_text("utf-8", errors="replace").split("\n")
    try:
        return [json.loads(line) for line in lines if line]
    except ValueError as error:
        raise UserError(f"{path} is damaged ({error}); move it away and repeat the command") from None


def digest(content: object) -> str:
    """First 16 hexadecimal digits of the SHA-256 of `content` as canonical JSON."""
    canonical = json.dumps(content, sort_keys=True, ensure_ascii=False, default=str)
    return hashlib.sha256(canonical.encode()).hexdigest()[:16]


def machine() -> dict:
    """The machine that made a figure: processor, cores and memory in GiB."""
    import psutil

    name = platform.processor() or platform.machine()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        lines = cpuinfo.read_text().splitlines()
        models = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
        name = models[0] if models else name
    return {
        "processor": name,
        "cores": psutil.cpu_count(),
        "memory_gib": round(psutil.virtual_memory().total / 2**30, 1),
    }
