"""SIGTERM while Ray runs: everything is freed, however long that takes, and the status says what ended the job."""

from __future__ import annotations

import signal
import sys

import pytest

from tests.e2e import commands
from tests.e2e.commands import wait

PROGRAM = """
import sys, time
import typer
from cluster import session
from cluster.cli import main
from cluster.config import TrainingConfig, load

app = typer.Typer()

@app.command()
def run():
    config = load(TrainingConfig, sets=["train.cpus_per_worker=1"])
    session.prepare(config)
    with session.connected(config):
        try:
            print("started", flush=True)
            time.sleep(120)
        finally:
            time.sleep(4)
            print("freed", flush=True)

sys.exit(main(app))
"""


@pytest.mark.slow
def test_a_job_that_is_told_to_end_has_the_time_to_free_what_it_held(tmp_path):
    running = commands.start([sys.executable, "-c", PROGRAM], tmp_path)
    try:
        wait(lambda: "started" in running.output.read_text(encoding="utf-8"), "Ray to start", 100)
        running.process.send_signal(signal.SIGTERM)
        process = running.finish(60)
    finally:
        running.kill()
    assert process.returncode == 143, process.stderr[-4000:]
    assert process.stdout.endswith("freed\n")
    assert process.stderr.splitlines()[-1] == "terminated; run the same command again, without --fresh, to continue"
    assert "SIGTERM received" not in process.stderr
