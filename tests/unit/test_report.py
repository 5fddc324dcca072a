"""Files of results: whole or not at all, and digests that follow the content only."""

from __future__ import annotations

import json

import pytest

from cluster.errors import UserError
from cluster.report import Metric, digest, machine, read_json, write_json


def test_what_is_written_is_read_back(tmp_path):
    content = {"refusal": Metric(0.5, (0.25, 0.75), 8, 3).to_json(), "name": "Zo\u00eb"}
    path = write_json(content, tmp_path / "a" / "b" / "report.json")
    assert read_json(path) == {"refusal": {"value": 0.5, "ci95": [0.25, 0.75], "n": 8, "seed": 3}, "name": "Zo\u00eb"}
    assert path.read_text(encoding="utf-8").endswith("}\n")
    assert path.stat().st_mode & 0o777 == 0o644


def test_a_file_that_is_not_there_reads_as_none(tmp_path):
    assert read_json(tmp_path / "report.json") is None


def test_writing_again_replaces(tmp_path):
    path = tmp_path / "report.json"
    write_json({"step": 1}, path)
    write_json({"step": 2}, path)
    assert read_json(path) == {"step": 2}
    assert [file.name for file in tmp_path.iterdir()] == ["report.json"]


def test_content_that_is_no_json_leaves_the_old_file_and_no_part(tmp_path):
    path = write_json({"step": 1}, tmp_path / "report.json")
    with pytest.raises(TypeError):
        write_json({"long": list(range(10_000)), "bad": object()}, path)
    assert read_json(path) == {"step": 1}
    assert [file.name for file in tmp_path.iterdir()] == ["report.json"]


def test_a_crash_before_the_rename_leaves_the_old_file_and_no_part(tmp_path, monkeypatch):
    path = write_json({"step": 1}, tmp_path / "report.json")

    def interrupted(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr("cluster.report.os.replace", interrupted)
    with pytest.raises(KeyboardInterrupt):
        write_json({"step": 2}, path)
    assert read_json(path) == {"step": 1}
    assert [file.name for file in tmp_path.iterdir()] == ["report.json"]


def test_the_digest_follows_content_and_not_order():
    assert digest({"a": 1, "b": [2, 3]}) == digest({"b": [2, 3], "a": 1})
    assert digest({"a": 1}) != digest({"a": 2})
    assert digest([1, 2]) != digest([2, 1])
    assert len(digest(None)) == 16


def test_the_machine_is_told_as_json():
    told = json.loads(json.dumps(machine()))
    assert told["cores"] >= 1
    assert told["memory_gib"] > 0
    assert told["processor"]


@pytest.mark.parametrize("content", ["", "{", "\udcff"])
def test_a_damaged_file_is_told(tmp_path, content):
    path = tmp_path / "state.json"
    path.write_text(content, errors="surrogateescape")
    with pytest.raises(UserError, match=r"state\.json is damaged .*; move it away"):
        read_json(path)
