"""What the command line of every job shares: its options, and how it ends."""

from __future__ import annotations

import signal
import sys
import traceback
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import typer

from cluster import processes
from cluster.errors import JobFailure, UserError, without_credentials

INTERRUPTED = 128 + signal.SIGINT
TERMINATED = 128 + signal.SIGTERM

Profile = Annotated[
    str | None,
    typer.Option("--profile", help="Values of this profile in ray_config.yaml, over its base values."),
]
Set = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="KEY=VALUE", help="Set one key, as in --set train.num_workers=2; may be repeated."),
]
ConfigFile = Annotated[
    list[Path] | None,
    typer.Option(
        "--config", metavar="FILE", help="YAML file laid over the profile; may be repeated, the last one wins."
    ),
]
Out = Annotated[
    Path | None,
    typer.Option(
        "--out",
        help="The job's folder; by default STORAGE/SYSTEM/DIGEST, or WHAT-DIGEST of other commands than run.",
    ),
]
Fresh = Annotated[bool, typer.Option("--fresh", help="Start over where an earlier run of this configuration stands.")]
DryRun = Annotated[bool, typer.Option("--dry-run", help="Check everything, print configuration and plan; run nothing.")]


def main(app: typer.Typer, arguments: Sequence[str] | None = None) -> int:
    """Runs a command line to its end, which is told in one last line on stderr.

    Args:
        app: the commands.
        arguments: without the program's name; those of this process by default.

    Returns: the exit status. 0: done; 1: the job failed; 2: the user can mend it (`UserError`, or wrong usage);
        130: interrupted; 143: ended by SIGTERM, after everything was freed as on an interrupt.
    """
    processes.leave_on_sigterm()
    try:
        app(arguments)
    except SystemExit as end:
        if end.code == INTERRUPTED:
            print("interrupted; run the same command again, without --fresh, to continue", file=sys.stderr)
        if end.code == signal.SIGTERM:
            print("terminated; run the same command again, without --fresh, to continue", file=sys.stderr)
            return TERMINATED
        return end.code if isinstance(end.code, int) else int(end.code is not None)
    except Exception as error:
        cause = root_cause(error)
        if not isinstance(cause, UserError | JobFailure):
            traceback.print_exception(error)
        print(f"error: {sentence(cause)}", file=sys.stderr)
        return 2 if isinstance(cause, UserError) else 1
    return 0


def root_cause(error: BaseException) -> BaseException:
    """The exception that others only wrap: Ray's task errors, Ray Train's failed workers, `raise ... from`.

    A `UserError` or `JobFailure` is a root cause whatever it was raised from.
    """
    while (inner := _inner(error)) is not None:
        error = inner
    return error


def _inner(error: BaseException) -> BaseException | None:
    # Told by their attributes, for Ray is not imported here: a wrong option must be told within a second.
    failed = getattr(error, "worker_failures", None)
    if failed:
        causes = [root_cause(failed[rank]) for rank in sorted(failed)]
        # where one worker fails, the others fail to reach it, and rank 0 may be one of those
        return next((cause for cause in causes if isinstance(cause, UserError | JobFailure)), causes[0])
    for name in ("controller_failure", "health_check_failure", "_base_exc", "cause"):
        inner = getattr(error, name, None)
        if isinstance(inner, BaseException):
            return inner
    return None if isinstance(error, UserError | JobFailure) else error.__cause__


def sentence(cause: BaseException) -> str:
    """What a root cause is told as: its own words, with the name of its kind where it is no error of ours.

    It stays in logs and reports, so that no password in an address is told.
    """
    message = without_credentials(str(cause).strip())
    if isinstance(cause, UserError | JobFailure):
        return message
    return f"{type(cause).__name__}: {message.splitlines()[0]}" if message else type(cause).__name__
