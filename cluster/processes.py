"""Process sessions that outlive the command which started them, found again later and ended whole."""

from __future__ import annotations

import contextlib
import os
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterable, Mapping, MutableMapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import psutil

from cluster.errors import UserError

LISTENER_DEADLINE_S = 10.0
DIRECT = ("no_proxy", "NO_PROXY")
LOOPBACK = "127.0.0.1"
THIS_MACHINE = (LOOPBACK, "localhost")
# A Unix socket's path holds 107 characters; Ray puts up to 68 of its own behind the temporary folder.
MAX_TEMP_PATH = 39
BOOT_ID = Path("/proc/sys/kernel/random/boot_id")
# The kernel draws its own from here, as do connections; below lie Ray's workers (10002 to 19999).
DRAWN_PORTS = Path("/proc/sys/net/ipv4/ip_local_port_range")
OWN_PORTS = 20000


@dataclass(frozen=True)
class Session:
    """The leader of a process session: its pid, and its birth, which tells it from a later owner of the same number."""

    pid: int
    born: str

    def leads(self) -> bool:
        """Whether the leader itself still runs."""
        return birth(self.pid) == self.born

    def members(self) -> list[psutil.Process]:
        """Every process of the session, and every descendant of its leader in whatever session it put itself."""
        boot = self.born.partition(":")[0]
        owner = birth(self.pid)
        if boot != BOOT_ID.read_text().strip() or owner not in (self.born, None):
            return []
        found = [process for process in psutil.process_iter() if _session_of(process.pid) == self.pid]
        with contextlib.suppress(psutil.NoSuchProcess):
            if owner == self.born:
                found += psutil.Process(self.pid).children(recursive=True)
        return list(set(found))


def proxied(environment: Mapping[str, str]) -> bool:
    """Whether HTTP goes by a proxy."""
    return any(environment.get(name) for name in ("http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY"))


def spare_loopback(environment: MutableMapping[str, str]) -> None:
    """Has no client of this environment ask a proxy for this machine itself: Ray's dashboard and MLflow are here."""
    known = [name.strip() for name in (environment.get("no_proxy") or environment.get("NO_PROXY") or "").split(",")]
    if "*" not in known:
        hosts = [*filter(None, known), *(host for host in THIS_MACHINE if host not in known)]
        environment |= dict.fromkeys(DIRECT, ",".join(hosts))


def require_startable() -> None:
    """Raises UserError where Ray's workers would not start: it puts the path of Python into a shell's line as it is."""
    if any(character.isspace() for character in sys.executable):
        raise UserError(
            f"Python lies at {sys.executable!r}, a path with white space, from which Ray starts no workers; move the "
            "checkout"
        )


def leave_on_sigterm() -> None:
    """Makes SIGTERM end this process as an interrupt does, everything freed; call it again once Ray has started.

    Ray then has a handler in place that prints a stack and, three seconds later, aborts what is still being freed.
    """
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, lambda number, _frame: sys.exit(number))


def silence_of(address: str) -> str | None:
    """Why nothing answers at HOST:PORT; None where something listens, and where the address names no port."""
    host, colon, port = address.rpartition(":")
    if not (colon and port.isdecimal()):
        return None
    try:
        socket.create_connection((host.strip("[]"), int(port)), timeout=LISTENER_DEADLINE_S).close()
    except (OSError, OverflowError, UnicodeError) as error:
        return str(error)
    return None


def free_port(*chosen: int) -> int:
    """A port of the loopback address that nothing listens on now, and that is not `chosen` for something else.

    Its server starts seconds later, so it is none that the kernel may give to a connection meanwhile.
    """
    end = int(DRAWN_PORTS.read_text().split()[0])
    while True:
        # `random` would draw the same for two jobs of one seed; 0 leaves it to a kernel that draws from everything.
        wanted = OWN_PORTS + secrets.randbelow(end - OWN_PORTS) if end > OWN_PORTS else 0
        with socket.socket() as probe, contextlib.suppress(OSError):
            probe.bind(("127.0.0.1", wanted))
            port = probe.getsockname()[1]
            if port not in chosen:
                return port


def ray_root() -> Path:
    """Where Rays have their temporary folders."""
    return Path(os.environ.get("RAY_TMPDIR") or tempfile.gettempdir())


def ray_folder() -> Path | None:
    """A new temporary folder for one Ray; None where its path would be too long for Ray's sockets.

    Ray opens its folder to everyone, and its workers run the code that lies there, so it stands below one that is its
    owner's alone. A folder of one's own also keeps the address by which others find their Ray.
    """
    root = ray_root()
    if len(str(root)) + len("/rayward-") + 8 + len("/r") > MAX_TEMP_PATH:
        return None
    folder = Path(tempfile.mkdtemp(prefix="rayward-", dir=root)) / "r"
    folder.mkdir()
    return folder


def forget_ray_folder(folder: Path, logs: Path | None = None) -> None:
    """Removes what `ray_folder` gave; the logs of the last session are kept at `logs`, in place of earlier ones."""
    found = (folder / "session_latest").resolve() / "logs"
    with contextlib.suppress(OSError):  # a full disk, or two at once: the failure that the logs are of matters more
        if logs is not None and found.is_dir():
            shutil.rmtree(logs, ignore_errors=True)
            logs.parent.mkdir(parents=True, exist_ok=True)
            shutil.move(found, logs)
    of_its_own = folder.name == "r" and folder.parent.name.startswith("rayward-")
    shutil.rmtree(folder.parent if of_its_own else folder, ignore_errors=True)


def start(command: Sequence[str], env: Mapping[str, str], folder: Path, log: Path) -> Session:
    """Start `command` in a session of its own, where no Ctrl-C of this terminal reaches it; output to `log`."""
    with log.open("wb") as output:
        process = subprocess.Popen(
            command,
            env=dict(env),
            cwd=folder,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    return Session(process.pid, birth(process.pid) or "")


def end(sessions: Iterable[Session], grace_s: float) -> list[int]:
    """End sessions: their leaders first, who clean up best, then whatever is left; SIGKILL after `grace_s` seconds.

    Returns the pids that outlived even that, for as long again.
    """
    sessions = list(sessions)
    members = {process for session in sessions for process in session.members()}
    leaders = {process for process in members if any(process.pid == session.pid for session in sessions)}
    _signal(leaders, signal.SIGTERM)
    _wait(lambda: not _alive(members), grace_s / 2)
    # What was born during the wait, and what its parents left behind.
    members |= {process for session in sessions for process in session.members()}
    _signal(_alive(members), signal.SIGTERM)
    _wait(lambda: not _alive(members), grace_s / 2)
    _signal(_alive(members), signal.SIGKILL)
    _wait(lambda: not _alive(members), grace_s)
    return sorted(process.pid for process in _alive(members))


def birth(pid: int) -> str | None:
    """Boot id and start tick of a process, None if it does not run. Unlike clock times these never shift."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except (FileNotFoundError, ProcessLookupError):
        return None
    state, start_tick = fields[0], fields[19]
    return None if state in "ZX" else f"{BOOT_ID.read_text().strip()}:{start_tick}"


def _session_of(pid: int) -> int | None:
    try:
        return os.getsid(pid)
    except (ProcessLookupError, PermissionError):
        return None


def _alive(processes: Iterable[psutil.Process]) -> list[psutil.Process]:
    return [process for process in processes if process.is_running() and birth(process.pid) is not None]


def _signal(processes: Iterable[psutil.Process], number: int) -> None:
    for process in processes:
        with contextlib.suppress(psutil.NoSuchProcess):
            process.send_signal(number)


def _wait(done: Callable[[], bool], seconds: float) -> None:
    deadline = time.monotonic() + seconds
    while not done() and time.monotonic() < deadline:
        time.sleep(0.1)
