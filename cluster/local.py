"""A Ray head with its dashboard and an MLflow server on one machine, all on loopback: `up` starts, `down` ends them.

They run in process sessions of their own under the storage path, so `down` ends exactly them; no other Ray is touched.

    storage/cluster.json        what runs; absent when nothing does
    storage/cluster/            token, server logs, and Ray's logs of the last session
    storage/mlflow.db           the tracking store, which jobs write directly while no server runs
"""

from __future__ import annotations

import os
import secrets
import shlex
import socket
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from cluster import processes
from cluster.errors import JobFailure, UserError, paths_named
from cluster.processes import LOOPBACK, Session
from cluster.report import read_json, write_json, write_text

START_DEADLINE_S = 120.0
END_GRACE_S = 20.0


@dataclass(frozen=True)
class Ports:
    """The three ports that users meet; every other one is picked free."""

    dashboard: int = 8265
    ray: int = 6379
    mlflow: int = 5000


@dataclass(frozen=True)
class Token:
    """How clients authenticate: RAY_AUTH_MODE, and the token file when `up` rather than the caller's shell has it."""

    mode: str
    path: Path | None

    def export(self) -> str:
        """The shell line that lets a client in."""
        path = f" RAY_AUTH_TOKEN_PATH={shlex.quote(str(self.path))}" if self.path else ""
        return f"export RAY_AUTH_MODE={self.mode}{path}"


@dataclass(frozen=True)
class Local:
    """What runs under a storage path, as `cluster.json` says."""

    ray: Session
    mlflow: Session
    ports: Ports
    token: Token
    temp: Path

    @property
    def dashboard_uri(self) -> str:
        return f"http://{LOOPBACK}:{self.ports.dashboard}"

    @property
    def mlflow_uri(self) -> str:
        return f"http://{LOOPBACK}:{self.ports.mlflow}"

    @property
    def running(self) -> bool:
        """Whether both servers' leaders live."""
        return self.ray.leads() and self.mlflow.leads()

    def to_json(self) -> dict:
        return {
            "ray": asdict(self.ray)
            | {"uri": self.dashboard_uri, "address": f"{LOOPBACK}:{self.ports.ray}", "temp": str(self.temp)},
            "mlflow": asdict(self.mlflow) | {"uri": self.mlflow_uri},
            "ports": asdict(self.ports),
            "auth": {"mode": self.token.mode, "token_path": str(self.token.path) if self.token.path else None},
        }


def read(storage: Path) -> Local | None:
    """The cluster that `up` recorded under `storage`, whether or not it still runs.

    Raises UserError where the record was changed by something else.
    """
    record = storage / "cluster.json"
    state = read_json(record)
    if state is None:
        return None
    try:
        path = state["auth"]["token_path"]
        return Local(
            ray=Session(state["ray"]["pid"], state["ray"]["born"]),
            mlflow=Session(state["mlflow"]["pid"], state["mlflow"]["born"]),
            ports=Ports(**state["ports"]),
            token=Token(state["auth"]["mode"], Path(path) if path else None),
            temp=Path(state["ray"]["temp"]),
        )
    except (KeyError, TypeError) as error:
        raise UserError(
            f"{record} is no record of `make up` ({type(error).__name__}: {error}); move it away, and end what may "
            "still run by its process id"
        ) from None


def up(storage: Path, ports: Ports, num_cpus: int | None = None) -> tuple[Local, bool]:
    """Start Ray and MLflow under `storage` and wait until both answer; `num_cpus` None leaves counting them to Ray.

    Where MLflow alone has died it is started again beside the Ray that runs on, with its ports.

    Returns what runs, and whether this call started it. Raises UserError for a taken port or a bad token, JobFailure
    when a server ends or stays silent; then, as on Ctrl-C, nothing is left running.
    """
    with _turn(storage):
        local = read(storage)
        if local and local.running:
            return local, False
        if local and local.ray.leads():
            return _with_mlflow(storage, local), True
        if local:
            _end(storage, local)
        _refuse_taken(ports)
        processes.require_startable()
        token = _token(storage)
        temp = _temp_folder()
        env = _environment(storage, token)
        sessions: list[Session] = []
        try:
            sessions.append(processes.start(_ray_command(ports, temp, num_cpus), env, temp, _log(storage, "ray")))
            sessions.append(processes.start(_mlflow_command(storage, ports), env, temp, _log(storage, "mlflow")))
            local = Local(*sessions, ports=ports, token=token, temp=temp)
            write_json(local.to_json(), storage / "cluster.json")
            dashboard, bearer = f"{local.dashboard_uri}/api/version", _bearer(token)
            _wait("the Ray head", lambda: _answers(dashboard, bearer), local.ray, _log(storage, "ray"))
            _wait("MLflow", lambda: _answers(f"{local.mlflow_uri}/health"), local.mlflow, _log(storage, "mlflow"))
        except BaseException:
            processes.end(sessions, END_GRACE_S)
            _forget(storage, temp)
            raise
    return local, True


def _with_mlflow(storage: Path, local: Local) -> Local:
    processes.end([local.mlflow], END_GRACE_S)  # what may be left of its processes
    if not port_is_free(local.ports.mlflow):
        raise UserError(
            f"Port {local.ports.mlflow} of MLflow, which has died, is in use; free it, or `make down` first."
        )
    env = _environment(storage, local.token)
    session = processes.start(_mlflow_command(storage, local.ports), env, local.temp, _log(storage, "mlflow"))
    local = replace(local, mlflow=session)
    try:
        write_json(local.to_json(), storage / "cluster.json")
        _wait("MLflow", lambda: _answers(f"{local.mlflow_uri}/health"), session, _log(storage, "mlflow"))
    except BaseException:
        processes.end([session], END_GRACE_S)
        raise
    return local


def down(storage: Path) -> bool:
    """End what `up` started under `storage`; whether there was anything. Raises JobFailure if a process stays."""
    if read(storage) is None:
        return False
    with _turn(storage):
        local = read(storage)
        if local:
            _end(storage, local)
    return local is not None


def port_is_free(port: int) -> bool:
    """Whether nothing on this machine listens where a loopback server would."""
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((LOOPBACK, port))
        except OSError:
            return False
    return True


@contextmanager
def _turn(storage: Path) -> Iterator[None]:
    from filelock import FileLock, Timeout

    lock = FileLock(storage / "cluster" / "lock", timeout=0)
    try:
        with paths_named():
            (storage / "cluster").mkdir(parents=True, exist_ok=True)
            lock.acquire()
    except Timeout:
        raise UserError(f"Another `up` or `down` is at work on {storage}; wait for it to end.") from None
    try:
        yield
    finally:
        lock.release()


def _end(storage: Path, local: Local) -> None:
    left = processes.end([local.ray, local.mlflow], END_GRACE_S)
    if left:
        raise JobFailure(f"Processes {left} of the cluster under {storage} did not end, not even by SIGKILL.")
    _forget(storage, local.temp)


def _forget(storage: Path, temp: Path) -> None:
    processes.forget_ray_folder(temp, storage / "cluster" / "ray-logs")
    (storage / "cluster.json").unlink(missing_ok=True)


def _refuse_taken(ports: Ports) -> None:
    if len(set(asdict(ports).values())) < len(asdict(ports)):
        raise UserError(f"dashboard, Ray and MLflow need a port each, and were given {asdict(ports)}; name three.")
    for name, port in asdict(ports).items():
        if not port_is_free(port):
            raise UserError(f"Port {port} is in use; free it, or choose another: python -m cluster up --{name}-port N.")


def _token(storage: Path) -> Token:
    mode = os.environ.get("RAY_AUTH_MODE", "token")
    if mode not in ("token", "disabled"):
        raise UserError(f"RAY_AUTH_MODE={mode} is not a mode; set it to token or disabled, or unset it.")
    if mode == "disabled" or "RAY_AUTH_TOKEN" in os.environ:
        return Token(mode, None)
    own = storage / "cluster" / "token"
    path = Path(os.environ.get("RAY_AUTH_TOKEN_PATH", own)).absolute()
    if path == own and not (own.exists() and own.read_text(encoding="utf-8").strip()):
        # Readable by its owner alone from the first moment; kept by `down`, so that a shell's export stays good.
        write_text(secrets.token_hex(32), own, mode=0o600)
    if not (path.is_file() and path.read_text(encoding="utf-8").strip()):
        raise UserError(f"RAY_AUTH_TOKEN_PATH={path} is no file with a token; unset it, and `up` makes one.")
    return Token(mode, path)


def _bearer(token: Token) -> dict[str, str]:
    if token.mode == "disabled":
        return {}
    secret = token.path.read_text(encoding="utf-8").strip() if token.path else os.environ["RAY_AUTH_TOKEN"]
    return {"Authorization": f"Bearer {secret}"}


def _temp_folder() -> Path:
    folder = processes.ray_folder()
    if folder is None:
        root = processes.ray_root()
        raise UserError(f"The temporary folder {root} is too long for Ray's sockets; set RAY_TMPDIR to a shorter path.")
    return folder


def _environment(storage: Path, token: Token) -> dict[str, str]:
    env = {name: value for name, value in os.environ.items() if name != "RAY_ADDRESS"}
    env["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{env.get('PATH', os.defpath)}"
    env["RAY_AUTH_MODE"] = token.mode
    if token.path:
        env["RAY_AUTH_TOKEN_PATH"] = str(token.path)
    # Submitted jobs inherit this and keep their results here, not in the folder that was uploaded for them.
    env["RAYWARD_STORAGE"] = str(storage)
    # One machine: with 0 Ray stays on the loopback address, else its control ports listen on every interface.
    env["RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"] = "0"
    # `down` ends jobs at once; draining would wait half a minute for them.
    env["RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S"] = "0"
    # Train's print() patch breaks the fingerprints of `datasets` and floods the logs.
    env["RAY_TRAIN_ENABLE_PRINT_PATCH"] = "0"
    env["MLFLOW_SERVER_ENABLE_JOB_EXECUTION"] = "false"
    env["MLFLOW_DISABLE_TELEMETRY"] = "true"
    processes.spare_loopback(env)
    return env


def _ray_command(ports: Ports, temp: Path, num_cpus: int | None) -> list[str]:
    options: Mapping[str, object] = {
        "node-ip-address": LOOPBACK,
        "port": ports.ray,
        "dashboard-host": LOOPBACK,
        "dashboard-port": ports.dashboard,
        # Free ports, so that a second Ray on this machine is not met; 0 lets Ray choose where it can.
        "ray-client-server-port": processes.free_port(ports.ray, ports.dashboard, ports.mlflow),
        "dashboard-agent-listen-port": 0,
        "dashboard-agent-grpc-port": 0,
        "min-worker-port": 0,
        "max-worker-port": 0,
        "temp-dir": temp,
    }
    if num_cpus is not None:
        options |= {"num-cpus": num_cpus}
    command = [sys.executable, "-m", "ray.scripts.scripts", "start", "--head", "--block", "--disable-usage-stats"]
    return command + [f"--{name}={value}" for name, value in options.items()]


def _mlflow_command(storage: Path, ports: Ports) -> list[str]:
    options = {
        "host": LOOPBACK,
        "port": ports.mlflow,
        "backend-store-uri": f"sqlite:///{storage / 'mlflow.db'}",
        "artifacts-destination": storage / "mlartifacts",
        "workers": 1,
    }
    return [sys.executable, "-m", "mlflow", "server"] + [f"--{name}={value}" for name, value in options.items()]


def _answers(uri: str, headers: Mapping[str, str] | None = None) -> bool:
    import httpx

    try:
        # Loopback never goes through the proxy that the environment may name.
        return httpx.get(uri, headers=headers, timeout=2, trust_env=False).status_code == httpx.codes.OK
    except httpx.TransportError:
        return False


def _wait(name: str, ready: Callable[[], bool], session: Session, log: Path) -> None:
    deadline = time.monotonic() + START_DEADLINE_S
    while not ready():
        if not session.leads():
            raise JobFailure(f"`up` waited for {name}, which ended instead of answering; {log} says:\n{_tail(log)}")
        if time.monotonic() > deadline:
            raise JobFailure(f"`up` waited {START_DEADLINE_S:.0f} s for {name}; {log} says:\n{_tail(log)}")
        time.sleep(0.25)


def _tail(log: Path, lines: int = 15) -> str:
    return "\n".join(log.read_text(encoding="utf-8", errors="replace").splitlines()[-lines:])


def _log(storage: Path, name: str) -> Path:
    return storage / "cluster" / f"{name}.log"
