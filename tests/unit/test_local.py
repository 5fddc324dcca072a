"""What `make up` refuses before it starts anything; how it runs is in tests/e2e/test_up_down.py."""

from __future__ import annotations

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
