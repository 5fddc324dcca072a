"""One MLflow run for one job: parameters, metrics by step, tags, artifacts, registered models.

Only the job's driver opens a run; rank 0 of a training group may `Tracker.attach` to it. Nothing here touches MLflow's
global state (`mlflow.set_tracking_uri`, `mlflow.start_run`), so several runs can live in one process.
"""

from __future__ import annotations

import json
import logging
import os
import re
import shlex
import shutil
import subprocess
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any

import yaml

from cluster.errors import JobFailure, UserError
from cluster.processes import Session
from cluster.report import read_json
from cluster.tracking_store import (
    already_there,
    connect,
    experiment_named,
    explained,
    first_use,
    healthy,
    sqlite_file,
    without_credentials,
)

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities import Run

logger = logging.getLogger(__name__)

# Limits of MLflow's stores; a longer entry is refused or cut there, which would break the comparison on resume.
MAX_PARAM_LENGTH = 6000
MAX_TAG_LENGTH = 8000
MAX_KEY_LENGTH = 250
PARAMS_PER_BATCH = 100
METRICS_PER_BATCH = 1000

# "tokenizer" is no secret; numbers never are, so that max_new_tokens stays readable (see `masked`).
_SECRET_KEY = re.compile(r"token(?!iz)|key|secret|password|credential", re.IGNORECASE)
_ROOT = Path(__file__).resolve().parents[1]
_PICKLES = {".bin", ".pt", ".pth", ".pkl", ".pickle"}


def default_uri(storage: Path) -> str:
    """The tracking address of a storage folder: its running server, or else its SQLite file.

    `storage/cluster.json` (left by `make up`) names the server; it counts only while its process lives, here, and its
    /health answers within 2 s. The server listens on loopback, so ask on the node that will write.
    """
    storage = storage.resolve()
    record = read_json(storage / "cluster.json")
    server = record.get("mlflow") if isinstance(record, dict) else None
    uri = server.get("uri") if isinstance(server, dict) else None
    if isinstance(uri, str) and Session(server.get("pid", 0), server.get("born", "")).leads() and healthy(uri):
        return uri
    return f"sqlite:///{storage / 'mlflow.db'}"


def masked(value: Any, place: str = "") -> Any:
    """A configuration without its secrets: text under a key like *token*, *key*, *secret* becomes "***".

    `place` is the dotted path of `value`; a secret-like name anywhere on it counts. Credentials inside an address
    (https://user:password@host) are masked too.
    """
    if isinstance(value, Mapping):
        return {str(key): masked(entry, f"{place}.{key}") for key, entry in value.items()}
    if isinstance(value, list | tuple):
        return [masked(entry, place) for entry in value]
    if isinstance(value, str) and value:
        return "***" if _SECRET_KEY.search(place) else without_credentials(value)
    return value


def masked_command(command: str) -> str:
    """A command line as `masked` shows a configuration: what its `--set KEY=VALUE` tell of secrets is "***"."""
    parts = shlex.split(command)
    for place, part in enumerate(parts):
        option, _, assignment = part.rpartition("--set=")
        if not option and assignment != part:
            parts[place] = f"--set={_masked_assignment(assignment)}"
        elif place and parts[place - 1] == "--set":
            parts[place] = _masked_assignment(part)
        else:
            parts[place] = without_credentials(part)
    return shlex.join(parts)


def _masked_assignment(text: str) -> str:
    key, _, value = text.partition("=")
    try:
        told = yaml.safe_load(value)
    except yaml.YAMLError:
        told = value
    shown = masked(told, key)
    if shown == told:
        return text
    return f"{key}={shown if isinstance(shown, str) else json.dumps(shown, default=str)}"


def flattened(config: Mapping[str, Any], prefix: str = "") -> dict[str, str]:
    """Nested mappings as dotted keys with text values (lists and plain values as JSON), cut to MLflow's limits."""
    flat: dict[str, str] = {}
    for key, value in config.items():
        name = f"{prefix}{key}"
        if isinstance(value, Mapping) and value:
            flat |= flattened(value, f"{name}.")
        else:
            text = value if isinstance(value, str) else json.dumps(value, default=str)
            flat[_entity_key(name)] = text[:MAX_PARAM_LENGTH]
    return flat


def git_commit(root: Path) -> str | None:
    """The commit checked out in `root`, with "-dirty" after local changes; None outside a work tree or without git."""
    if not (root / ".git").exists():
        return None
    command = ["git", "-C", str(root), "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
    try:
        # Without optional locks git does not rewrite the index, so it cannot collide with the user's own git.
        answer = subprocess.run(
            command, capture_output=True, text=True, timeout=5, env=os.environ | {"GIT_OPTIONAL_LOCKS": "0"}
        )
    except (FileNotFoundError, subprocess.TimeoutExpired):
        return None
    return answer.stdout.strip() or None


def commit() -> str | None:
    """The commit of this code; a submitted job, whose copy has no history, knows it from `--metadata-json` alone."""
    return git_commit(_ROOT) or _submission().get("commit")


def submission_id() -> str | None:
    """The id that `ray job submit` gave this driver, None for a local run."""
    return _submission().get("job_submission_id")


def _submission() -> dict[str, str]:
    """Ray 2.60 has no public call for it; its job supervisor hands the driver this variable (dashboard/modules/job)."""
    return json.loads(os.environ.get("RAY_JOB_CONFIG_JSON_ENV_VAR") or "{}").get("metadata") or {}


class Tracker:
    """One MLflow run. Leaving its context ends it: FINISHED, FAILED on an exception, KILLED on an interrupt."""

    def __init__(self, client: MlflowClient, uri: str, run: Run, *, owner: bool, resumed: bool) -> None:
        self.uri = uri
        self.run_id: str = run.info.run_id
        self._client = client
        self._artifact_uri: str = run.info.artifact_uri
        self._owner = owner
        self._resumed = resumed
        self._status: str = run.info.status
        self._last_steps: dict[str, int] = {}

    @classmethod
    def open(
        cls,
        uri: str,
        experiment: str,
        run_name: str,
        config: Mapping[str, Any],
        tags: Mapping[str, str],
        run_id: str | None = None,
        storage: Path | None = None,
    ) -> Tracker:
        """Start a run, or continue `run_id`, and log the configuration and tags.

        `storage` is the folder whose server `uri` names (see `default_uri`); it places a new experiment's artifacts in
        `storage/mlartifacts`, where the SQLite file and the server find them alike. A SQLite address implies it; leave
        it out for a server elsewhere, which then keeps artifacts itself. Git commit and submission id are tagged here.

        Raises UserError where the store cannot be used, and where a continued run has another configuration.
        """
        client, storage = connect(uri, storage)
        database = sqlite_file(uri)
        with first_use(database), explained(uri, "cannot be opened", UserError):
            home = experiment_named(client, experiment, storage)
            if database is not None and home.artifact_location.startswith("mlflow-artifacts:"):
                raise UserError(
                    f"experiment {experiment!r} in {uri} keeps its artifacts behind an MLflow server; "
                    "start that server with `make up`, or track under another experiment name"
                )
            run = _resumable(client, run_id) if run_id else None
            resumed = run is not None
            if run is None:
                run = client.create_run(home.experiment_id, run_name=run_name)
        tracker = cls(client, uri, run, owner=True, resumed=resumed)
        tracker._describe(run, masked(config), tags)
        return tracker

    @classmethod
    def attach(cls, uri: str, run_id: str) -> Tracker:
        """A second writer (rank 0 of a training group) on a run that its driver opened and will end."""
        client, _ = connect(uri, None)
        with explained(uri, "cannot be opened", UserError):
            return cls(client, uri, client.get_run(run_id), owner=False, resumed=True)

    def __enter__(self) -> Tracker:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if not self._owner:
            return
        # A signal handler that ends the job (`ray job stop`) leaves by SystemExit, Ctrl-C by KeyboardInterrupt.
        stopped = kind is not None and issubclass(kind, KeyboardInterrupt | SystemExit)
        try:
            self.end("FINISHED" if kind is None else "KILLED" if stopped else "FAILED")
        except JobFailure as failure:
            if kind is None:
                raise
            logger.warning("%s", failure)

    def end(self, status: str) -> None:
        """Marks the run as FINISHED, KILLED or FAILED."""
        with explained(self.uri, f"did not take the run's end ({status})"):
            self._client.set_terminated(self.run_id, status=status)

    def ended_from_outside(self, status: str) -> None:
        """`end`, unless the run is marked so already: the first time is when it ended."""
        if self._status != status:
            self.end(status)

    def metrics(self, values: Mapping[str, float], step: int, stage: str = "") -> None:
        """Log values at `step` (from 0), under "stage/name". Steps that a name already has are left as they are.

        So a job that resumes from a checkpoint repeats the steps after it without logging any of them twice.
        """
        from mlflow.entities import Metric

        now = int(time.time() * 1000)
        named = {_entity_key(f"{stage}/{name}" if stage else name): value for name, value in values.items()}
        with explained(self.uri, f"did not take the metrics of step {step}"):
            new = [Metric(key, float(value), now, step) for key, value in named.items() if step > self._last_step(key)]
            for start in range(0, len(new), METRICS_PER_BATCH):
                self._client.log_batch(self.run_id, metrics=new[start : start + METRICS_PER_BATCH])
        self._last_steps |= {metric.key: step for metric in new}

    def artifact(self, path: Path, folder: str = "") -> None:
        """Copy one file into the run's artifacts, under `folder`."""
        with explained(self.uri, f"did not take the artifact {path}"):
            self._client.log_artifact(self.run_id, str(path), folder or None)

    def samples(self, rows: Sequence[Mapping[str, Any]], name: str) -> None:
        """Log rows of text (prompts, completions, scores) as samples/NAME.jsonl."""
        self._jsonl(rows, f"samples/{name}.jsonl")

    def table(self, rows: Sequence[Mapping[str, Any]], name: str) -> None:
        """Log the rows of a result table as tables/NAME.jsonl."""
        self._jsonl(rows, f"tables/{name}.jsonl")

    def model(self, folder: Path, name: str, alias: str) -> str:
        """Log a Hugging Face folder as models/ALIAS and register it as a version of `name` under `alias`.

        Returns the version. Called again in the same run (after a resume) it renews the files and keeps the version.
        Pickles in the folder (training_args.bin, optimiser states) are left out. "/" and ":" in `name` become "-".

        Where the run's artifacts lie on this machine the files are hard links, because MLflow would copy hundreds of
        megabytes, and a version that points at the result folder itself is refused by an MLflow server (its source has
        to lie in the run's artifacts) and would vanish with that folder. The link keeps the version alive when the
        folder is deleted; replace weights in `folder` by renaming new files over them, never by writing into them.

        Raises ValueError if the folder holds no safetensors file.
        """
        files = [path for path in sorted(folder.rglob("*")) if path.is_file() and path.suffix not in _PICKLES]
        if not any(path.suffix == ".safetensors" for path in files):
            raise ValueError(f"{folder} holds no safetensors file, so it is no model to register")
        name = re.sub(r"[/:]", "-", name)
        place = f"models/{alias}"
        with explained(self.uri, f"did not take the model {folder}"):
            root = _local_folder(self._artifact_uri)
            for path in files:
                inside = path.relative_to(folder)
                if root is None:
                    self._client.log_artifact(self.run_id, str(path), str(Path(place) / inside.parent))
                else:
                    _link(path.resolve(), root / place / inside)
            version = self._version(name, f"{self._artifact_uri}/{place}")
            self._client.set_registered_model_alias(name, alias, version)
        return version

    def _version(self, name: str, source: str) -> str:
        for known in self._client.search_model_versions(f"run_id='{self.run_id}'"):
            if (known.name, known.source) == (name, source):
                return str(known.version)
        with already_there():
            self._client.create_registered_model(name)
        return str(self._client.create_model_version(name, source, run_id=self.run_id).version)

    def _describe(self, run: Run, config: dict[str, Any], tags: Mapping[str, str]) -> None:
        from mlflow.entities import Param, RunTag

        params = flattened(config)
        logged = run.data.params
        for key in sorted(params.keys() & logged.keys()):
            if params[key] != logged[key]:
                raise UserError(
                    f"run {self.run_id} has {key}={logged[key]!r} and cannot be continued with {params[key]!r}; "
                    "restore that value, or start over with --fresh"
                )
        new = [Param(key, value) for key, value in params.items() if key not in logged]
        own = {"mlflow.source.git.commit": commit(), "ray.submission_id": submission_id()}
        every = {**tags, **{key: value for key, value in own.items() if value}}
        with explained(self.uri, "did not take the configuration"):
            if self._resumed:
                self._client.update_run(self.run_id, status="RUNNING")
            entries = [RunTag(key, str(value)[:MAX_TAG_LENGTH]) for key, value in every.items()]
            self._client.log_batch(self.run_id, tags=entries)
            for start in range(0, len(new), PARAMS_PER_BATCH):
                self._client.log_batch(self.run_id, params=new[start : start + PARAMS_PER_BATCH])
            self._client.log_dict(self.run_id, config, "config.yaml")

    def _last_step(self, key: str) -> int:
        if key not in self._last_steps:
            history = self._client.get_metric_history(self.run_id, key) if self._resumed else []
            self._last_steps[key] = max((metric.step for metric in history), default=-1)
        return self._last_steps[key]

    def _jsonl(self, rows: Sequence[Mapping[str, Any]], place: str) -> None:
        text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
        with explained(self.uri, f"did not take {place}"):
            self._client.log_text(self.run_id, text, place)


def _entity_key(name: str) -> str:
    # MLflow refuses other characters and what is no plain path, and would do so at the end of a long job.
    parts = [part for part in re.sub(r"[^\w\-. :/]", "_", name).split("/") if part not in ("", ".", "..")]
    return "/".join(parts)[:MAX_KEY_LENGTH]


def _local_folder(artifact_uri: str) -> Path | None:
    from mlflow.utils.file_utils import local_file_uri_to_path
    from mlflow.utils.uri import is_local_uri

    return Path(local_file_uri_to_path(artifact_uri)) if is_local_uri(artifact_uri) else None


def _link(source: Path, target: Path) -> None:
    if target.exists() and target.samefile(source):
        return
    target.parent.mkdir(parents=True, exist_ok=True)
    partial = target.with_name(f".{target.name}.{os.getpid()}")
    partial.unlink(missing_ok=True)
    try:
        try:
            os.link(source, partial)
        except OSError:
            # Another file system, or one without hard links.
            shutil.copy2(source, partial)
        os.replace(partial, target)
    finally:
        partial.unlink(missing_ok=True)


def _resumable(client: MlflowClient, run_id: str) -> Run | None:
    from mlflow.exceptions import MlflowException

    try:
        run = client.get_run(run_id)
    except MlflowException as error:
        if error.error_code != "RESOURCE_DOES_NOT_EXIST":
            raise
        run = None
    if run is None or run.info.lifecycle_stage != "active":
        # Hours of training must not be lost because their log was.
        logger.warning("run %s is no longer in the tracking store; the job goes on under a new run", run_id)
        return None
    return run
