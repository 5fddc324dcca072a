"""What `make up` refuses before it starts anything; how it runs is in tests/e2e/test_up_down.py."""

from __future__ import annotations

import socket
from pathlib import Path

import pytest

from cluster import local, processes
from cluster.errors import UserError


@pytest.mark.parametrize("record", ["[]", "{}", '{"ray": 1, "auth": {"token_path": null}}', "{"])
def test_a_record_that_is_none_is_told(tmp_path, record):
    (tmp_path / "cluster.json").write_text(record)
    with pytest.raises(UserError, match=r"cluster\.json is (no record of `make up`|damaged)"):
        local.up(tmp_path, local.Ports())
    with pytest.raises(UserError, match="move it away"):
        local.down(tmp_path)


def test_two_servers_cannot_share_a_port(tmp_path):
    port = processes.free_port()
    with pytest.raises(UserError, match="need a port each"):
        local.up(tmp_path, local.Ports(dashboard=port, mlflow=port))
    assert not (tmp_path / "cluster.json").exists()


@pytest.mark.parametrize(
    ("given", "told"),
    [
        ({}, "127.0.0.1,localhost"),
        ({"NO_PROXY": "intranet, localhost"}, "intranet,localhost,127.0.0.1"),
        ({"no_proxy": "a", "NO_PROXY": "b"}, "a,127.0.0.1,localhost"),
        ({"no_proxy": "*"}, None),
    ],
)
def test_no_proxy_is_asked_for_this_machine(given, told):
    environment = dict(given)
    processes.spare_loopback(environment)
    assert environment == (given if told is None else given | {"no_proxy": told, "NO_PROXY": told})
    assert not processes.proxied(environment)
    assert processes.proxied({"ALL_PROXY": "socks5://proxy:1"})


def test_a_path_that_ray_starts_no_workers_from_is_told(tmp_path, monkeypatch):
    processes.require_startable()
    monkeypatch.setattr(processes.sys, "executable", "/mnt/my name/.venv/bin/python")
    with pytest.raises(UserError, match=r"'/mnt/my name/\.venv/bin/python', a path with white space"):
        local.up(tmp_path, local.Ports(*(processes.free_port() for _ in range(3))))
    assert not (tmp_path / "cluster.json").exists()


def test_the_line_for_the_shell_is_quoted():
    line = local.Token("token", Path("/data/my results/token")).export()
    assert line == "export RAY_AUTH_MODE=token RAY_AUTH_TOKEN_PATH='/data/my results/token'"


def test_a_ray_keeps_its_files_below_a_folder_of_its_owner_alone(tmp_path, monkeypatch):
    folder = processes.ray_folder()
    assert folder.parent.stat().st_mode & 0o777 == 0o700
    (folder / "session_1" / "logs").mkdir(parents=True)
    (folder / "session_latest").symlink_to(folder / "session_1")
    (folder / "session_1" / "logs" / "raylet.out").write_text("lost")
    processes.forget_ray_folder(folder, tmp_path / "storage" / "ray-logs")
    assert not folder.parent.exists()
    assert (tmp_path / "storage" / "ray-logs" / "raylet.out").read_text() == "lost"
    other = tmp_path / "theirs" / "r"  # of an earlier version, or anybody's: what lies beside it stays
    other.mkdir(parents=True)
    processes.forget_ray_folder(other)
    assert other.parent.exists()
    monkeypatch.setattr("tempfile.gettempdir", lambda: "/" + "x" * 40)
    assert processes.ray_folder() is None


def test_a_free_port_is_none_that_is_chosen_already(monkeypatch):
    drawn = iter([1, 1, 4])
    monkeypatch.setattr(processes.secrets, "randbelow", lambda _: next(drawn))
    first = processes.free_port()
    assert first == processes.OWN_PORTS + 1
    assert processes.free_port(first) == processes.OWN_PORTS + 4


def test_a_free_port_is_none_that_connections_get_nor_one_in_use(monkeypatch, tmp_path):
    lowest = int(processes.DRAWN_PORTS.read_text().split()[0])
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", processes.free_port()))
        taken.listen()
        used = taken.getsockname()[1]
        assert processes.OWN_PORTS <= used < lowest
        drawn = iter([used - processes.OWN_PORTS, 7])
        monkeypatch.setattr(processes.secrets, "randbelow", lambda _: next(drawn))
        assert processes.free_port() == processes.OWN_PORTS + 7
    everything = tmp_path / "range"
    everything.write_text("1024\t65535\n")
    monkeypatch.setattr(processes, "DRAWN_PORTS", everything)
    assert processes.free_port() >= 1024


def test_a_storage_that_cannot_be_is_told():
    with pytest.raises(UserError, match=r"/dev/null/x/cluster cannot be used: Not a directory"):
        local.up(Path("/dev/null/x"), local.Ports())
    assert not local.down(Path("/dev/null/x"))


def test_an_empty_token_is_none(tmp_path, monkeypatch):
    for name in ("RAY_AUTH_MODE", "RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH"):
        monkeypatch.delenv(name, raising=False)
    own = tmp_path / "cluster" / "token"
    own.parent.mkdir()
    own.touch()  # what a full disk left
    assert local._token(tmp_path).path == own
    made = own.read_text()
    assert len(made) == 64
    assert own.stat().st_mode & 0o777 == 0o600
    assert local._token(tmp_path).path.read_text() == made
    other = tmp_path / "empty"
    other.touch()
    monkeypatch.setenv("RAY_AUTH_TOKEN_PATH", str(other))
    with pytest.raises(UserError, match="is no file with a token"):
        local._token(tmp_path)
