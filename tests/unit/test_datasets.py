"""Data sets on disk: shards whole or absent, restarts that find what is done, and no word taken for a file."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pyarrow as pa
import pyarrow.dataset
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cluster import datasets
from cluster.errors import JobFailure, UserError

MADE_BY = {"scenarios": ["fog"], "seed": 3}


def table(*values: int) -> pa.Table:
    return pa.table({"id": list(values)})


@pytest.fixture
def folder(tmp_path) -> Path:
    """Two of three shards are written."""
    assert datasets.prepare(tmp_path / "set", MADE_BY) == {}
    datasets.write_shard(tmp_path / "set", 0, table(1, 2))
    datasets.write_shard(tmp_path / "set", 2, table(5), {"left_out": ["x"]})
    return tmp_path / "set"


def test_a_data_set_from_beginning_to_end(folder):
    datasets.write_shard(folder, 1, table(3, 4))
    manifest = datasets.finish(folder, MADE_BY, range(3))
    assert manifest == datasets.verify(folder) == datasets.read_manifest(folder)
    assert (manifest.rows, manifest.schema, manifest.configuration) == (5, (("id", "int64"),), MADE_BY)
    assert [shard.rows for shard in manifest.shards] == [2, 2, 1]
    assert manifest.shards[2].note == {"left_out": ["x"]}
    assert pq.read_table(manifest.files(folder))["id"].to_pylist() == [1, 2, 3, 4, 5]
    # readers of a folder see the shards only
    assert pyarrow.dataset.dataset(folder).to_table()["id"].to_pylist() == [1, 2, 3, 4, 5]


def test_a_restart_finds_what_is_done_and_removes_what_is_not(folder):
    (folder / ".writing-dead").write_bytes(b"half")
    (folder / "part-00001.parquet").write_bytes(b"of a writer that died before its entry")
    (folder / "notes.txt").write_text("a user's own", encoding="utf-8")
    done = datasets.prepare(folder, MADE_BY)
    assert list(done) == [0, 2]
    assert sorted(path.name for path in folder.iterdir() if path.name[0] != "_") == [
        "notes.txt",
        "part-00000.parquet",
        "part-00002.parquet",
    ]


@pytest.mark.parametrize("damage", ["cut", "flip", "remove", "entry_cut", "entry_empty", "entry_other"])
def test_a_shard_counts_only_where_file_and_entry_agree(folder, damage):
    part, entry = folder / "part-00000.parquet", folder / "_part-00000.json"
    content = part.read_bytes()
    if damage == "cut":
        part.write_bytes(content[:-1])
    elif damage == "flip":
        part.write_bytes(content[:20] + bytes([content[20] ^ 1]) + content[21:])
    elif damage == "remove":
        part.unlink()
    else:
        text = entry.read_text()
        entry.write_text({"entry_cut": text[:30], "entry_empty": "", "entry_other": '{"file": "../x"}'}[damage])
    assert list(datasets.finished(folder)) == [2]


def test_a_missing_or_surplus_shard_is_no_finished_data_set(folder):
    with pytest.raises(JobFailure, match=r"lacks shard 1 \(1 in all\)"):
        datasets.finish(folder, MADE_BY, range(3))
    with pytest.raises(JobFailure, match="has an unknown shard 2"):
        datasets.finish(folder, MADE_BY, [0])
    assert datasets.read_manifest(folder) is None
    with pytest.raises(UserError, match="holds no finished data set"):
        datasets.verify(folder)


def test_shards_of_other_columns_do_not_mix(folder):
    datasets.write_shard(folder, 1, pa.table({"id": ["a"]}))
    with pytest.raises(JobFailure, match=r"part-00001\.parquet has other columns"):
        datasets.finish(folder, MADE_BY, range(3))


def test_a_folder_holds_one_data_set_only(folder, tmp_path):
    with pytest.raises(UserError, match=r"made with other settings \(seed\)"):
        datasets.prepare(folder, {**MADE_BY, "seed": 4})
    (tmp_path / "other").mkdir()
    pq.write_table(table(1), tmp_path / "other" / "part-0.parquet")
    with pytest.raises(UserError, match="whose making is not known"):
        datasets.prepare(tmp_path / "other", MADE_BY)
    assert (tmp_path / "other" / "part-0.parquet").exists()


def test_clearing_removes_the_data_set_and_nothing_else(folder, tmp_path):
    datasets.write_shard(folder, 1, table(3))
    datasets.finish(folder, MADE_BY, range(3))
    (folder / "_summary.json").write_text("{}", encoding="utf-8")
    datasets.clear(folder)
    assert [path.name for path in folder.iterdir()] == ["_summary.json"]
    pq.write_table(table(1), tmp_path / "part-0.parquet")
    datasets.clear(tmp_path)
    assert (tmp_path / "part-0.parquet").exists()


def test_a_change_after_the_end_is_found(folder):
    datasets.write_shard(folder, 1, table(3))
    datasets.finish(folder, MADE_BY, range(3))
    content = (folder / "part-00002.parquet").read_bytes()
    (folder / "part-00002.parquet").write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    with pytest.raises(UserError, match=r"part-00002\.parquet has changed since it was written"):
        datasets.verify(folder)
    (folder / "_manifest.json").write_text("{}", encoding="utf-8")
    with pytest.raises(UserError, match=r"_manifest\.json is damaged"):
        datasets.read_manifest(folder)


def test_equal_tables_give_equal_bytes(tmp_path):
    digests = set()
    for name in ("a", "b"):
        datasets.prepare(tmp_path / name, MADE_BY)
        datasets.write_shard(tmp_path / name, 0, table(1, 2, 3))
        digests.add(datasets.finish(tmp_path / name, MADE_BY, [0]).digest)
    assert len(digests) == 1


def test_a_full_disk_leaves_no_half_shard_and_says_so(folder, monkeypatch):
    def full(_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    before = sorted(path.name for path in folder.iterdir())
    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(JobFailure, match=r"part-00001\.parquet cannot be written: No space left .* free some space"):
        datasets.write_shard(folder, 1, table(3))
    assert sorted(path.name for path in folder.iterdir()) == before


def test_a_disk_that_fills_while_parquet_is_written(folder, monkeypatch):
    before = sorted(path.name for path in folder.iterdir())
    opened = os.fdopen

    class Full:
        def __init__(self, file):
            self.file = file

        def __enter__(self):
            return self

        def __exit__(self, *_):
            self.file.close()

        def write(self, _):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

        def flush(self):
            self.file.flush()

    monkeypatch.setattr(os, "fdopen", lambda *arguments: Full(opened(*arguments)))
    with pytest.raises(JobFailure, match="No space left"):
        datasets.write_shard(folder, 1, table(3))
    assert sorted(path.name for path in folder.iterdir()) == before


def test_files_beside_the_shards_fail_as_shards_do(tmp_path, monkeypatch):
    path = tmp_path / "images" / "ann" / "1.png"
    datasets.make_folders([path.parent, path.parent])
    assert datasets.write_file(path, b"x") == hashlib.sha256(b"x").hexdigest()
    datasets.settle([path], tmp_path / "images")

    def full(_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(JobFailure, match=r"1\.png cannot be written: No space left .* free some space"):
        datasets.settle([path], tmp_path / "images")
    with pytest.raises(JobFailure, match=r"1\.png/below cannot be written: Not a directory; check the folder"):
        datasets.make_folders([path / "below"])
    assert path.read_bytes() == b"x"


def test_a_folder_that_is_gone_is_one_sentence(tmp_path):
    with pytest.raises(JobFailure, match="cannot be written: No such file or directory; check the folder"):
        datasets.write_shard(tmp_path / "gone", 0, table(1))


def test_many_writers_at_once(tmp_path):
    datasets.prepare(tmp_path, MADE_BY)
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda index: datasets.write_shard(tmp_path, index // 2, table(index // 2)), range(40)))
    manifest = datasets.finish(tmp_path, MADE_BY, range(20))
    assert pq.read_table(manifest.files(tmp_path))["id"].to_pylist() == list(range(20))


@settings(max_examples=20)
@given(st.integers(1, 6), st.sets(st.integers(0, 5)), st.sets(st.integers(0, 5)))
def test_no_row_is_lost_and_none_written_twice(count, first, torn):
    """A run that ends anywhere, some of its shards torn, and the same run again."""
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        datasets.prepare(folder, MADE_BY)
        for index in sorted(first & set(range(count))):
            datasets.write_shard(folder, index, table(10 * index, 10 * index + 1))
        for index in torn & first & set(range(count)):
            path = folder / f"part-{index:05d}.parquet"
            path.write_bytes(path.read_bytes()[:-4])
        done = datasets.prepare(folder, MADE_BY)
        assert set(done) == (first - torn) & set(range(count))
        for index in set(range(count)) - set(done):
            datasets.write_shard(folder, index, table(10 * index, 10 * index + 1))
        manifest = datasets.finish(folder, MADE_BY, range(count))
        rows = pq.read_table(manifest.files(folder))["id"].to_pylist()
        assert rows == [10 * index + half for index in range(count) for half in (0, 1)]
        assert json.loads((folder / "_manifest.json").read_text())["rows"] == 2 * count
