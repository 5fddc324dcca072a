"""Sources of face images: the layouts of folders, parquet files, the hub, and what is said where none are found."""

from __future__ import annotations

import io
import os
from pathlib import Path

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from cluster.errors import JobFailure, UserError
from jobs.oodface import sources, tables
from jobs.oodface.pixels import decode
from jobs.oodface.tables import Table

SHARED = Path(__file__).parents[3] / "shared/data/oodface"
needs_shared = pytest.mark.skipif(not SHARED.exists(), reason="../shared/data/oodface is absent")
PIXELS = np.random.default_rng(0).integers(0, 256, (24, 32, 3), dtype=np.uint8)


def encoded(pixels: np.ndarray) -> bytes:
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "PNG")
    return file.getvalue()


def put(root: Path, *names: str) -> Path:
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(encoded(PIXELS))
    return root


def found(layout: str, root: Path) -> list[tuple[str, str | None]]:
    return [(row.image_id, row.identity) for row in sources.find(layout, str(root), root) if not row.problem]


def problems(layout: str, root: Path) -> dict[str, str]:
    return {row.image_id: row.problem for row in sources.find(layout, str(root), root) if row.problem}


def test_a_plain_folder(tmp_path):
    put(tmp_path, "z.JPG", "ann/2.png", "ann/1.b.png", "set/bob/x.webp", "set/notes.txt", ".git/h.png", "ann/.h.png")
    assert found("folder", tmp_path) == [
        ("ann/1.b", "ann"),
        ("ann/2", "ann"),
        ("set/bob/x", "bob"),
        ("z", None),
    ]
    [row] = [row for row in sources.find("folder", str(tmp_path), tmp_path) if row.image_id == "z"]
    stat = (tmp_path / "z.JPG").stat()
    assert (row.path, row.row, row.size, row.modified) == (
        str(tmp_path / "z.JPG"),
        None,
        stat.st_size,
        stat.st_mtime_ns,
    )


def test_ids_stay_where_the_folder_is_named_otherwise(tmp_path, monkeypatch):
    put(tmp_path / "set", "ann/1.png")
    monkeypatch.chdir(tmp_path)
    (tmp_path / "link").symlink_to("set")
    rows = [next(sources.find("folder", name, tmp_path)) for name in ("set", "./set", "link", str(tmp_path / "set"))]
    assert len(set(rows)) == 1


def test_links_to_folders_are_followed_and_loops_are_not(tmp_path):
    put(tmp_path / "set", "ann/1.png")
    put(tmp_path / "far", "2.png")
    (tmp_path / "set" / "bob").symlink_to(tmp_path / "far")
    (tmp_path / "set" / "ann" / "loop").symlink_to(tmp_path / "set")
    assert found("folder", tmp_path / "set") == [("ann/1", "ann"), ("bob/2", "bob")]


def test_what_is_no_readable_file_is_listed(tmp_path):
    put(tmp_path, "a.png")
    os.mkfifo(tmp_path / "pipe.png")
    (tmp_path / "gone.png").symlink_to("nowhere.png")
    (tmp_path / os.fsdecode(b"\xff.png")).write_bytes(b"x")
    told = problems("folder", tmp_path)
    assert told["pipe"] == "is no regular file"
    assert told["gone"] == "cannot be read: No such file or directory"
    assert told["\\xff"] == "has a name that is not UTF-8"
    assert found("folder", tmp_path) == [("a", None)]


def test_lfw(tmp_path):
    put(
        tmp_path,
        "Ann_Lee/Ann_Lee_0001.jpg",
        "Ann_Lee/Ann_Lee_0012.jpg",
        "Bo/Ann_Lee_0001.jpg",
        "x.jpg",
        "a/Bo/Bo_0001.jpg",
    )
    assert found("lfw", tmp_path) == [("Ann_Lee/Ann_Lee_0001", "Ann_Lee"), ("Ann_Lee/Ann_Lee_0012", "Ann_Lee")]
    told = problems("lfw", tmp_path)
    assert set(told) == {"Bo/Ann_Lee_0001", "x", "a/Bo/Bo_0001"}
    assert set(told.values()) == {"is not named NAME/NAME_0001.jpg, as the layout lfw has it"}


@pytest.mark.parametrize("above", ["Data/Images", "Images", "."])
def test_cfp(tmp_path, above):
    put(tmp_path / above, "001/frontal/01.jpg", "001/profile/04.jpg", "001/other/01.jpg")
    assert found("cfp", tmp_path) == [("001/frontal/01", "001"), ("001/profile/04", "001")]
    assert set(problems("cfp", tmp_path)) == {"001/other/01"}


def test_ytf_takes_the_middle_frame_in_the_order_of_numbers(tmp_path):
    put(tmp_path, *(f"Ann/0/0.{number}.jpg" for number in (9, 10, 11, 100, 8)), *(f"Ann/5/5.{n}.jpg" for n in (2, 10)))
    (tmp_path / "Bo" / "1").mkdir(parents=True)
    rows = {row.image_id: row for row in sources.find("ytf", str(tmp_path), tmp_path)}
    assert Path(rows["Ann/0"].path).name == "0.10.jpg"
    assert Path(rows["Ann/5"].path).name == "5.10.jpg"
    assert rows["Bo/1"].problem == "is a video without frames"
    assert [row.identity for row in rows.values()] == ["Ann", "Ann", "Bo"]


def test_what_cannot_be_listed_at_all(tmp_path):
    with pytest.raises(UserError, match=r"no layout 'celeb'.*take one of folder, lfw, cfp, ytf, parquet, hub"):
        found("celeb", tmp_path)
    with pytest.raises(UserError, match="nowhere does not exist"):
        found("folder", tmp_path / "nowhere")
    with pytest.raises(UserError, match="holds no image in the layout lfw"):
        found("lfw", tmp_path)
    put(tmp_path, "a.png")
    with pytest.raises(UserError, match=r"a\.png is no folder"):
        found("folder", tmp_path / "a.png")


def faces(**columns) -> datasets.Dataset:
    rows = [{"bytes": encoded(PIXELS + number), "path": f"{number}.png"} for number in range(5)]
    features = {"image": datasets.Image(), "label": datasets.ClassLabel(names=["ann", "bob"])}
    content = {"image": rows, "label": [0, 1, 0, 1, 0], **columns}
    features |= {name: datasets.Value("string") for name in columns}
    return datasets.Dataset.from_dict(content, features=datasets.Features(features))


def read(rows: list[sources.Located]) -> list[np.ndarray]:
    return [decode(data)[0] for data in sources.contents((row.path, row.row) for row in rows)]


def test_parquet_as_the_hub_has_it(tmp_path):
    faces().to_parquet(tmp_path / "f.parquet", batch_size=2)
    rows = list(sources.find("parquet", str(tmp_path / "f.parquet"), tmp_path))
    assert [(row.image_id, row.identity) for row in rows][:3] == [("ann/0", "ann"), ("bob/1", "bob"), ("ann/2", "ann")]
    for number, pixels in enumerate(read(rows)):
        assert (pixels == PIXELS + number).all()


def test_a_column_of_lists_and_strange_metadata_name_nobody(tmp_path):
    table = pa.table({"face": [encoded(PIXELS)] * 2, "label": [[1, 2], [3]]})
    for number, about in enumerate((b"[]", b"{", b'{"info": {"features": null}}')):
        pq.write_table(table.replace_schema_metadata({b"huggingface": about}), tmp_path / f"{number}.parquet")
    rows = list(sources.find("parquet", str(tmp_path), tmp_path))
    assert [row.identity for row in rows] == [None] * 6


def test_a_column_of_categories_names_people(tmp_path):
    names = pa.array(["ann", "bob"]).dictionary_encode()
    pq.write_table(pa.table({"face": [encoded(PIXELS)] * 2, "name": names}), tmp_path / "f.parquet")
    rows = list(sources.find("parquet", str(tmp_path), tmp_path))
    assert [row.identity for row in rows] == ["ann", "bob"]


def test_two_names_of_one_file_are_not_both_taken(tmp_path):
    pq.write_table(pa.table({"face": [encoded(PIXELS)] * 3, "image_id": ["a", "./a", "b//c"]}), tmp_path / "f.parquet")
    problems = [row.problem for row in sources.find("parquet", str(tmp_path), tmp_path)]
    told = "which is no plain path below a folder"
    assert problems == [None, f"is called './a', {told}", f"is called 'b//c', {told}"]


def test_parquet_with_plain_bytes_in_a_folder(tmp_path):
    for part in ("a", "b"):
        table = pa.table({"face": [encoded(PIXELS)] * 2 + [None], "name": ["ann", None, "bob"]})
        (tmp_path / "deep").mkdir(exist_ok=True)
        pq.write_table(table, tmp_path / "deep" / f"{part}.parquet")
    rows = list(sources.find("parquet", str(tmp_path), tmp_path))
    assert [row.image_id for row in rows[2:4]] == ["deep/a/000002", "deep/b/000000"]
    assert [row.identity for row in rows[:3]] == ["ann", None, "bob"]
    last = list(sources.contents([(rows[2].path, 2), (rows[2].path, 9)]))
    assert [str(one) for one in last] == ["holds no image in row 2", "has no row 9"]


def test_parquet_in_one_large_group_is_copied_in_small_ones(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(tables, "LARGEST_GROUP", 4)
    monkeypatch.setattr(tables, "ROWS_PER_SHARD", 2)
    monkeypatch.setattr(tables, "ROWS_PER_GROUP", 1)
    monkeypatch.setattr(tables, "ROWS_AT_ONCE", 2)
    path, work = tmp_path / "f.parquet", tmp_path / "work"
    faces(extra=list("abcde")).to_parquet(path)
    rows = list(sources.find("parquet", str(path), work))
    assert "has groups of up to 5 rows" in capsys.readouterr().out
    assert [row.image_id for row in rows] == ["ann/0", "bob/1", "ann/2", "bob/3", "ann/4"]
    assert [row.row for row in rows] == [0, 1, 0, 1, 0]
    assert {row.size for row in rows} == {path.stat().st_size}
    for number, pixels in enumerate(read(rows)):
        assert (pixels == PIXELS + number).all()
    copied = pq.ParquetFile(rows[0].path)
    assert (copied.num_row_groups, copied.schema_arrow.names) == (2, ["image", "label"])
    assert list(sources.find("parquet", str(path), work)) == rows
    assert capsys.readouterr().out == ""
    faces(extra=list("vwxyz")).select([4, 3, 2, 1, 0]).to_parquet(path)
    again = list(sources.find("parquet", str(path), work))
    assert [row.image_id for row in again] == ["ann/4", "bob/3", "ann/2", "bob/1", "ann/0"]
    assert (read(again)[0] == PIXELS + 4).all()
    assert len(list(work.iterdir())) == 1


def test_rows_of_a_group_are_read_in_any_order(tmp_path, monkeypatch):
    monkeypatch.setattr(tables, "ROWS_AT_ONCE", 2)
    faces().to_parquet(tmp_path / "f.parquet")
    table = Table(tmp_path / "f.parquet")
    for row in (1, 0, 4, 4, 2, 3):
        assert (decode(table.image(row))[0] == PIXELS + row).all()
        assert len(table.images) <= 2


def test_a_damaged_page_takes_only_its_own_rows(tmp_path, monkeypatch):
    path = tmp_path / "f.parquet"
    pixels = np.random.default_rng(1).integers(0, 256, (24, 32, 3), dtype=np.uint8)
    content = {"image": [encoded(pixels + number) for number in range(6)]}
    pq.write_table(
        pa.table(content), path, compression="zstd", use_dictionary=False, data_page_size=1, write_batch_size=2
    )
    data = bytearray(path.read_bytes())
    middle = len(data) // 2
    data[middle - 2000 : middle + 2000] = bytes(4000)
    path.write_bytes(data)
    monkeypatch.setattr(tables, "ROWS_AT_ONCE", 2)
    monkeypatch.setattr(tables, "LARGEST_GROUP", 4)
    rows = list(sources.find("parquet", str(path), tmp_path / "work"))
    assert {row.path for row in rows} == {str(path)}
    found = list(sources.contents((row.path, row.row) for row in rows))
    assert [isinstance(one, bytes) for one in found[:2]] == [True, True]
    assert all("cannot be read" in str(one) for one in found[2:4])


def test_parquet_names_its_images_itself(tmp_path):
    pq.write_table(pa.table({"image": [encoded(PIXELS)], "image_id": ["x/1.jpg"]}), tmp_path / "f.parquet")
    assert found("parquet", tmp_path / "f.parquet") == [("x/1", None)]


def test_what_spark_leaves_beside_parquet_files_is_no_table(tmp_path):
    for name in ("faces.parquet/part-0.parquet", "faces.parquet/_temporary/part-1.parquet", ".part-2.parquet"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        pq.write_table(pa.table({"image": [encoded(PIXELS)]}), tmp_path / name)
    assert [image_id for image_id, _ in found("parquet", tmp_path)] == ["faces.parquet/part-0/000000"]


def test_a_folder_that_this_machine_does_not_see_is_no_damaged_image(tmp_path):
    Image.fromarray(PIXELS).save(tmp_path / "a.png")
    there, gone = str(tmp_path / "a.png"), str(tmp_path / "b.png")
    first, second = sources.contents([(there, None), (gone, None)])
    assert (type(first), str(second)) == (bytes, "cannot be read: No such file or directory")
    with pytest.raises(JobFailure, match=r"b\.png cannot be read on .*: No such file or directory; mend that"):
        list(sources.contents([(str(tmp_path / "not" / "mounted" / "b.png"), None)]))
    with pytest.raises(JobFailure, match=r"sees none of 2 images, of which .*b\.png is the last"):
        list(sources.contents([(gone, None), (gone, None)]))


def test_a_damaged_page_is_a_fault_of_the_file(tmp_path, monkeypatch):
    def image(self, row):
        raise OSError("Couldn't deserialize thrift: no data\nmore of it")

    pq.write_table(pa.table({"image": [encoded(PIXELS)]}), tmp_path / "f.parquet")
    monkeypatch.setattr(Table, "image", image)
    [told] = sources.contents([(str(tmp_path / "f.parquet"), 0)])
    assert str(told) == "cannot be read: Couldn't deserialize thrift: no data"


def test_parquet_of_no_clear_column(tmp_path):
    pq.write_table(pa.table({"a": [b"x"], "b": [b"y"]}), tmp_path / "two.parquet")
    with pytest.raises(UserError, match=r"two\.parquet has 2 columns that could hold images \(a, b\)"):
        found("parquet", tmp_path / "two.parquet")
    (tmp_path / "no.parquet").write_bytes(b"PAR1 not really")
    with pytest.raises(UserError, match=r"no\.parquet cannot be read as parquet"):
        Table(tmp_path / "no.parquet")


def test_the_hub_by_a_local_data_set(tmp_path, monkeypatch):
    (tmp_path / "data").mkdir()
    faces(image_id=[f"p/{number}" for number in range(5)]).to_parquet(tmp_path / "data" / "train.parquet")
    asked = []
    load = datasets.load_dataset

    def from_disk(name, subset, *, split):
        asked.append((name, subset, split))
        files = str(tmp_path / "data" / "train.parquet")
        return load("parquet", data_files={"train": files}, split=split, cache_dir=str(tmp_path / "cache"))

    monkeypatch.setattr(datasets, "load_dataset", from_disk)
    monkeypatch.setattr("jobs.oodface.tables.ROWS_PER_SHARD", 2)
    rows = list(sources.find("hub", "owner/faces:small@train", tmp_path / "work"))
    assert asked == [("owner/faces", "small", "train")]
    assert [(row.image_id, row.identity) for row in rows] == [
        (f"p/{number}", name) for number, name in enumerate(["ann", "bob", "ann", "bob", "ann"])
    ]
    for number, pixels in enumerate(read(rows)):
        assert (pixels == PIXELS + number).all()
    assert rows == list(sources.find("hub", "owner/faces:small@train", tmp_path / "work"))
    assert len({row.path for row in rows}) == 3


def test_the_real_client_offline_says_so(monkeypatch, tmp_path):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path)
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    with pytest.raises(UserError, match="nobody/no-such-faces is not in the local cache and the hub cannot be reached"):
        list(sources.find("hub", "nobody/no-such-faces", tmp_path))


@pytest.mark.parametrize(
    ("error", "told"),
    [
        (datasets.exceptions.DatasetNotFoundError("gone"), "the hub has no data set owner/faces"),
        (ValueError("Unknown split"), r"gives no split test of its default subset \(Unknown split\)"),
        (
            RuntimeError("Dataset scripts are no longer supported, but found faces.py"),
            r"owner/faces is made by a script .*faces\.py\); name a copy of it in parquet in oodface\.images",
        ),
    ],
)
def test_a_wrong_hub_data_set_is_told(monkeypatch, tmp_path, error, told):
    def load_dataset(*_, **__):
        raise error

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    with pytest.raises(UserError, match=told):
        list(sources.find("hub", "owner/faces@test", tmp_path))


def test_a_hub_data_set_without_images_or_name(monkeypatch, tmp_path):
    monkeypatch.setattr(datasets, "load_dataset", lambda *_, **__: datasets.Dataset.from_dict({"text": ["a"]}))
    with pytest.raises(UserError, match="owner/faces has no column of images, only text"):
        list(sources.find("hub", "owner/faces", tmp_path))
    with pytest.raises(UserError, match="hub:faces is no data set of the hub"):
        list(sources.find("hub", "faces", tmp_path))


@needs_shared
def test_lfw400():
    rows = list(sources.find("lfw", str(SHARED / "lfw400/images"), SHARED))
    assert len(rows) == 614
    assert not [row for row in rows if row.problem]
    assert len({row.identity for row in rows}) == 390


def test_a_file_too_large_or_gone_is_told(tmp_path, monkeypatch):
    put(tmp_path, "a.png")
    monkeypatch.setattr(sources, "LARGEST_FILE", 10)
    size = (tmp_path / "a.png").stat().st_size
    told = [str(one) for one in sources.contents([(str(tmp_path / "a.png"), None), (str(tmp_path / "b.png"), None)])]
    assert told == [f"has {size} bytes; at most 10 are read", "cannot be read: No such file or directory"]
