"""The models by name, a user's own ONNX file, and what is told when either is not there."""

from __future__ import annotations

import csv
import logging
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from pydantic import ValidationError

from cluster.errors import UserError
from jobs.oodface.faces import models, onnx_model, sface
from jobs.oodface.faces.align import DLIB_YUNET, TEMPLATES
from jobs.oodface.faces.config import BUILT_IN, OwnFace
from jobs.oodface.faces.models import FaceModel, load

onnx = pytest.importorskip("onnx")
pytest.importorskip("onnxruntime")

SHARED = Path(__file__).parents[3] / "shared/data/oodface/lfw400"
needs_shared = pytest.mark.skipif(not SHARED.exists(), reason="../shared/data/oodface is absent")


def write_model(path: Path, shape: list[int | str], channels_last: bool = False, output: str = "embedding") -> Path:
    """A network that gives each quarter-size patch's red channel as it arrives: no weights, easy to compute by hand.

    output: embedding (batch, pixels of the first channel) or total (one number for all images).
    """
    make = onnx.helper.make_node
    start = [make("Transpose", ["image"], ["nchw"], perm=[0, 3, 1, 2])] if channels_last else []
    image = "nchw" if channels_last else "image"
    nodes = [
        *start,
        make("AveragePool", [image], ["pooled"], kernel_shape=[4, 4], strides=[4, 4]),
        make("Gather", ["pooled", "channel"], ["red"], axis=1),
        make("Flatten", ["red"], ["out"]) if output == "embedding" else make("ReduceSum", ["red"], ["out"], keepdims=0),
    ]
    info, floats = onnx.helper.make_tensor_value_info, onnx.TensorProto.FLOAT
    outputs = [info("out", floats, ["batch", "dim"] if output == "embedding" else [])]
    channel = onnx.numpy_helper.from_array(np.array(0), "channel")
    graph = onnx.helper.make_graph(nodes, "g", [info("image", floats, shape)], outputs, [channel])
    opset = [onnx.helper.make_opsetid("", 17)]
    onnx.save_model(onnx.helper.make_model(graph, opset_imports=opset, ir_version=9), path)
    return path


def own(path: Path, **settings: object) -> OwnFace:
    return OwnFace(name="mine", path=str(path), **settings)


@pytest.fixture(scope="module")
def loaded() -> dict[str, FaceModel]:
    return {name: load(name) for name in BUILT_IN}


@pytest.mark.parametrize("name", BUILT_IN)
def test_built_in_models_give_embeddings_of_length_one(loaded, name):
    model = loaded[name]
    crops = torch.rand(11, 3, model.template.height, model.template.width)
    embeddings = model.embed(crops)
    assert model.name == name
    assert len(model.version) == 64
    assert embeddings.shape == (11, 128)
    assert embeddings.dtype == torch.float32
    torch.testing.assert_close(embeddings.norm(dim=1), torch.ones(11))
    torch.testing.assert_close(embeddings[7:9], model.embed(crops[7:9]), rtol=0, atol=2e-6)


@pytest.mark.parametrize("name", BUILT_IN)
def test_half_precision_is_near(loaded, name):
    model = loaded[name]
    crops = F.interpolate(torch.rand(2, 3, 9, 9), (model.template.height, model.template.width), mode="bilinear")
    plain, half = model.embed(crops), load(name, dtype=torch.bfloat16).embed(crops)
    assert half.dtype == torch.float32
    assert F.cosine_similarity(plain, half).min() > 0.98


def test_an_unknown_name_gets_the_nearest():
    with pytest.raises(
        UserError, match="no face model 'dlib-resnet'; the nearest of sface, dlib_resnet is dlib_resnet"
    ):
        load("dlib-resnet")
    with pytest.raises(UserError, match="is sface"):
        load("S-Face")


def test_names_agree_between_configuration_and_code():
    assert tuple(models._READERS) == BUILT_IN
    for name in TEMPLATES:
        assert OwnFace(name="mine", path="x.onnx", template=name).template == name
    with pytest.raises(ValidationError, match="taken by a model"):
        OwnFace(name="sface", path="x.onnx")
    with pytest.raises(ValidationError, match="greater than 0"):
        OwnFace(name="mine", path="x.onnx", std=(1, 0, 1))


@pytest.mark.parametrize(
    ("module", "absent"),
    [("config", {"torch", "onnx", "onnxruntime"}), ("models", {"onnx", "onnxruntime", "torchvision", "dlib", "cv2"})],
)
def test_an_import_loads_nothing_that_only_some_need(module, absent):
    code = f"import sys, jobs.oodface.faces.{module}; sys.exit(bool({absent} & sys.modules.keys()))"
    assert subprocess.run([sys.executable, "-c", code], cwd=Path(__file__).parents[2], timeout=120).returncode == 0


@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("batch", ["n", 1, 3])
def test_an_onnx_model_sees_pixels_as_configured(tmp_path, channels_last, batch):
    shape = [batch, 8, 12, 3] if channels_last else [batch, 3, 8, 12]
    path = write_model(tmp_path / "net.onnx", shape, channels_last)
    model = load(own(path, mean=(10, 20, 30), std=(2, 4, 8)))
    crops = torch.rand(5, 3, 8, 12)
    wanted = F.avg_pool2d(((crops * 255) - 10) / 2, 4)[:, 0].flatten(1)
    torch.testing.assert_close(model.embed(crops), F.normalize(wanted))
    swapped = load(own(path, mean=(10, 20, 30), std=(2, 4, 8), colour="bgr"))
    wanted = F.avg_pool2d(((crops[:, 2:] * 255) - 10) / 2, 4).flatten(1)
    torch.testing.assert_close(swapped.embed(crops), F.normalize(wanted))


def test_the_size_comes_from_the_file_the_user_or_the_template(tmp_path):
    open_size = write_model(tmp_path / "open.onnx", ["n", 3, "h", "w"])
    fixed = write_model(tmp_path / "fixed.onnx", ["n", 3, 160, 160])
    crops = torch.rand(2, 3, 112, 96)
    assert load(own(open_size, template="arcface_96")).embed(crops).shape == (2, 28 * 24)
    assert load(own(open_size, size=(32, 16))).embed(crops).shape == (2, 8 * 4)
    model = load(own(fixed))
    assert model.network.size == (160, 160)
    resized = F.interpolate(crops, (160, 160), mode="bilinear", align_corners=False)
    torch.testing.assert_close(model.embed(crops), model.embed(resized))
    with pytest.raises(UserError, match="takes images of 160x160 px, and the size of mine is set to 112x112"):
        load(own(fixed, size=(112, 112)))


def test_the_version_of_an_onnx_model_is_its_content(tmp_path):
    one, two = (write_model(tmp_path / f"{side}.onnx", ["n", 3, side, side]) for side in (16, 32))
    assert load(own(one)).version != load(own(two)).version


def test_weights_beside_an_onnx_model_belong_to_its_version(tmp_path):
    model = onnx.load(write_model(tmp_path / "net.onnx", ["n", 3, 16, 16]))
    versions, graphs = set(), set()
    for channel in (0, 1):
        model.graph.initializer[0].CopyFrom(onnx.numpy_helper.from_array(np.array(channel), "channel"))
        (tmp_path / "net.onnx.data").unlink(missing_ok=True)  # onnx would append to it
        settings = {"save_as_external_data": True, "location": "net.onnx.data", "size_threshold": 0}
        onnx.save_model(onnx.ModelProto.FromString(model.SerializeToString()), tmp_path / "net.onnx", **settings)
        versions.add(load(own(tmp_path / "net.onnx")).version)
        graphs.add((tmp_path / "net.onnx").read_bytes())
    assert (len(versions), len(graphs)) == (2, 1)
    (tmp_path / "net.onnx.data").unlink()
    with pytest.raises(UserError, match=r"net\.onnx keeps weights in .*net\.onnx\.data, which is missing"):
        load(own(tmp_path / "net.onnx"))


def test_what_is_no_embedding_model_is_refused(tmp_path):
    with pytest.raises(UserError, match="there is no file"):
        load(own(tmp_path / "absent.onnx"))
    damaged = tmp_path / "damaged.onnx"
    for content in (b"", b"hello" * 10, b"\x80\x04K\x01."):
        damaged.write_bytes(content)
        with pytest.raises(UserError, match="onnxruntime cannot load"):
            load(own(damaged))
    with pytest.raises(UserError, match="must take float32 images of 3 channels and nothing else"):
        load(own(sface.WEIGHTS.locate()))
    with pytest.raises(UserError, match="must take float32 images"):
        load(own(write_model(tmp_path / "grey.onnx", ["n", 1, 16, 16])))
    with pytest.raises(UserError, match="cannot embed two images"):
        load(own(write_model(tmp_path / "total.onnx", ["n", 3, 16, 16], output="total")))


def test_without_onnxruntime_an_onnx_model_is_refused(tmp_path, monkeypatch):
    path = write_model(tmp_path / "net.onnx", ["n", 3, 16, 16])
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    with pytest.raises(UserError, match="needs the package onnxruntime"):
        load(own(path))


@needs_shared
@pytest.mark.parametrize("name", [*BUILT_IN, "dlib_resnet by the detector's landmarks"])
def test_pairs_of_lfw_are_told_apart(name, loaded):
    """40 pairs at the thresholds of the models' makers: cosine .363 (OpenCV), distance .6 (dlib)."""
    from torchvision.io import ImageReadMode, decode_image

    from jobs.oodface.faces.align import align
    from jobs.oodface.faces.detector import load_detector

    model = loaded[name.partition(" ")[0]]
    if name not in BUILT_IN:
        model = replace(model, template=DLIB_YUNET)
    with (SHARED / "pairs.csv").open() as file:
        pairs = [row for row in csv.DictReader(file) if row["fold"] == "0"]
    names = sorted({pair[side] for pair in pairs for side in ("image_a", "image_b")})
    images = [decode_image(str(SHARED / "images" / found), ImageReadMode.RGB) / 255 for found in names]
    aligned = align(images, load_detector().portraits(images)[0], model.template)
    assert aligned.found.all()
    raw = model.network(aligned.crops).detach()
    by_name = dict(zip(names, raw, strict=True))
    right = 0
    for pair in pairs:
        a, b = by_name[pair["image_a"]], by_name[pair["image_b"]]
        same = a @ b >= 0.363 if model.name == "sface" else (a - b).norm() <= 0.6
        right += bool(same) == (pair["same"] == "1")
    assert right >= 39


def test_without_a_gpu_build_onnx_models_say_once_that_processors_compute_them(tmp_path, monkeypatch, caplog):
    import onnxruntime

    made, made_with = [], onnxruntime.InferenceSession

    def session(path, options, providers):
        made.append((options.intra_op_num_threads, providers))
        return made_with(path, options, providers=["CPUExecutionProvider"])

    monkeypatch.setattr(onnxruntime, "InferenceSession", session)
    monkeypatch.setattr(onnxruntime, "get_available_providers", lambda: ["CPUExecutionProvider"])
    onnx_model._warn.cache_clear()
    path = write_model(tmp_path / "a.onnx", ["batch", 3, 112, 112])
    with caplog.at_level(logging.WARNING):
        for _ in range(2):
            load(own(path), "cuda", threads=7)
    assert [one.getMessage() for one in caplog.records] == [
        "ONNX models run on 7 threads of processors, not on the GPU: this build of onnxruntime has no "
        "CUDAExecutionProvider; put the package onnxruntime-gpu in its place to use the GPU"
    ]
    assert made == [(7, ["CPUExecutionProvider"])] * 4
    monkeypatch.setattr(
        onnxruntime, "get_available_providers", lambda: ["CUDAExecutionProvider", "CPUExecutionProvider"]
    )
    load(own(path), "cuda")
    assert made[-1] == (
        torch.get_num_threads(),
        [("CUDAExecutionProvider", {"use_tf32": "0"}), "CPUExecutionProvider"],
    )
