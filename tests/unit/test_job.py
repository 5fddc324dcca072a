"""A run's folder: what is another's is never touched."""

from __future__ import annotations

from pathlib import Path

import pytest

from cluster.errors import UserError
from cluster.models import ModelSource
from jobs.rule.config import RuleConfig
from jobs.rule.data import load_data
from jobs.rule.job import Run, claim


@pytest.mark.parametrize("content", ['{"_data_files": []}', "[1]", "{}"])
@pytest.mark.parametrize("fresh", [True, False])
def test_a_folder_of_something_else_is_never_cleared(content, fresh, tmp_path):
    (tmp_path / "state.json").write_text(content)
    data = load_data("demo", None, 0.0, 42)
    run = Run(RuleConfig(), data, ModelSource("m", Path(), "1"), tmp_path, "", state={"identity": "mine"})
    with pytest.raises(UserError, match="holds other things than a run"):
        claim(run, fresh)
    assert (tmp_path / "state.json").read_text() == content


def test_fresh_clears_a_run_of_ones_own(tmp_path):
    folder = tmp_path / "run"
    folder.mkdir()
    (folder / "state.json").write_text('{"identity": "older"}')
    data = load_data("demo", None, 0.0, 42)
    run = Run(RuleConfig(), data, ModelSource("m", Path(), "1"), folder, "", state={"identity": "mine"})
    with pytest.raises(UserError, match="another configuration"):
        claim(run, False)
    claim(run, True)
    assert not folder.exists()
