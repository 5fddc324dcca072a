"""RULE on a disk that fills up while it saves, and the same command once there is room again."""

from __future__ import annotations

import contextlib
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.e2e import commands
from tests.e2e.commands import last_step, run_folder, wait
from tests.e2e.test_rule_faults import SAVING_EACH_STEP, assert_same_trajectory

pytestmark = pytest.mark.timeout(1200)


@pytest.fixture
def small_disk(tmp_path) -> Iterator[Path]:
    """A file system of its own, 64 MiB in memory."""
    folder = tmp_path / "disk"
    folder.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=64m", "tmpfs", str(folder)]
    if shutil.which("mount") is None or subprocess.run(command, check=False).returncode:
        pytest.skip("mounting a file system needs root")
    yield folder
    subprocess.run(["umount", folder], check=True)


def fill(path: Path) -> None:
    """Writes until the disk is full."""
    with contextlib.suppress(OSError), path.open("wb", buffering=0) as file:
        while True:
            file.write(b"0" * 2**16)
    assert shutil.disk_usage(path.parent).free == 0


@pytest.mark.slow
def test_a_full_disk_is_told_and_costs_no_checkpoint(world, finished, small_disk, tmp_path):
    storage = tmp_path / "storage"
    storage.mkdir()
    (storage / "rule").symlink_to(small_disk)
    command = ["run", *commands.settings(world, SAVING_EACH_STEP | {"train.max_failures": 1})]
    running = commands.start_rule(storage, *command)
    try:
        wait(lambda: last_step(storage, "rebo") >= 4, "stage 2", 200)
        filler = small_disk / "filler"
        fill(filler)
        ended = running.finish()
    finally:
        running.kill()
    assert ended.returncode == 1
    last = ended.stderr.strip().splitlines()[-1]
    assert last.startswith("error: ")
    assert "No space left" in last
    folder = run_folder(storage)
    assert not (folder / "model").exists()
    assert not (folder / "report.json").exists()
    reached = last_step(storage, "rebo")
    assert reached >= 4

    filler.unlink()
    again = commands.start_rule(storage, *command)
    lowest = reached
    try:

        def went_on() -> bool:
            nonlocal lowest
            lowest = min(lowest, last_step(storage, "rebo"))
            return last_step(storage, "rebo") > lowest or again.process.poll() is not None

        wait(went_on, "stage 2 to go on", 200)
        resumed = again.finish()
    finally:
        again.kill()
    assert resumed.returncode == 0, resumed.stderr[-4000:]
    assert lowest >= reached - 3
    assert_same_trajectory(storage, finished.storage)
