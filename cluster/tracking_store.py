"""Reaching an MLflow store: its address, its first use by several processes, and its failures told in one sentence."""

from __future__ import annotations

import base64
import contextlib
import http.client
import logging
import os
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from cluster.errors import JobFailure, TryAgain, UserError, without_credentials

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities import Experiment


def sqlite_file(uri: str) -> Path | None:
    """The database file of a sqlite:/// address, None for any other store."""
    return Path(uri.removeprefix("sqlite:///")).resolve() if uri.startswith("sqlite:///") else None


def connect(uri: str, storage: Path | None) -> tuple[MlflowClient, Path | None]:
    """A client of the store, and its storage folder (a SQLite store's own folder, else the one given).

    Raises UserError naming the address where no store can be opened or no server answers within 10 s.
    """
    _prepare_mlflow()
    from mlflow import MlflowClient

    database = sqlite_file(uri)
    if database is not None:
        try:
            database.parent.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(
                f"tracking store {uri} cannot be opened ({error.strerror}); name a folder that you can write to"
            ) from error
        storage = database.parent
    elif uri.startswith(("http://", "https://")):
        _require_server(uri)
    with first_use(database), explained(uri, "cannot be opened", UserError):
        # Both addresses, or else the registry would follow MLflow's global setting.
        return MlflowClient(tracking_uri=uri, registry_uri=uri), storage


def _prepare_mlflow() -> None:
    """Keep MLflow's own lines off the console and its waits short; before its first import, which reads some of it."""
    os.environ.setdefault("MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT", "true")
    os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "3")
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "30")
    import mlflow  # noqa: F401  (its import sets its loggers to INFO, so they are quietened after it)

    for name in ("mlflow", "alembic"):
        logging.getLogger(name).setLevel(logging.WARNING)


def experiment_named(client: MlflowClient, name: str, storage: Path | None) -> Experiment:
    """The experiment, created where it is missing, with its artifacts in `storage/mlartifacts/NAME` if that is given.

    The location is a file address even when a server on this machine creates it: an address behind the server could
    not be read without the server.
    """
    if client.get_experiment_by_name(name) is None:
        location = (storage.resolve() / "mlartifacts" / name).as_uri() if storage else None
        with already_there():
            client.create_experiment(name, artifact_location=location)
    return client.get_experiment_by_name(name)


@contextlib.contextmanager
def already_there() -> Iterator[None]:
    """Let a creation pass that another process, or an earlier attempt of this job, has done already."""
    from mlflow.exceptions import MlflowException

    try:
        yield
    except MlflowException as error:
        if error.error_code != "RESOURCE_ALREADY_EXISTS":
            raise


@contextlib.contextmanager
def explained(uri: str, event: str, kind: type[Exception] = TryAgain) -> Iterator[None]:
    """Turn a store's failure (refused entry, lost server, full disk) into one sentence of the given kind."""
    from mlflow.exceptions import MlflowException
    from sqlalchemy.exc import SQLAlchemyError

    try:
        yield
    except (MlflowException, SQLAlchemyError, OSError) as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        told = f"tracking store {uri} {event} ({reason}); see that it answers and that its disk has room, "
        # what it was raised from is logged by Ray Train, address and password included
        raise kind(f"{without_credentials(told)}then repeat the command") from None


@contextlib.contextmanager
def first_use(database: Path | None) -> Iterator[None]:
    """Let one process at a time create the tables and the experiments of a SQLite store."""
    if database is None:
        yield
        return
    from filelock import FileLock, Timeout

    lock = FileLock(f"{database}.lock", timeout=120)
    try:
        lock.acquire()
    except Timeout as error:
        raise JobFailure(
            f"this job waited 120 s for another one to set up {database}; "
            f"end that job, or delete {database}.lock if none is left"
        ) from error
    except OSError as error:
        raise UserError(
            f"tracking store {database} cannot be locked ({error.strerror}); name a folder that you can write to"
        ) from error
    try:
        yield
    finally:
        lock.release()


def healthy(uri: str) -> bool:
    """Whether the loopback server's /health answers 200 within 2 s."""
    # A proxy from the environment must not be asked for loopback.
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    try:
        with opener.open(f"{uri.rstrip('/')}/health", timeout=2) as answer:
            return answer.status == 200
    except OSError:
        return False


def _require_server(uri: str) -> None:
    try:
        parts = urllib.parse.urlsplit(uri)
        # urllib would take user and password for a part of the host's name
        bare = parts._replace(netloc=parts.netloc.rpartition("@")[2])
        request = urllib.request.Request(f"{bare.geturl().rstrip('/')}/health")
        if parts.username is not None:
            login = ":".join(map(urllib.parse.unquote, (parts.username, parts.password or "")))
            request.add_header("Authorization", f"Basic {base64.b64encode(login.encode()).decode()}")
        with urllib.request.urlopen(request, timeout=10):
            return
    except urllib.error.HTTPError:
        return
    except (OSError, ValueError, http.client.HTTPException) as error:
        reason = getattr(error, "reason", error)
        raise UserError(
            f"tracking server {without_credentials(uri)} does not answer ({reason}); start it with `make up`, or leave "
            "the tracking address out to write to the storage path"
        ) from None
