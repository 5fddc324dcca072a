"""Weight files: read as their makers mean them, and refused when they are missing, damaged or of another kind."""

from __future__ import annotations

import hashlib
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from cluster.errors import UserError
from jobs.oodface.faces import dlib_resnet, sface, yunet
from jobs.oodface.faces.dlib_format import _Stream, read_network
from jobs.oodface.faces.onnx_layers import read_layers
from jobs.oodface.faces.weights import PackagedFile, fill

onnx = pytest.importorskip("onnx")


def encoded(value: int) -> bytes:
    """An integer in dlib's serialisation."""
    digits = abs(value).to_bytes(max(1, (abs(value).bit_length() + 7) // 8), "little")
    return bytes([len(digits) | (0x80 if value < 0 else 0)]) + digits


def stream(content: bytes) -> _Stream:
    return _Stream(content, Path("net.dat"))


@given(st.lists(st.integers(-(2**63) + 1, 2**63 - 1), min_size=1))
def test_dlibs_integers(values):
    read = stream(b"".join(encoded(value) for value in values))
    assert [read.integer() for _ in values] == values
    assert read.at_end


@given(st.integers(-(2**53), 2**53), st.integers(-200, 200))
def test_dlibs_reals(mantissa, exponent):
    assert stream(encoded(mantissa) + encoded(exponent)).real() == mantissa * 2.0**exponent


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"", "ends at byte 0"),
        (b"\x02\x01", "2 more are due at byte 1"),
        (b"\x00", "begins no integer"),
        (b"\x0f" + bytes(15), "begins no integer"),
        (b"\x12\x01\x01", "begins no integer"),
    ],
)
def test_what_is_no_integer_is_refused(content, reason):
    with pytest.raises(UserError, match=reason):
        stream(content).integer()


def test_a_tensor_of_negative_or_huge_size_is_refused():
    version = encoded(2)
    with pytest.raises(UserError, match="has the size"):
        stream(version + b"".join(encoded(size) for size in (-1, -1, 1, 1))).tensor()
    with pytest.raises(UserError, match="more are due"):
        stream(version + b"".join(encoded(2**40) for _ in range(4))).tensor()


def test_dlibs_file_holds_the_network_of_its_recipe():
    network = read_network(dlib_resnet.WEIGHTS.locate())
    assert (network.rows, network.columns) == (150, 150)
    assert network.mean == pytest.approx((122.782, 117.001, 104.298))
    assert sum(layer.name == "con_4" for layer in network.layers) == 29


@pytest.mark.parametrize("kept", [0, 3, 100, 5_000, 22_466_065])
def test_a_cut_dlib_file_is_refused(tmp_path, kept):
    cut = tmp_path / "net.dat"
    cut.write_bytes(dlib_resnet.WEIGHTS.locate().read_bytes()[:kept])
    with pytest.raises(UserError, match=r"net\.dat"):
        dlib_resnet.read_dlib_resnet(cut)


def test_other_content_is_no_dlib_network(tmp_path):
    content = dlib_resnet.WEIGHTS.locate().read_bytes()
    other = tmp_path / "net.dat"
    for bad in (content + b"\x01\x05relu_", content.replace(b"relu_", b"prelu", 1), b"\x80\x04pickle" * 40):
        other.write_bytes(bad)
        with pytest.raises(UserError, match=r"net\.dat"):
            dlib_resnet.read_dlib_resnet(other)
    with pytest.raises(UserError, match="cannot be read"):
        read_network(tmp_path / "absent.dat")


def quantised_model(rows: int, columns: int, axis: int, block: int) -> onnx.ModelProto:
    """A block-quantised matrix, turned upright and multiplied with the image."""
    generator = np.random.default_rng(0)
    blocks = [rows, columns]
    blocks[axis] = -(-blocks[axis] // block)
    constants = {
        "q": generator.integers(-128, 128, (rows, columns)).astype(np.int8),
        "scale": generator.random(blocks).astype(np.float32),
        "zero": generator.integers(-128, 128, blocks).astype(np.int8),
        "shape": np.array([columns, rows]),
    }
    make = onnx.helper.make_node
    nodes = [
        make("DequantizeLinear", ["q", "scale", "zero"], ["w"], axis=axis, block_size=block),
        make("Reshape", ["w", "shape"], ["upright"]),
        make("MatMul", ["image", "upright"], ["out"], name="dense"),
    ]
    info = onnx.helper.make_tensor_value_info
    graph = onnx.helper.make_graph(
        nodes,
        "quantised",
        [info("image", onnx.TensorProto.FLOAT, [columns, columns])],
        [info("out", onnx.TensorProto.FLOAT, [columns, rows])],
        [onnx.numpy_helper.from_array(value, name) for name, value in constants.items()],
    )
    return onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 21)], ir_version=10)


@pytest.mark.parametrize(("axis", "block"), [(0, 2), (1, 2), (1, 5), (0, 6)])
def test_block_quantised_weights_are_those_of_onnx(tmp_path, axis, block):
    from onnx.reference import ReferenceEvaluator

    model = quantised_model(6, 10, axis, block)
    onnx.save_model(model, tmp_path / "model.onnx")
    [dense] = read_layers(tmp_path / "model.onnx", {"MatMul"})
    [weight] = dense.constants
    image = np.eye(10, dtype=np.float32)
    [wanted] = ReferenceEvaluator(model).run(None, {"image": image})
    torch.testing.assert_close(weight, torch.from_numpy(wanted), rtol=1e-6, atol=0)


def test_files_that_are_no_fitting_onnx_are_refused(tmp_path):
    path = tmp_path / "model.onnx"
    with pytest.raises(UserError, match="cannot be read"):
        read_layers(path, {"Conv"})
    for content in (b"hello" * 20, sface.WEIGHTS.locate().read_bytes()[:100_000]):
        path.write_bytes(content)
        with pytest.raises(UserError, match="no ONNX file"):
            sface.read_sface(path)
    model = quantised_model(6, 10, 0, 2)
    del model.graph.initializer[1]
    onnx.save_model(model, path)
    with pytest.raises(UserError, match="do not fit together"):
        read_layers(path, {"MatMul"})
    with pytest.raises(UserError, match="another network"):
        sface.read_sface(yunet.WEIGHTS.locate())
    with pytest.raises(UserError, match="another network"):
        yunet.read_yunet(sface.WEIGHTS.locate())


def test_without_onnx_its_files_are_refused(monkeypatch):
    monkeypatch.setitem(sys.modules, "onnx", None)
    with pytest.raises(UserError, match="needs the package onnx, which is missing"):
        read_layers(sface.WEIGHTS.locate(), {"Conv"})


def test_a_packaged_file_is_known_by_its_digest(tmp_path, monkeypatch):
    weights = tmp_path / "weights.bin"
    weights.write_bytes(b"right")
    packaged = PackagedFile("some-package", "1.0", "weights.bin", hashlib.sha256(b"right").hexdigest())

    class Distribution:
        @staticmethod
        def locate_file(path: str) -> Path:
            return tmp_path / path

    monkeypatch.setattr("jobs.oodface.faces.weights.distribution", lambda name: Distribution)
    assert packaged.locate() == weights
    weights.write_bytes(b"wrong")
    with pytest.raises(UserError, match=r"damaged or of another release.*install some-package==1\.0 again"):
        packaged.locate()
    weights.unlink()
    with pytest.raises(UserError, match="missing from the package"):
        packaged.locate()


def test_a_missing_package_is_named():
    with pytest.raises(UserError, match="comes with the package no-such-package, which is missing; run `make env`"):
        PackagedFile("no-such-package", "1", "a/weights.bin", "").locate()


def test_a_weight_of_another_shape_is_refused():
    with pytest.raises(UserError, match=r"\(2, 3\) stand where \(3, 2\) belong"):
        fill(torch.zeros(3, 2), torch.zeros(2, 3), Path("net.onnx"))
