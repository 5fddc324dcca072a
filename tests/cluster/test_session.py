"""The Ray that a job starts for itself."""

from __future__ import annotations

import socket

import pytest
import ray

from cluster import processes, session
from cluster.errors import JobFailure
from jobs.rule.config import RuleConfig


def test_a_ray_without_its_dashboard_is_ended_and_told(monkeypatch, tmp_path):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", processes.free_port()))
        taken.listen()
        port = taken.getsockname()[1]
        monkeypatch.setattr(session.processes, "free_port", lambda *chosen: port if not chosen else port + 1)
        config = RuleConfig(cluster={"storage": str(tmp_path), "num_cpus": 1})
        with pytest.raises(JobFailure, match=f"dashboard did not start at port {port}"), session.connected(config):
            pass
    assert not ray.is_initialized()
    assert (tmp_path / "ray-logs").is_dir()
