"""The Ray that a job starts for itself."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import ray

from cluster import session
from cluster.config import load
from cluster.errors import JobFailure, UserError
from jobs.rule.config import RuleConfig


def test_workers_stand_on_one_node_each(monkeypatch):
    def node(cpus, gpus=0.0, alive=True):
        return {"Alive": alive, "Resources": {"CPU": cpus, "GPU": gpus} if gpus else {"CPU": cpus}}

    nodes = [node(64.0), node(8.0, 8.0), node(99.0, alive=False)]
    monkeypatch.setattr(ray, "nodes", lambda: nodes)
    assert session.places(2, 1) == 4
    assert session.places(6, 0) == 11
    assert session.places(0, 2) == 4
    assert session.places(0.5, 0.2) == 16
    monkeypatch.setattr(ray, "cluster_resources", lambda: {"CPU": 72.0, "GPU": 8.0})
    config = load(
        RuleConfig, sets=["train.num_workers=8", "train.cpus_per_worker=2", "train.gpus_per_worker=1"], environ={}
    )
    with pytest.raises(UserError, match=r"8 workers, each of 2 CPU and 1 GPU on one node, .* nodes hold 4; lower"):
        session._require_room(config)


def test_a_ray_without_its_dashboard_is_refused(monkeypatch):
    # Ray itself logs an error and goes on, and a search in it would wait for ever
    started = SimpleNamespace(dashboard_url=None)
    monkeypatch.setattr(ray, "init", lambda **_: started)
    with pytest.raises(JobFailure, match="dashboard did not start at port 4001"):
        session._join(None, {"dashboard_port": 4001}, {})
    session._join("10.0.0.1:6379", {}, {})  # whoever runs that cluster decides
    started.dashboard_url = "127.0.0.1:4001"
    session._join(None, {"dashboard_port": 4001}, {})
