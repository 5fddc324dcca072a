"""Folders that are there whole or not at all."""

from __future__ import annotations

import pytest

from cluster import folders


def test_a_folder_stands_there_once_it_is_whole(tmp_path):
    target = tmp_path / "below" / "model"
    with folders.whole(target) as partial:
        (partial / "weights").write_text("1")
        assert not target.exists()
    assert [path.name for path in target.parent.iterdir()] == ["model"]
    assert (target / "weights").read_text() == "1"
    assert target.stat().st_mode & 0o777 == 0o755


def test_a_failure_leaves_nothing(tmp_path):
    with pytest.raises(KeyboardInterrupt), folders.whole(tmp_path / "model"):
        raise KeyboardInterrupt
    assert not list(tmp_path.iterdir())


def test_what_is_there_stays(tmp_path):
    target = tmp_path / "model"
    target.mkdir()
    with folders.whole(target) as partial:  # an empty one is nobody's
        (partial / "weights").write_text("1")
    with pytest.raises(OSError, match="not empty"), folders.whole(target):
        pass
    assert (target / "weights").read_text() == "1"
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_what_killed_writers_left_is_swept(tmp_path):
    for name in (".model.abc", ".model.def", ".models.abc", "model"):
        (tmp_path / name).mkdir()
    folders.sweep(tmp_path / "model")
    assert sorted(path.name for path in tmp_path.iterdir()) == [".models.abc", "model"]
