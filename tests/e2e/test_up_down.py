"""`python -m cluster up | down` as a user types them, beside other programs that must not be touched."""

from __future__ import annotations

import json
import shutil
import signal
import subprocess
import sys
import tempfile
from pathlib import Path

import httpx
import psutil
import pytest

from cluster import processes
from cluster.processes import Session, birth
from tests.e2e.commands import ROOT, clean_environment, cluster, free_ports, options, wait


def members(state: dict) -> set[psutil.Process]:
    sessions = [Session(state[name]["pid"], state[name]["born"]) for name in ("ray", "mlflow")]
    return {process for session in sessions for process in session.members()}


def status(address: str, token: str = "") -> int | None:
    """The HTTP status, None where nobody listens."""
    headers = {"Authorization": f"Bearer {token}"} if token else {}
    try:
        return httpx.get(address, headers=headers, timeout=10, trust_env=False).status_code
    except httpx.ConnectError:
        return None


@pytest.fixture
def stranger():
    """Somebody else's process."""
    process = subprocess.Popen(["sleep", "600"], start_new_session=True)
    yield process
    process.kill()
    process.wait()


@pytest.fixture
def other_ray():
    """The dashboard's address of somebody else's Ray head, which starts while the test runs."""
    ports = free_ports()
    temp = tempfile.mkdtemp()
    command = [sys.executable, "-m", "ray.scripts.scripts", "start", "--head", "--block", "--num-cpus=1"]
    command += [f"--port={ports['ray']}", f"--dashboard-port={ports['dashboard']}", f"--temp-dir={temp}"]
    command += ["--dashboard-agent-listen-port=0", "--min-worker-port=0", "--max-worker-port=0"]
    environment = clean_environment() | {"RAY_AUTH_MODE": "disabled", "RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S": "0"}
    session = processes.start(command, environment, Path(temp), Path(temp) / "log")
    yield f"http://127.0.0.1:{ports['dashboard']}/api/version"
    assert not processes.end([session], 20)
    shutil.rmtree(temp)


@pytest.mark.slow
def test_up_serves_both_on_loopback_behind_a_token_and_down_ends_nothing_else(tmp_path, other_ray):
    ports = free_ports()
    started = cluster("up", *options(tmp_path, ports))
    try:
        assert started.returncode == 0, started.stderr
        state = json.loads((tmp_path / "cluster.json").read_text())
        token_file = Path(state["auth"]["token_path"])
        token = token_file.read_text()
        assert token_file.stat().st_mode & 0o777 == 0o600
        assert f"RAY_AUTH_TOKEN_PATH={token_file}" in started.stdout
        assert token not in started.stdout + started.stderr
        assert status(f"http://127.0.0.1:{ports['dashboard']}/api/version") == 401
        assert status(f"http://127.0.0.1:{ports['dashboard']}/api/version", token) == 200
        assert status(f"http://127.0.0.1:{ports['mlflow']}/health") == 200

        running = members(state)
        assert len(running) > 5
        listeners = [c for process in running for c in process.net_connections("tcp") if c.status == psutil.CONN_LISTEN]
        assert {c.laddr.ip.removeprefix("::ffff:") for c in listeners} == {"127.0.0.1"}

        wait(lambda: status(other_ray) == 200, "the other Ray")
        again = cluster("up", *options(tmp_path, ports))
        assert again.returncode == 0
        assert "Already up" in again.stdout

        mlflow = processes.Session(state["mlflow"]["pid"], state["mlflow"]["born"])
        assert not processes.end([mlflow], 20)
        mended = cluster("up", *options(tmp_path, ports))
        assert mended.returncode == 0, mended.stderr
        assert status(f"http://127.0.0.1:{ports['mlflow']}/health") == 200
        now = json.loads((tmp_path / "cluster.json").read_text())
        assert now["ray"] == state["ray"]  # whose jobs went on
        running |= members(now)

        taken = cluster("up", *options(tmp_path / "other", ports))
        assert taken.returncode == 2
        assert f"Port {ports['dashboard']}" in taken.stderr
        assert "--dashboard-port" in taken.stderr
        assert not (tmp_path / "other" / "cluster.json").exists()
    finally:
        ended = cluster("down", "--storage", str(tmp_path))
    assert ended.returncode == 0, ended.stderr
    assert not [process for process in running if birth(process.pid) and process.is_running()]
    assert not (tmp_path / "cluster.json").exists()
    assert not Path(state["ray"]["temp"]).exists()
    assert (tmp_path / "cluster" / "ray-logs" / "gcs_server.out").exists()
    assert status(other_ray) == 200
    assert "Nothing is up" in cluster("down", "--storage", str(tmp_path)).stdout


def test_ctrl_c_during_up_leaves_nothing(tmp_path):
    command = [sys.executable, "-m", "cluster", "up", *options(tmp_path, free_ports())]
    starting = subprocess.Popen(command, cwd=ROOT, env=clean_environment(), stderr=subprocess.PIPE)
    state_file = tmp_path / "cluster.json"
    wait(state_file.exists, "`up` to record what it started")
    state = json.loads(state_file.read_text())
    wait(lambda: len(members(state)) > 2, "Ray's children")
    running = members(state)
    assert running
    starting.send_signal(signal.SIGINT)
    assert starting.wait(60) != 0
    assert not [process for process in running if birth(process.pid) and process.is_running()]
    assert not state_file.exists()


def test_a_process_that_got_a_recorded_number_later_is_left_alone(tmp_path, stranger):
    born = birth(stranger.pid)
    reused = {"pid": stranger.pid, "born": born + "0"}
    state = {
        "ray": reused | {"temp": str(tmp_path / "temp")},
        "mlflow": reused,
        "ports": {"dashboard": 1, "ray": 2, "mlflow": 3},
        "auth": {"mode": "disabled", "token_path": None},
    }
    (tmp_path / "cluster.json").write_text(json.dumps(state))
    assert cluster("down", "--storage", str(tmp_path)).returncode == 0
    assert stranger.poll() is None
    assert not (tmp_path / "cluster.json").exists()


@pytest.mark.parametrize(
    ("environment", "words"),
    [
        ({"RAY_AUTH_MODE": "tokens"}, "RAY_AUTH_MODE=tokens"),
        ({"RAY_AUTH_TOKEN_PATH": "missing"}, "RAY_AUTH_TOKEN_PATH="),
    ],
)
def test_a_bad_token_setting_is_the_users_error(tmp_path, environment, words):
    refused = cluster("up", *options(tmp_path, free_ports()), **environment)
    assert refused.returncode == 2
    assert words in refused.stderr
    assert len(refused.stderr.splitlines()) == 1
