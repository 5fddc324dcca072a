"""Shards without a cluster: what a shard holds, what decides it, what stands before a model, and what is refused."""

from __future__ import annotations

import io
import json
import os
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
import torch
from datasets import load_dataset
from PIL import Image

from cluster import datasets
from cluster.config import load
from cluster.errors import UserError
from jobs.oodface import drawn, pipeline, scoring, work
from jobs.oodface.config import Corrupt, OodfaceConfig
from jobs.oodface.defences import defended
from jobs.oodface.faces import sface, yunet
from jobs.oodface.faces.align import ARCFACE_96, DLIB, DLIB_YUNET
from jobs.oodface.faces.detector import load_detector
from jobs.oodface.job import catalogue_lines
from jobs.oodface.protocols import Pairs
from jobs.oodface.protocols import load as load_pairs
from jobs.oodface.randomness import keys
from jobs.oodface.run import Run, dry_run, prepare, work_plan
from jobs.oodface.scenarios import SCENARIOS, selected
from jobs.oodface.variations.base import fitting
from jobs.oodface.work import CLEAN, Embedder, Faces, Plan, Shard, Writer, _points, bits, encoder

CONDITIONS = (CLEAN, ("fog", 2), ("zoom_blur", 5), ("makeup", 3))


def plan(batch_size: int) -> Plan:
    return Plan(CONDITIONS, 0, True, None, batch_size)


@pytest.fixture(scope="module")
def shard() -> Shard:
    generator = np.random.default_rng(0)
    pixels = [generator.integers(0, 255, (90 + 10 * one, 120, 3), dtype=np.uint8) for one in range(5)]
    return Shard(0, [f"p{one}/i" for one in range(5)], ["p0", "p1", None, "p3", "p4"], pixels)


def test_a_shard_does_not_depend_on_the_batch(shard, tmp_path):
    tables = [Writer(plan(size), Corrupt(), tmp_path)(shard) for size in (2, 128)]
    assert tables[0].equals(tables[1])
    assert tables[0].num_rows == 5 * len(CONDITIONS)
    assert tables[0]["found"].to_pylist() == [False] * tables[0].num_rows  # noise is no face
    assert tables[0].schema == Writer(plan(2), Corrupt(), tmp_path).empty().schema
    first = Image.open(io.BytesIO(tables[0]["image"][0].as_py()["bytes"]))
    assert first.size == (112, 112)


def test_batches_of_16_and_128_give_the_same_bits_in_every_scenario(shard, tmp_path):
    faces = [(one, person) for one in range(4) for person in range(5)]
    pixels = [np.roll(shard.pixels[person], one, axis=1) for one, person in faces]
    many = Shard(0, [f"p{person}/{one}" for one, person in faces], [None] * len(faces), pixels)
    conditions = tuple((name, 3) for name in selected(("corruptions", "variations", "extensions")))
    plans = (Plan(conditions, 0, True, None, size) for size in (16, 128))
    first, second = (Writer(one, Corrupt(), tmp_path)(many) for one in plans)
    assert first.equals(second)
    assert first.num_rows == 20 * 32


def test_folders_hold_the_files_that_the_table_names(shard, tmp_path):
    dials = Corrupt(output="folders", format="jpeg", template="dlib_yunet")
    table = Writer(plan(16), dials, tmp_path)(shard)
    shard_file = tmp_path / datasets.write_shard(tmp_path, 0, table).file
    assert pipeline.files_present(shard_file, tmp_path)
    for row in table.to_pylist():
        path = tmp_path / row["file"]
        assert path.parts[-4:-2] == (row["scenario"], str(row["severity"]))
        assert Image.open(path).size == (150, 150)
    assert not list(tmp_path.rglob(".writing*"))
    (tmp_path / table["file"][3].as_py()).write_bytes(b"")
    assert not pipeline.files_present(shard_file, tmp_path)


def test_files_are_on_the_disk_before_their_table_is(shard, tmp_path, monkeypatch):
    synced: set[int] = set()

    def fsync(handle: int) -> None:
        synced.add(os.fstat(handle).st_ino)

    monkeypatch.setattr(os, "fsync", fsync)
    table = Writer(plan(16), Corrupt(output="folders"), tmp_path / "run" / "images")(shard)
    wanted = [tmp_path / "run", *(tmp_path / "run").rglob("*")]
    assert len([path for path in wanted if path.is_file()]) == table.num_rows
    assert {path.stat().st_ino for path in wanted} <= synced


def test_embeddings_have_a_row_a_model_and_defence(shard):
    embedder = Embedder(plan(16), ["dlib_resnet"], ["jpeg"])
    table = embedder(shard)
    assert table.num_rows == 5 * len(CONDITIONS) * 2
    assert embedder.empty().schema == table.schema
    told = {"found": [True], "faces": [2]}
    other = work._embedding_rows(["a"], *CLEAN, "none", "larger", told, np.ones((1, 512), np.float32))
    assert pa.concat_tables([table, other]).num_rows == table.num_rows + 1
    assert list(scoring._by_condition(embedder.empty())) == []
    norms = np.linalg.norm(np.array(table["embedding"].to_pylist()), axis=1)
    assert norms == pytest.approx(1, abs=1e-5)
    assert set(embedder.clock.seconds) == {"align", "distort", "embed"}
    pairs = Pairs(
        np.array([0, 0, 1]), np.array([True, False, True]), ("p0/i", "p1/i", "p2/i"), ("p3/i", "p4/i", "?"), ()
    )
    rows = {condition: (ids, found) for condition, ids, found in scoring._by_condition(table.slice(0, 5))}
    assert list(rows) == [CLEAN]
    scores = scoring.pair_scores(pairs, *rows[CLEAN])
    assert np.isnan(scores[2])
    assert (np.abs(scores[:2]) <= 1).all()


def test_shards_are_images_to_the_datasets_library(shard, tmp_path):
    table = Writer(plan(16), Corrupt(), tmp_path)(shard)
    folder = tmp_path / "shards"
    datasets.prepare(folder, {})
    for index in range(2):
        datasets.write_shard(folder, index, table)
    datasets.finish(folder, {}, range(2))
    files = f"{folder}/part-*.parquet"  # as docs/oodface.md says
    rows = load_dataset("parquet", data_files=files, split="train", cache_dir=str(tmp_path / "cache"))
    assert len(rows) == 2 * table.num_rows
    assert rows[0]["image"].size == (112, 112)


def test_no_image_is_written_outside_the_folder(shard, tmp_path):
    for name in ("/outside", "../../../outside", "a/../../../../outside"):
        away = Shard(0, [name], [None], shard.pixels[:1])
        with pytest.raises(UserError, match="would be written outside"):
            Writer(plan(16), Corrupt(output="folders"), tmp_path / "images")(away)
    assert not list(tmp_path.rglob("outside*"))


@pytest.mark.parametrize("format", ["png", "webp"])
def test_lossless_files_give_the_pixels_back(format):
    images = torch.randint(0, 256, (2, 3, 20, 30)).float() / 255
    images[1, :, 0, 0] = torch.tensor([-0.01, 1.01, 2.0])
    for image, file in zip(images.clamp(0, 1), map(encoder(format, 95), bits(images)), strict=True):
        pixels = np.asarray(Image.open(io.BytesIO(file)).convert("RGB"))
        assert np.array_equal(pixels, (image * 255).round().byte().permute(1, 2, 0).numpy())


def test_scores_of_which_nothing_is_left_are_refused_and_an_empty_shard_is_none(tmp_path, monkeypatch):
    dials = load(OodfaceConfig, sets=["oodface.scenarios=[fog]", "oodface.severities=[1]"], environ={}).oodface
    files = []
    for index, images in enumerate([(), ("a", "b", "c", "d")]):
        none = {"found": [], "faces": []}
        tables = [work._embedding_rows([], *CLEAN, "none", "", none, np.zeros((0, 1), np.float32))]
        for condition in (CLEAN, ("fog", 1)):
            turned = (
                np.eye(4, dtype=np.float32)[[0, 0, 1, 2]][: len(images)] if images else np.zeros((0, 4), np.float32)
            )
            told = {"found": [True] * len(images), "faces": [1] * len(images)}
            tables.append(work._embedding_rows(images, *condition, "none", "m", told, turned))
        written = datasets.write_shard(tmp_path, index, pa.concat_tables(tables))
        files.append(tmp_path / written.file)
    pairs = Pairs(np.array([0, 0]), np.array([True, False]), ("a", "c"), ("b", "d"), ("1", "2"))
    found = scoring.score(files, pairs, (CLEAN, ("fog", 1)), dials)
    assert found["metrics"]["m"]["fixed/acc/fog/1"]["value"] == 1
    monkeypatch.setattr(scoring, "IN_MEMORY", 1)  # a condition at a time
    read, rows = scoring.pq.read_table, []

    def reading(file: Path, **settings: object) -> pa.Table:
        table = read(file, **settings)
        rows.append(table.num_rows if "filters" in settings else 0)
        return table

    monkeypatch.setattr(scoring.pq, "read_table", reading)
    assert scoring.score(files, pairs, (CLEAN, ("fog", 1)), dials) == found
    assert sum(rows) == 2 * 4  # every row once
    assert scoring._size(files, "m") == 4
    with pytest.raises(UserError, match="not one image could be read"):
        scoring.score(files[:1], pairs, (CLEAN, ("fog", 1)), dials)


def test_a_face_that_is_not_found_in_a_dlib_chip_has_the_chips_points():
    for template, points in (
        (DLIB, DLIB_YUNET.points),
        (DLIB_YUNET, DLIB_YUNET.points),
        (ARCFACE_96, ARCFACE_96.points),
    ):
        crops = torch.zeros(1, 3, template.height, template.width)
        placed = fitting(torch.full((1, 5, 2), float("nan")), crops, _points(template))
        assert torch.allclose(placed[0], torch.tensor(points), atol=1e-3)


def test_drawn_people_have_faces_and_pairs(tmp_path):
    written = drawn.write(tmp_path / "drawn", people=20, shots=2)
    dials = load(OodfaceConfig, files=[written], environ={}).oodface
    pairs = load_pairs("csv", Path(dials.evaluate.pairs))
    assert sorted(zip(pairs.fold.tolist(), pairs.same.tolist(), strict=True)) == [
        (fold, same) for fold in range(10) for same in (False, False, True, True)
    ]
    people = [{image.split("/")[0] for image in pair} for pair in zip(pairs.image_a, pairs.image_b, strict=True)]
    assert [len(one) == 1 for one in people] == pairs.same.tolist()
    assert all((Path(dials.images) / f"{image}.png").exists() for image in pairs.images())
    images = [drawn.portrait(drawn.Person.of(one), one) for one in range(4)]
    faces, _ = load_detector().portraits([torch.tensor(np.asarray(one)).permute(2, 0, 1) / 255 for one in images])
    assert all(face is not None and face.score > 0.7 for face in faces)
    assert np.array_equal(np.asarray(images[0]), np.asarray(drawn.portrait(drawn.Person.of(0), 0)))
    with pytest.raises(UserError, match="is not empty"):
        drawn.write(tmp_path / "drawn")


def test_defences_do_what_they_say():
    images = torch.rand(3, 3, 40, 60)
    drawn = keys(["a", "b", "c"], "resize_pad", 0)
    [steps] = defended(images, "bit_depth", drawn)
    assert set((steps * 255).round().int().unique().tolist()) <= {*range(0, 256, 8), 255}
    assert (steps - images).abs().max() <= 4 / 255 + 1e-6
    forms = defended(images, "resize_pad", drawn)
    assert len(forms) == 10
    assert all(((form.sum(1) == 0).float().mean((1, 2)) < 0.2).all() for form in forms)
    assert torch.equal(forms[0], defended(images, "resize_pad", drawn)[0])
    assert not torch.equal(forms[0], forms[1])


def test_scenarios_are_chosen_by_name_category_or_group():
    assert selected(["sensor", "fog"]) == ["fog", "defocus_blur", "color_shift", "pixelate"]
    thirty, extensions = selected(["corruptions", "variations"]), ["elastic_transform", "face_mask"]
    assert len(thirty) == 30
    assert selected(load(OodfaceConfig, environ={}).oodface.scenarios) == thirty
    assert selected(["Extensions", "corruptions", "variations"]) == [*SCENARIOS] == thirty + extensions
    for name, near in (("make-up", "makeup"), ("corruption", "corruptions"), ("Sensors", "Sensor")):
        with pytest.raises(UserError, match=f"did you mean {near}"):
            selected([name])


def test_a_run_is_named_by_what_decides_its_result(tmp_path, monkeypatch, capsys):
    (tmp_path / "pairs.csv").write_text("fold,same,image_a,image_b\n0,1,a/a_0001,a/a_0002\n0,0,a/a_0001,b/b_0001\n")
    monkeypatch.setenv("RAYWARD_STORAGE", str(tmp_path / "results"))
    base = [f"oodface.images={tmp_path}", f"oodface.evaluate.pairs={tmp_path / 'pairs.csv'}"]
    base += ["oodface.evaluate.models=[dlib_resnet]", "oodface.scenarios=[fog]"]

    def identity(*sets: str) -> str:
        config = load(OodfaceConfig, sets=[*base, *sets])
        return prepare(config, None, "", "evaluate").state["identity"]

    assert identity("oodface.num_workers=2", "oodface.batch_size=7") == identity()
    assert identity("oodface.severities=[5,1,2,3,4,4]") == identity()
    others = ["oodface.seed=1", "oodface.severities=[1]", "oodface.evaluate.resamples=500", "oodface.scenarios=[snow]"]
    assert len({identity(one) for one in others} | {identity()}) == 5
    dry_run(load(OodfaceConfig, sets=base), "evaluate")
    assert "6 versions of each image: fog" in capsys.readouterr().out
    assert not (tmp_path / "results").exists()


def test_shards_that_no_column_holds_are_refused():
    sets = ["oodface.images=.", "oodface.faces_per_shard=100000"]
    with pytest.raises(UserError, match=r"faces_per_shard = 100000 x 151 versions .* lower it to \d+"):
        prepare(load(OodfaceConfig, sets=sets, environ={}), None, "", "corrupt")


@pytest.mark.parametrize(
    ("sets", "told"),
    [
        ([], "oodface.images is not set"),
        (["oodface.images=.", "oodface.evaluate.pairs=x", "oodface.frost=/nowhere"], "/nowhere|x"),
        (["oodface.images=."], "oodface.evaluate.pairs is not set"),
    ],
)
def test_what_is_missing_is_asked_for(sets, told):
    with pytest.raises(UserError, match=told):
        prepare(load(OodfaceConfig, sets=sets, environ={}), None, "", "evaluate")


def test_a_user_reads_what_is_wrong_with_the_images():
    summary = {
        "images": 9,
        "readable": 2,
        "identities": 1,
        "unreadable": {"count": 7, "list": [{"path": f"{one}.png", "problem": "is empty"} for one in range(7)]},
        "duplicates": {"groups": 1, "exact": 2, "near": 0, "list": []},
        "conflicts": {"count": 1, "list": [{"group": "a", "images": ["a", "b"], "identities": ["x", "y"]}]},
    }
    lines = catalogue_lines(summary)
    assert lines[0] == "2 of 9 images can be read, of 1 identities"
    assert lines[1] == "left out: 0.png is empty"
    assert lines[6] == "left out: 2 more, listed in the catalogue"
    assert lines[-1] == "one picture under two names: a, b"


@pytest.mark.parametrize("gpus", [1.5, 2])
def test_a_worker_has_one_gpu_at_most(gpus):
    with pytest.raises(UserError, match=r"oodface\.gpus_per_worker.* 1"):
        load(OodfaceConfig, sets=[f"oodface.gpus_per_worker={gpus}"], environ={})


def test_photographs_pass_in_parts_and_make_the_same_shard(shard, tmp_path, monkeypatch):
    whole = Writer(plan(16), Corrupt(), tmp_path)(shard)
    sizes = [one.shape[0] * one.shape[1] for one in shard.pixels]
    monkeypatch.setattr(work, "PIXELS_AT_ONCE", sizes[0] + sizes[1])
    parts = [len(part) for part in work._in_parts(shard.pixels)]
    assert parts == [2, 1, 1, 1]
    assert Writer(plan(16), Corrupt(), tmp_path)(shard).equals(whole)
    monkeypatch.setattr(work, "PIXELS_AT_ONCE", 1)
    assert [len(part) for part in work._in_parts(shard.pixels)] == [1] * 5


def test_shards_name_their_stand_ins_and_floats_become_the_nearest_bits(shard, tmp_path):
    writer = Writer(replace(plan(16), truncate=False), Corrupt(), tmp_path)
    assert json.loads(writer.empty().schema.metadata[b"procedural_stand_ins"]) == ["makeup"]
    fog = Writer(Plan((("fog", 1),), 0, True, None, 16), Corrupt(), tmp_path)
    assert b"procedural_stand_ins" not in fog.empty().schema.metadata
    crops = writer.faces.aligned(shard, [ARCFACE_96])["arcface_96"].images
    assert not torch.equal(crops * 255, (crops * 255).round())
    assert np.array_equal(bits(crops), (crops.clamp(0, 1) * 255).round().byte().numpy())


def test_frost_of_ones_own_is_known_by_its_content(tmp_path):
    sizes = {"frost1.png": 200, "frost2.png": 210, "frost4.jpg": 220, "frost5.jpg": 230}
    for name, side in sizes.items():
        Image.new("RGB", (side, side), (side, 0, 0)).save(tmp_path / name)
    config = load(OodfaceConfig, sets=["oodface.images=.", f"oodface.frost={tmp_path}"], environ={})
    before = prepare(config, None, "", "corrupt").state["identity"]
    assert prepare(config, None, "", "corrupt").state["identity"] == before
    Image.new("RGB", (200, 200), (1, 2, 3)).save(tmp_path / "frost1.png")
    assert prepare(config, None, "", "corrupt").state["identity"] != before


def test_a_detector_of_ones_own_is_known_by_its_file(tmp_path):
    own = tmp_path / "yunet.onnx"
    own.write_bytes(yunet.WEIGHTS.locate().read_bytes())

    def run(*sets: str) -> Run:
        return prepare(load(OodfaceConfig, sets=["oodface.images=.", *sets], environ={}), None, "", "corrupt")

    found = run(f"oodface.detector.path={own}", "oodface.detector.threshold=0.9", "oodface.detector.longest_side=320")
    detector = Faces(work_plan(found.config, ())).detector
    assert (detector.threshold, detector.longest) == (0.9, 320)
    assert torch.equal(detector.network.stem.weight, load_detector().network.stem.weight)
    ids = [one.state["identity"] for one in (run(), run(f"oodface.detector.path={own}"), found)]
    assert len(set(ids)) == 3
    other = tmp_path / "moved.onnx"
    other.write_bytes(own.read_bytes())
    assert run(f"oodface.detector.path={other}").state["identity"] == ids[1]
    own.write_bytes(sface.WEIGHTS.locate().read_bytes())
    with pytest.raises(UserError, match=r"yunet\.onnx holds another network"):
        run(f"oodface.detector.path={own}")
