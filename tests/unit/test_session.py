"""The Ray that a job starts for itself."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import ray

from cluster import session
from cluster.errors import JobFailure


def test_a_ray_without_its_dashboard_is_refused(monkeypatch):
    # Ray itself logs an error and goes on, and a search in it would wait for ever
    started = SimpleNamespace(dashboard_url=None)
    monkeypatch.setattr(ray, "init", lambda **_: started)
    with pytest.raises(JobFailure, match="dashboard did not start at port 4001"):
        session._join(None, {"dashboard_port": 4001}, {})
    session._join("10.0.0.1:6379", {}, {})  # whoever runs that cluster decides
    started.dashboard_url = "127.0.0.1:4001"
    session._join(None, {"dashboard_port": 4001}, {})
