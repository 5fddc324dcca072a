"""The ways in which a job can end badly."""

import re
from collections.abc import Iterator
from contextlib import contextmanager

_USER_INFO = re.compile(r"://[^/\s]+@")


def without_credentials(text: str) -> str:
    """The text with "***" for the user and password of each address in it (https://user:password@host)."""
    return _USER_INFO.sub("://***@", text)


class UserError(Exception):
    """A mistake its author can mend: one sentence naming the value, the place and the remedy. Exit status 2."""


class JobFailure(Exception):
    """A failure of the job itself, told as its root cause in one sentence. Exit status 1."""


class Diverged(JobFailure):
    """A training whose numbers are none any more: it comes to that again however often it is restarted."""


class TryAgain(JobFailure):
    """No fault of what was asked for, and not for ever: a full cluster or disk, a tracking store that is silent."""


@contextmanager
def paths_named() -> Iterator[None]:
    """Before a job runs, a path that the file system refuses is one that the user can mend.

    Raises:
        UserError: in place of an OSError that names a file, and of what pathlib says of a home that is not known.
    """
    try:
        yield
    except OSError as error:
        if error.filename is None:
            raise
        path = str(error.filename)
        shown = path if len(path) <= 300 else f"{path[:297]}..."
        raise UserError(f"{shown} cannot be used: {error.strerror}; check the path and its permissions") from error
    except RuntimeError as error:
        if "home directory" not in str(error):  # what pathlib says of ~NAME
            raise
        raise UserError(f"a path begins with ~, and no such home directory is known ({error}); write it out") from error
