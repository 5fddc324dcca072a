"""Spark for the length of a block, and the catalogue of face images that it makes."""

from __future__ import annotations

import contextlib
import io
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import psutil
import pyarrow.parquet as pq
import pytest
from PIL import Image

from cluster import datasets, spark
from cluster.errors import JobFailure, UserError
from jobs.oodface import catalogue

ROOT = Path(__file__).parents[2]
SHARED = ROOT.parent / "shared/data/oodface"
COLUMNS = ("image_id", "readable", "problem", "duplicate", "group", "conflict")


def java_processes() -> set[int]:
    """The Java processes that this one started."""
    return {child.pid for child in psutil.Process().children(recursive=True) if child.name() == "java"}


@pytest.fixture(scope="module")
def session() -> Iterator:
    """One Spark for all tests of this file; what it leaves is looked at when it has ended."""
    handler, python = signal.getsignal(signal.SIGINT), os.environ.get("PYSPARK_PYTHON")
    before = java_processes()
    with spark.session("tests", 2) as session:
        started = java_processes() - before
        scratch = Path(session.conf.get("spark.local.dir"))
        yield session
    assert len(started) == 1
    assert not java_processes() & started
    assert not scratch.exists()
    assert signal.getsignal(signal.SIGINT) is handler
    assert os.environ.get("PYSPARK_PYTHON") == python


@pytest.fixture
def build(session, monkeypatch):
    """`catalogue.build` on the Spark that runs already."""
    monkeypatch.setattr(spark, "session", lambda *_: contextlib.nullcontext(session))
    return catalogue.build


@pytest.fixture
def fake_java(tmp_path, monkeypatch):
    """Puts a `java` first that says it is of some version."""

    def put(version: str | None) -> None:
        program = tmp_path / "bin" / "java"
        program.parent.mkdir(exist_ok=True)
        program.write_text(f"#!/bin/sh\necho 'openjdk version \"{version}\"'\n", encoding="utf-8")
        program.chmod(0o755)
        monkeypatch.delenv("JAVA_HOME", raising=False)
        monkeypatch.setenv("PATH", str(program.parent) if version else str(tmp_path / "nothing"), prepend=None)

    return put


def test_without_java_the_remedy_is_told(fake_java):
    fake_java(None)
    with (
        pytest.raises(UserError, match=r"Spark needs Java 17 or 21, and here is none; install Java 17 .*JAVA_HOME"),
        spark.session("x", 1),
    ):
        pass


def test_another_java_is_told(fake_java):
    fake_java("11.0.2")
    with pytest.raises(UserError, match=r"Java 17 or 21, and here is openjdk version"), spark.session("x", 1):
        pass


def test_importing_starts_and_loads_nothing():
    script = "import sys, cluster.spark, jobs.oodface.catalogue; print([m for m in sys.modules if m == 'pyspark'])"
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


@pytest.mark.parametrize(
    ("message", "kind", "told"),
    [
        ("Traceback ...\ncluster.errors.UserError: no place; mend it\n\tat java.x", UserError, "no place; mend it"),
        ("x\ncluster.errors.JobFailure: disk full\n SQLSTATE: 38000", JobFailure, "disk full"),
        ("o.a.s.SparkException: Job aborted\nCaused by: java.io.IOException: No space left", JobFailure,
         "Spark failed: java.io.IOException: No space left"),
        ("[NOT_FOUND] There is no table x.\nline 1", JobFailure, "Spark failed: [NOT_FOUND] There is no table x."),
        ("", JobFailure, "Spark failed: an unknown error"),
    ],
)  # fmt: skip
def test_a_failure_is_its_root_cause(message, kind, told):
    error = spark.told(message)
    assert (type(error), str(error)) == (kind, told)


def test_the_session_is_of_this_machine_alone(session):
    conf = session.sparkContext.getConf()
    assert session.sparkContext.uiWebUrl is None
    assert conf.get("spark.driver.host") == conf.get("spark.driver.bindAddress") == "127.0.0.1"
    listening = {
        connection.laddr.ip.removeprefix("::ffff:")
        for process in psutil.Process().children(recursive=True)
        if process.name() == "java"
        for connection in process.net_connections("inet")
        if connection.status == psutil.CONN_LISTEN
    }
    assert listening <= {"127.0.0.1", "::1"}


def test_workers_run_this_python_and_see_this_project(session):
    def where(batches):
        import pyarrow as pa

        import cluster

        for _ in batches:
            yield pa.RecordBatch.from_pydict({"python": [sys.executable], "project": [cluster.__path__[0]]})

    [row] = session.range(1).mapInArrow(where, "python string, project string").collect()
    assert row["python"] == sys.executable
    assert Path(row["project"]) == ROOT / "cluster"


def test_another_session_is_refused(session):
    with pytest.raises(UserError, match="a Spark session is open already in this process"), spark.session("second", 1):
        pass


def test_a_workers_error_comes_back_as_its_sentence(session, capfd):
    def fail(batches):
        raise JobFailure("the disk of this worker is full")
        yield from batches

    with pytest.raises(JobFailure, match=r"^the disk of this worker is full$"), spark._failures():
        session.range(5).mapInArrow(fail, "id long").collect()
    assert "Traceback" not in capfd.readouterr().err


def test_a_frame_is_saved_in_order_and_in_place_of_an_earlier_one(session, tmp_path):
    for count, shards in ((1000, 4), (90, 3), (2, 4)):
        frame = session.range(count).selectExpr(f"{count} - id as id", "cast(id as string) as text")
        manifest = spark.save(frame, tmp_path, {"count": count}, shards, ["id"])
        assert manifest == datasets.verify(tmp_path)
        rows = pq.read_table(manifest.files(tmp_path)).to_pylist()
        assert [row["id"] for row in rows] == list(range(1, count + 1))
        assert len(manifest.shards) == len(list(tmp_path.glob("*.parquet"))) == min(shards, count)
        assert session.read.parquet(str(tmp_path)).count() == count


@pytest.mark.slow
def test_a_java_process_that_dies_is_told():
    script = """
import psutil
from cluster import spark
from cluster.errors import JobFailure

try:
    with spark.session("x", 1) as session:
        [java] = [one for one in psutil.Process().children(recursive=True) if one.name() == "java"]
        java.kill()
        session.range(1).count()
except JobFailure as error:
    print(error)
"""
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.startswith("Spark's Java process has ended with status -9, perhaps for want of memory")
    assert "Traceback" not in done.stderr


@pytest.mark.slow
def test_ctrl_c_ends_spark_and_its_java_process(tmp_path):
    script = f"""
import time
from pathlib import Path
from cluster import spark

def wait(batches):
    Path({str(tmp_path / "up")!r}).touch()
    time.sleep(300)
    yield from batches

with spark.session("x", 1) as session:
    session.range(1).mapInArrow(wait, "id long").collect()
"""
    running = subprocess.Popen([sys.executable, "-c", script], cwd=ROOT, stderr=subprocess.PIPE, text=True)
    try:
        end = time.monotonic() + 240
        while not (tmp_path / "up").exists():
            assert time.monotonic() < end, "Spark did not start in 240 s"
            assert running.poll() is None
            time.sleep(0.2)
        children = psutil.Process(running.pid).children(recursive=True)
        assert any(child.name() == "java" for child in children)
        running.send_signal(signal.SIGINT)
        _, told = running.communicate(timeout=60)
    finally:
        running.kill()
    assert told.strip().splitlines()[-1] == "KeyboardInterrupt"
    assert "ERROR" not in told
    assert not psutil.wait_procs(children, timeout=20)[1]


def saved(pixels: np.ndarray, format: str = "PNG", **options) -> bytes:
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, format, **options)
    return file.getvalue()


def scene(seed: int) -> np.ndarray:
    coarse = np.random.default_rng(seed).integers(0, 256, (14, 12, 3), dtype=np.uint8)
    return np.asarray(Image.fromarray(coarse).resize((80, 96), Image.Resampling.BICUBIC))


@pytest.fixture
def faces(tmp_path) -> Path:
    """Duplicates of each kind, conflicts, one image_id twice, and files that cannot be read."""
    files = {
        "ann/1.png": saved(scene(1)),
        "ann/2.png": saved(scene(2)),
        "ann/3.jpg": saved(scene(2), "JPEG", quality=80),
        "bob/1.png": saved(scene(3)),
        "bob/copy.png": saved(scene(3)),
        "cy/1.png": saved(scene(4)),
        "dee/1.png": saved(scene(4)),
        "eve/1.png": saved(scene(5)[..., 0]),
        "eve/1.jpg": saved(scene(6), "JPEG"),
        "eve/cut.jpg": saved(scene(7), "JPEG")[:300],
        "eve/dot.png": saved(scene(8)[:1, :1]),
        "eve/none.png": b"",
    }
    for name, data in files.items():
        (tmp_path / "faces" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "faces" / name).write_bytes(data)
    return tmp_path / "faces"


def rows_of(made: catalogue.Catalogue) -> dict[str, dict]:
    rows = pq.read_table(made.manifest.files(made.folder)).to_pylist()
    return {Path(row["path"]).relative_to(made.folder.parent / "faces").as_posix(): row for row in rows}


def test_a_catalogue_of_every_kind_of_image(build, faces, tmp_path):
    made = build("folder", str(faces), tmp_path / "catalogue")
    rows = rows_of(made)
    assert len(rows) == made.manifest.rows == 12
    marks = {name: (row["duplicate"], row["group"], row["conflict"]) for name, row in rows.items()}
    assert marks["ann/1.png"] == (None, None, False)
    assert marks["ann/2.png"] == marks["ann/3.jpg"] == ("near", "ann/2", False)
    assert marks["bob/1.png"] == marks["bob/copy.png"] == ("exact", "bob/1", False)
    assert marks["cy/1.png"] == marks["dee/1.png"] == ("exact", "cy/1", True)
    problems = {name: row["problem"] for name, row in rows.items() if not row["readable"]}
    assert problems.pop("eve/cut.jpg").startswith("is truncated or damaged (")
    assert problems == {
        "eve/1.png": f"has the same image_id as {faces / 'eve/1.jpg'}",
        "eve/dot.png": "has 1 x 1 pixels; a side needs at least 16",
        "eve/none.png": "is empty",
    }
    assert (rows["bob/1.png"]["width"], rows["bob/1.png"]["height"], rows["bob/1.png"]["mode"]) == (80, 96, "RGB")
    summary = json.loads((made.folder / "_summary.json").read_text())
    assert summary == made.summary
    assert (summary["images"], summary["readable"], summary["identities"]) == (12, 8, 5)
    assert [row["image_id"] for row in summary["unreadable"]["list"]] == ["eve/1", "eve/cut", "eve/dot", "eve/none"]
    assert summary["duplicates"] == {
        "groups": 3,
        "exact": 4,
        "near": 2,
        "list": [{"images": ["ann/2", "ann/3"]}, {"images": ["bob/1", "bob/copy"]}, {"images": ["cy/1", "dee/1"]}],
    }
    assert summary["conflicts"] == {"count": 1, "list": [{"images": ["cy/1", "dee/1"], "identities": ["cy", "dee"]}]}
    assert not (made.folder / "_work").exists()


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_the_workers_of_a_cluster_make_the_same_catalogue(build, faces, tmp_path):
    here = rows_of(build("folder", str(faces), tmp_path / "catalogue"))
    arguments = ["folder", str(faces), str(tmp_path / "cluster"), "local-cluster[1,1,1024]"]
    script = (
        "import sys\nfrom pathlib import Path\nfrom jobs.oodface import catalogue\n"
        "layout, location, folder, master = sys.argv[1:]\n"
        "catalogue.build(layout, location, Path(folder), cores=1, master=master)"
    )
    subprocess.run([sys.executable, "-c", script, *arguments], cwd=ROOT, check=True, timeout=240)
    manifest = datasets.verify(tmp_path / "cluster")
    there = {
        Path(row["path"]).relative_to(faces).as_posix(): row
        for row in pq.read_table(manifest.files(tmp_path / "cluster")).to_pylist()
    }
    assert there == here


def test_a_spark_whose_workers_take_nothing_is_told(monkeypatch):
    monkeypatch.setattr(spark, "EXECUTOR_DEADLINE_S", 0)
    alone = SimpleNamespace(size=lambda: 1)
    context = SimpleNamespace(sc=lambda: SimpleNamespace(getExecutorMemoryStatus=lambda: alone))
    session = SimpleNamespace(sparkContext=SimpleNamespace(_jsc=context))
    with pytest.raises(UserError, match="no worker of the Spark at spark://busy:7077 took this job within 0 s"):
        spark._require_executor(session, "spark://busy:7077")


def test_a_spark_that_does_not_answer_is_told_at_once():
    with (
        pytest.raises(UserError, match=r"no Spark answers at cluster\.spark_master = spark://127\.0\.0\.1:9 \("),
        spark.session("x", 1, "spark://127.0.0.1:9"),
    ):
        pass


def test_a_finished_catalogue_is_kept_until_an_image_changes(build, faces, tmp_path, monkeypatch):
    first = build("folder", str(faces), tmp_path / "catalogue")
    with monkeypatch.context() as patch:
        patch.setattr(spark, "session", None)
        assert build("folder", str(faces), tmp_path / "catalogue") == first
    (faces / "ann" / "1.png").write_bytes(saved(scene(9)))
    changed = build("folder", str(faces), tmp_path / "catalogue")
    assert changed.manifest.digest != first.manifest.digest
    assert rows_of(changed)["ann/1.png"]["phash"] == catalogue.phash(scene(9))


def test_a_run_that_was_cut_off_looks_only_into_what_is_missing(build, faces, tmp_path, monkeypatch):
    monkeypatch.setattr(catalogue, "CHUNK", 5)
    looked = tmp_path / "catalogue" / "_work"
    with monkeypatch.context() as patch:
        patch.setattr(catalogue, "with_duplicates", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            build("folder", str(faces), tmp_path / "catalogue")
    [folder] = looked.glob("looked-*")
    kept = {path.name: path.stat().st_mtime_ns for path in folder.glob("part-*.parquet")}
    assert len(kept) == 3
    (folder / "part-00001.parquet").write_bytes(b"torn")
    with monkeypatch.context() as patch:
        patch.setattr(catalogue, "with_duplicates", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            build("folder", str(faces), tmp_path / "catalogue")
    again = {path.name: path.stat().st_mtime_ns for path in folder.glob("part-*.parquet")}
    assert {name for name in kept if kept[name] != again[name]} == {"part-00001.parquet"}
    assert build("folder", str(faces), tmp_path / "catalogue").summary["readable"] == 8


def test_no_readable_image_at_all_is_one_sentence(build, tmp_path):
    (tmp_path / "faces").mkdir()
    (tmp_path / "faces" / "a.png").write_bytes(b"no image")
    with pytest.raises(
        UserError, match=r"none of the 1 images of .* can be read; the first, .*a\.png, is no image in one"
    ):
        build("folder", str(tmp_path / "faces"), tmp_path / "catalogue")


def test_groups_are_the_components_of_near_hashes(session):
    """Against a search of all pairs: chains of hashes, each a few bits from the one before."""
    near, rng = 3, np.random.default_rng(3)
    hashes = [int(value) for value in rng.integers(0, 2**64, 40, dtype=np.uint64)]
    for start in hashes[:12]:
        value = start
        for _ in range(rng.integers(1, 7)):
            for bit in rng.choice(64, rng.integers(1, 5), replace=False):
                value ^= 1 << int(bit)
            hashes.append(value)
    hashes += hashes[:3]
    label = list(range(len(hashes)))
    for a in range(len(hashes)):
        for b in range(a):
            if (hashes[a] ^ hashes[b]).bit_count() <= near:
                old, new = max(label[a], label[b]), min(label[a], label[b])
                label = [new if one == old else one for one in label]
    ids = [f"{at:03d}" for at in range(len(hashes))]
    expected = {ids[at]: ids[label[at]] if label.count(label[at]) > 1 else None for at in range(len(hashes))}
    signed = [value - 2**64 * (value >> 63) for value in hashes]
    frame = session.createDataFrame(
        [(one, None, "p", None, one, value, True, None) for one, value in zip(ids, signed, strict=True)],
        "image_id string, identity string, path string, row long, sha256 string, phash long, readable boolean, "
        "problem string",
    )
    found = {row["image_id"]: row["group"] for row in catalogue.with_duplicates(frame, near).collect()}
    assert found == expected


@pytest.mark.skipif(not SHARED.exists(), reason="../shared/data/oodface is absent")
def test_the_catalogue_of_lfw400(build, tmp_path):
    summary = build("lfw", str(SHARED / "lfw400/images"), tmp_path / "catalogue").summary
    assert (summary["images"], summary["readable"], summary["identities"]) == (614, 614, 390)
    assert summary["duplicates"]["groups"] == summary["conflicts"]["count"] == 0
