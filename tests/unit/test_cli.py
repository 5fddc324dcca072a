"""How a command line ends: exit status, and one last line that says why."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import typer

from cluster import cli
from cluster.errors import JobFailure, UserError

ROOT = Path(__file__).parents[2]
PROGRAM = """
import sys, time, typer
from cluster.cli import *
app = typer.Typer()

@app.command()
def run():
    try:
        print("started", flush=True)
        time.sleep(60)
    finally:
        print("freed", flush=True)

@app.command()
def other(): ...

sys.exit(main(app))
"""


@pytest.fixture
def run(capsys):
    """Runs a command that raises the given error; returns status, stdout, stderr."""
    handler = signal.getsignal(signal.SIGTERM)

    def call(error: BaseException | None) -> tuple[int, str, str]:
        app = typer.Typer()

        @app.command()
        def command() -> None:
            if error is not None:
                raise error

        status = cli.main(app, [])
        return status, *capsys.readouterr()

    yield call
    signal.signal(signal.SIGTERM, handler)


class Wrapped(Exception):
    """As Ray wraps: the cause is an attribute."""

    def __init__(self, **attributes) -> None:
        super().__init__("Traceback (most recent call last): ...")
        vars(self).update(attributes)


def test_a_good_end_is_0(run):
    assert run(None) == (0, "", "")


def test_a_users_error_is_one_line_and_2(run):
    assert run(UserError("rule.data = x is no folder; name one")) == (
        2,
        "",
        "error: rule.data = x is no folder; name one\n",
    )


def test_no_password_in_an_address_is_told(run):
    _, _, told = run(UserError("--set tracking.url=https://me:secret@host/v1: unknown key tracking.url"))
    assert told == "error: --set tracking.url=https://***@host/v1: unknown key tracking.url\n"


def test_a_job_failure_is_one_line_and_1(run):
    assert run(JobFailure("the disk is full")) == (1, "", "error: the disk is full\n")


def test_anything_else_shows_its_traceback_and_the_root_cause_last(run):
    error = RuntimeError("outer")
    error.__cause__ = ValueError("inner\nwith details")
    status, _, shown = run(error)
    assert status == 1
    assert "Traceback" in shown
    assert shown.splitlines()[-1] == "error: ValueError: inner"


@pytest.mark.parametrize(
    "error",
    [
        Wrapped(cause=UserError("mend it")),
        Wrapped(
            worker_failures={0: Wrapped(_base_exc=ValueError("peer lost")), 1: Wrapped(_base_exc=UserError("mend it"))}
        ),
        Wrapped(controller_failure=Wrapped(health_check_failure=UserError("mend it"))),
    ],
)
def test_a_users_error_is_found_inside_what_ray_wraps_around_it(run, error):
    assert run(error) == (2, "", "error: mend it\n")


def test_what_a_users_error_was_raised_from_is_not_its_cause():
    error = UserError("mend it")
    error.__cause__ = KeyError("detail")
    assert cli.root_cause(error) is error


def test_a_real_ray_task_error_is_seen_through():
    from ray.exceptions import RayTaskError

    wrapped = RayTaskError("work", "Traceback ...", UserError("mend it")).as_instanceof_cause()
    assert str(cli.root_cause(wrapped)) == "mend it"


def test_wrong_usage_is_2(run, capsys):
    app = typer.Typer()
    app.command()(lambda: None)
    assert cli.main(app, ["--unknown"]) == 2
    assert "--unknown" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("number", "status", "word"), [(signal.SIGINT, 130, "interrupted"), (signal.SIGTERM, 143, "terminated")]
)
def test_a_signal_ends_it_with_everything_freed(number, status, word):
    program = subprocess.Popen(
        [sys.executable, "-c", PROGRAM, "run"],
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        assert program.stdout.readline() == "started\n"
        program.send_signal(number)
        shown, told = program.communicate(timeout=30)
    finally:
        program.kill()
    assert program.returncode == status
    assert shown == "freed\n"
    assert told == f"{word}; run the same command again, without --fresh, to continue\n"


def test_the_shared_options(run):
    app = typer.Typer()
    seen = {}

    @app.command()
    def command(
        profile: cli.Profile = None,
        sets: cli.Set = None,
        files: cli.ConfigFile = None,
        out: cli.Out = None,
        fresh: cli.Fresh = False,
        dry_run: cli.DryRun = False,
    ) -> None:
        seen.update(locals())

    line = "--profile laptop --set a=1 --set b.c=2 --config x.yaml --out here --fresh --dry-run"
    assert cli.main(app, line.split()) == 0
    del seen["seen"]
    assert seen == {
        "profile": "laptop",
        "sets": ["a=1", "b.c=2"],
        "files": [Path("x.yaml")],
        "out": Path("here"),
        "fresh": True,
        "dry_run": True,
    }
