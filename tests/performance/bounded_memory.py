"""Whether memory grows with the number of photographs: `python tests/performance/bounded_memory.py --images FOLDER`.

The photographs of the folder (any layout; JPEG or PNG) are repeated by hard links, a person each, until there are as
many as asked for, and `python -m jobs.oodface corrupt` catalogues, aligns and spoils them all. Twice a second the
memory of its processes is read, what they share divided among them (PSS). Records the peak of each kind of process, and
by how much the machine's shared memory grew, where Ray's object store keeps decoded shards (nothing else may use it).
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from itertools import cycle, islice
from pathlib import Path

import psutil

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from cluster.report import machine, read_json, write_json  # noqa: E402
from cluster.tracking import git_commit  # noqa: E402

EVERY_S = 0.5
SUFFIXES = (".jpg", ".jpeg", ".png")
PER_FOLDER = 1000  # persons: a file system slows down with too many entries in one folder
SETTINGS = {
    "oodface.layout": "folder",
    "oodface.scenarios": "[brightness]",
    "oodface.severities": "[3]",
    "oodface.clean": "false",
}


def main() -> None:
    """Runs once a count and writes the record."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--images", type=Path, required=True)
    parser.add_argument("--counts", type=int, nargs="+", default=[2_000, 8_000, 32_000])
    parser.add_argument("--folder", type=Path, default=Path("results/bounded_memory"))
    parser.add_argument("--out", type=Path, default=Path(__file__).with_suffix(".json"))
    arguments = parser.parse_args()
    folder = arguments.folder.resolve()
    shutil.copytree(arguments.images, folder / "originals", dirs_exist_ok=True)  # no hard links between file systems
    originals = sorted(path for path in (folder / "originals").rglob("*") if path.suffix.lower() in SUFFIXES)
    told = ["python", "tests/performance/bounded_memory.py", "--images", arguments.images.name]
    told += ["--counts", *map(str, arguments.counts)]
    record = {"command": " ".join(told), "machine": machine(), "commit": git_commit(ROOT), "runs": {}}
    for count in arguments.counts:
        images, out = folder / f"images-{count}", folder / f"corrupted-{count}"
        for left in (images, out):
            shutil.rmtree(left, ignore_errors=True)
        repeat(originals, count, images)
        record["runs"][str(count)] = run(images, out)
        print(json.dumps({count: record["runs"][str(count)]}), flush=True)
        for used in (images, out):
            shutil.rmtree(used)
    print(write_json(record, arguments.out))


def repeat(originals: list[Path], count: int, folder: Path) -> None:
    """`count` names for the photographs, each of a person of its own."""
    for index, path in enumerate(islice(cycle(originals), count)):
        person = folder / f"{index // PER_FOLDER:05d}" / f"P{index:07d}"
        person.mkdir(parents=True)
        os.link(path, person / f"P{index:07d}_0001{path.suffix}")


def run(images: Path, out: Path) -> dict:
    """Peaks in GiB by kind of process, seconds, and what came out."""
    settings = {"oodface.images": images, **SETTINGS}
    sets = [part for key, value in settings.items() for part in ("--set", f"{key}={value}")]
    command = [sys.executable, "-m", "jobs.oodface", "corrupt", "--profile", "laptop", *sets, "--out", str(out)]
    start, peaks, before = time.perf_counter(), {}, psutil.virtual_memory().shared
    job = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL)
    while job.poll() is None:
        held: dict[str, int] = {}
        for kind, size in processes(job.pid):
            held[kind] = held.get(kind, 0) + size
        held["together"] = sum(held.values())
        held["object store"] = psutil.virtual_memory().shared - before  # counted above too, with those who read it
        peaks = {kind: max(peaks.get(kind, 0), held.get(kind, 0)) for kind in peaks | held}
        time.sleep(EVERY_S)
    if job.returncode:
        raise SystemExit(f"the job ended with status {job.returncode}")
    report = read_json(out / "report.json")
    return {
        "seconds": round(time.perf_counter() - start, 1),
        "peak_gib": {kind: round(size / 2**30, 2) for kind, size in sorted(peaks.items())},
        "work": report["work"],
    }


def processes(root: int) -> Iterator[tuple[str, int]]:
    """Kind and memory in bytes of the process and all below it that can be read."""
    try:
        tree = [psutil.Process(root), *psutil.Process(root).children(recursive=True)]
    except psutil.NoSuchProcess:
        return
    for process in tree:
        try:
            yield kind_of(process, root), process.memory_full_info().pss
        except psutil.Error:
            continue


def kind_of(process: psutil.Process, root: int) -> str:
    """What a process is to a job."""
    if process.pid == root:
        return "driver"
    line = " ".join(process.cmdline())
    if "java" in process.name():
        return "Spark"
    if "pyspark" in line:
        return "Spark's Python workers"
    return "Ray's workers" if line.startswith("ray::") else "Ray itself"


if __name__ == "__main__":
    main()
