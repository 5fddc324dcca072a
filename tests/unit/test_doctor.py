"""Each finding of the doctor, on machines made up for it."""

from __future__ import annotations

import os
import socket
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest

from cluster import doctor, local
from cluster.doctor import GIB, Check
from cluster.local import Local, Ports, Token
from cluster.processes import Session, birth


def running(ports: Ports, token: Token) -> Local:
    """A cluster whose leaders are this very test."""
    me = Session(os.getpid(), birth(os.getpid()))
    return Local(ray=me, mlflow=me, ports=ports, token=token, temp=Path())


def test_the_packages_agree_with_the_committed_lock():
    assert doctor.packages().state == "ok"


def test_a_package_that_differs_from_the_lock_is_named_with_both_versions(tmp_path):
    for kind in ("cpu", "gpu"):
        (tmp_path / f"{kind}.lock").write_text(
            "ray==2.60.0 \\\n    --hash=sha256:0\ntorch==1.0.0\nno-such-package==3\n"
        )
    check = doctor.packages(tmp_path)
    assert check.state == "fail"
    assert "not 1.0.0" in check.found
    assert "no-such-package missing, not 3" in check.found
    assert "ray" not in check.found
    assert "make" in check.remedy


@pytest.mark.parametrize(
    ("flags", "state", "words"),
    [
        ("fpu sse4_2", "warn", "no AVX2"),
        ("fpu avx2", "ok", "bfloat16 is slow"),
        ("avx2 avx512f avx512_bf16", "ok", "avx512_bf16"),
    ],
)
def test_the_processor_is_judged_by_its_flags(flags, state, words):
    check = doctor.processor(f"processor\t: 0\nflags\t\t: {flags}\nbugs\t\t:\n")
    assert check.state == state
    assert words in check.found


@pytest.mark.parametrize(
    ("printed", "state"),
    [
        ('openjdk version "17.0.15" 2025-04-15', "ok"),
        ('openjdk version "21.0.2" 2024-01-16', "ok"),
        ('java version "1.8.0_202"', "warn"),
        ('openjdk version "11.0.2" 2019-01-15', "warn"),
    ],
)
def test_java_is_judged_by_what_it_prints(tmp_path, printed, state):
    command = tmp_path / "bin" / "java"
    command.parent.mkdir()
    command.write_text(f"#!/bin/sh\necho '{printed}' >&2\n")
    command.chmod(0o755)
    check = doctor.java({"JAVA_HOME": str(tmp_path)})
    assert (check.state, check.found) == (state, printed)


def test_missing_java_costs_spark_jobs_only(tmp_path):
    check = doctor.java({"JAVA_HOME": str(tmp_path)})
    assert check.state == "warn"
    assert "Spark" in check.remedy


@pytest.mark.parametrize(("free", "state"), [(2, "fail"), (5, "warn"), (12, "ok")])
def test_memory_thresholds(free, state):
    assert doctor.memory(free * GIB, 16 * GIB).state == state


@pytest.mark.parametrize(
    ("free", "total", "state"), [(4, 100, "fail"), (10, 100, "warn"), (30, 1000, "warn"), (30, 100, "ok")]
)
def test_disk_thresholds(monkeypatch, tmp_path, free, total, state):
    usage = SimpleNamespace(free=free * GIB, total=total * GIB)
    monkeypatch.setattr(doctor.shutil, "disk_usage", lambda folder: usage)
    assert doctor.disk(tmp_path / "not" / "yet" / "there").state == state


def test_a_storage_path_that_cannot_be_written_fails(tmp_path, monkeypatch):
    assert doctor.writable(tmp_path / "new").state == "ok"
    assert not (tmp_path / "new").exists()
    # A folder of the kernel's, where even root creates nothing.
    assert doctor.writable(Path("/proc")).state == "fail"


def test_a_taken_port_is_named_unless_it_is_our_own(monkeypatch):
    with socket.socket() as holder:
        holder.bind(("127.0.0.1", 0))
        holder.listen()
        port = holder.getsockname()[1]
        monkeypatch.setattr(local, "port_is_free", lambda number, taken=port: number != taken)
        monkeypatch.setattr(local, "Ports", lambda: Ports(dashboard=port, ray=1, mlflow=2))
        assert doctor.ports(None).state == "warn"
        assert str(port) in doctor.ports(None).found
        ours = running(Ports(dashboard=port), Token("token", None))
        assert doctor.ports(ours).state == "ok"
        assert "MLflow of `make up` has died" in doctor.ports(replace(ours, mlflow=Session(1, "then"))).found


def test_a_listener_makes_a_port_taken():
    with socket.socket() as holder:
        holder.bind(("127.0.0.1", 0))
        port = holder.getsockname()[1]
        holder.listen()
        assert not local.port_is_free(port)
    assert local.port_is_free(port)


@pytest.mark.parametrize(
    ("env", "state"),
    [
        ({}, "ok"),
        ({"RAY_AUTH_MODE": "disabled"}, "ok"),
        ({"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": "hidden-value"}, "ok"),
        ({"RAY_AUTH_MODE": "token"}, "warn"),
        ({"RAY_AUTH_MODE": "tokens"}, "fail"),
        ({"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN_PATH": "missing-file"}, "fail"),
    ],
)
def test_ray_token(env, state, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    check = doctor.authentication(env, None)
    assert check.state == state
    assert "hidden-value" not in check.found + check.remedy


def test_a_shell_that_the_running_cluster_would_refuse_gets_the_line_that_lets_it_in(tmp_path):
    cluster = running(Ports(), Token("token", tmp_path / "token"))
    check = doctor.authentication({}, cluster)
    assert check.state == "warn"
    assert f"export RAY_AUTH_MODE=token RAY_AUTH_TOKEN_PATH={tmp_path / 'token'}" in check.remedy


def test_the_hub_is_not_asked_when_offline_and_its_silence_is_a_warning():
    assert doctor.hub({"HF_HUB_OFFLINE": "1", "HF_ENDPOINT": "http://127.0.0.1:9"}).state == "ok"
    check = doctor.hub({"HF_ENDPOINT": "http://127.0.0.1:9"})
    assert check.state == "warn"
    assert "HF_HUB_OFFLINE=1" in check.remedy


def test_a_proxy_that_cannot_be_used_is_told(monkeypatch):
    monkeypatch.setenv("ALL_PROXY", "gopher://127.0.0.1:9")
    monkeypatch.setenv("all_proxy", "gopher://127.0.0.1:9")
    check = doctor.hub({"HF_ENDPOINT": "http://10.0.0.1:9"})
    assert check.state == "warn"
    assert "the proxy that the environment names cannot be used" in check.found


@pytest.mark.parametrize(("states", "status"), [(("ok", "warn"), 0), (("ok", "fail"), 1)])
def test_only_a_failed_check_fails_and_every_remedy_is_shown(capsys, states, status):
    checks = [Check(f"check {i}", state, "found", f"remedy {i}") for i, state in enumerate(states)]
    assert doctor.show(checks) == status
    shown = capsys.readouterr().out
    assert "remedy 1" in shown
    assert "remedy 0" not in shown
