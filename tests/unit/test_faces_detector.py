"""The detector: its network is onnxruntime's, its faces are OpenCV's, and coordinates are those of the image."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from jobs.oodface.faces.detector import Detector, Face, choose, load_detector
from jobs.oodface.faces.yunet import STRIDES, WEIGHTS, decoded, read_yunet

SHARED = Path(__file__).parents[3] / "shared/data/oodface/lfw400/images"
needs_shared = pytest.mark.skipif(not SHARED.exists(), reason="../shared/data/oodface is absent")


def photographs(count: int) -> list[torch.Tensor]:
    from torchvision.io import ImageReadMode, decode_image

    files = sorted(SHARED.glob("*/*.jpg"))
    return [decode_image(str(file), ImageReadMode.RGB) / 255 for file in files[:: len(files) // count][:count]]


@pytest.fixture(scope="module")
def detector() -> Detector:
    return load_detector()


class OneCell(nn.Module):
    """A network that sees a face of 64x32 px in every image, centred at (88, 40) of what it gets, all points there."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(1, 1, 1)
        self.seen: list[torch.Size] = []

    def forward(self, images: torch.Tensor) -> list[torch.Tensor]:
        self.seen.append(images.shape)
        heads = [
            torch.full((len(images), 16, images.shape[2] // stride, images.shape[3] // stride), -20.0)
            for stride in STRIDES
        ]
        row, column = 4, 10
        cell = torch.tensor([1.0, 1.0, math.log(8), math.log(4)])
        heads[0][:, :, row, column] = torch.cat([torch.tensor([3.0]), cell, torch.tensor([3.0]), torch.ones(10)])
        return heads


def face(left: float, top: float, right: float, bottom: float) -> Face:
    return Face((left, top, right, bottom), 0.9, torch.zeros(5, 2))


def test_a_cell_is_decoded_by_hand():
    heads = [torch.zeros(1, 16, 2, 3) for _ in STRIDES]
    heads[1][0, :, 1, 2] = torch.tensor([0.0, 0.5, -0.25, math.log(2), math.log(3), 2.0, *range(10)])
    found = decoded(heads)
    cell = 6 + 5
    assert found.boxes[0, cell].tolist() == pytest.approx([16 * 1.5, 16 * -0.75, 16 * 3.5, 16 * 2.25])
    assert found.scores[0, cell].item() == pytest.approx(math.sqrt(0.5 / (1 + math.exp(-2))))
    assert found.landmarks[0, cell].tolist() == [[16 * (2 + 2 * i), 16 * (1 + 2 * i + 1)] for i in range(5)]


@pytest.mark.parametrize(("height", "width", "scale"), [(480, 640, 1), (96, 128, 1), (960, 1280, 2), (1280, 320, 2)])
def test_coordinates_are_those_of_the_image(height, width, scale):
    network = OneCell()
    [[found]] = Detector(network).detect([torch.rand(3, height, width)])
    assert max(network.seen[0][2:]) <= 640
    assert all(side % 32 == 0 for side in network.seen[0][2:])
    # Pixel i of a halved image covers pixels 2i and 2i + 1, so its centre is at 2i + .5.
    shift = (scale - 1) / 2
    centre = [88 * scale + shift, 40 * scale + shift]
    left, top, right, bottom = found.box
    assert [(left + right) / 2, (top + bottom) / 2] == pytest.approx(centre, abs=1e-3)
    assert [right - left, bottom - top] == pytest.approx([64 * scale, 32 * scale], abs=1e-3)
    torch.testing.assert_close(found.landmarks, torch.tensor([centre] * 5), rtol=0, atol=1e-3)
    assert found.score == pytest.approx(1 / (1 + math.exp(-3)))


def test_images_of_one_size_share_a_pass_and_order_is_kept():
    network = OneCell()
    images = [torch.rand(3, 64, 96), torch.rand(3, 200, 96), torch.rand(3, 64, 96), torch.rand(3, 64, 97)]
    found = Detector(network).detect(images)
    assert [shape[0] for shape in network.seen] == [2, 1, 1]
    assert [len(faces) for faces in found] == [1, 1, 1, 1]
    assert Detector(network).detect([]) == []
    assert Detector(network, threshold=0.97).detect(images) == [[], [], [], []]


def test_images_that_are_seen_at_one_size_share_a_pass(detector):
    network = OneCell()
    sizes = [(480, 640), (960, 1280), (970, 1280), (600, 800)]
    found = Detector(network).detect([torch.rand(3, *size) for size in sizes])
    assert [shape[0] for shape in network.seen] == [1, 1, 1, 1]  # of 2^19 pixels on a processor
    assert [faces[0].box[2] - faces[0].box[0] for faces in found] == pytest.approx([64, 128, 128, 80], abs=1e-3)
    network.seen.clear()
    Detector(network, longest=320).detect([torch.rand(3, *size) for size in sizes])
    assert [tuple(shape) for shape in network.seen] == [(4, 3, 256, 320)]


@needs_shared
def test_a_face_does_not_depend_on_the_sizes_beside_it(detector):
    images = [F.interpolate(one[None], side)[0] for one, side in zip(photographs(4), (250, 300, 231, 700), strict=True)]
    together = detector.detect(images + [image[:, :240] for image in images[:2]])
    for image, faces in zip(images, together, strict=False):
        [alone] = detector.detect([image])
        assert [(face.box, face.score) for face in faces] == [(face.box, face.score) for face in alone]
        assert all(torch.equal(*(face.landmarks for face in pair)) for pair in zip(faces, alone, strict=True))


def test_a_big_batch_is_cut():
    network = OneCell()
    Detector(network).detect([torch.rand(3, 512, 512)] * 5)
    assert [shape[0] for shape in network.seen] == [2, 2, 1]


def test_noise_and_grey_are_no_faces(detector):
    images = [torch.rand(3, 100, 180), torch.full((3, 40, 40), 0.5), torch.zeros(3, 1, 1), torch.zeros(3, 700, 3)]
    assert detector.portraits(images) == ([None] * 4, [0] * 4)


def test_the_chosen_face_is_large_and_near_the_centre():
    centred, larger_aside, small = face(40, 40, 60, 60), face(0, 0, 30, 30), face(48, 48, 52, 52)
    # 400 - 0 against 900 - 2 * (35^2 + 35^2) and 16 - 0.
    assert choose([larger_aside, small, centred], 100, 100) is centred
    # The same faces in an image whose centre is near the larger: 900 - 2 * 50 against 400 - 2 * 1800.
    assert choose([centred, larger_aside], 40, 40) is larger_aside
    assert choose([], 100, 100) is None


def test_a_portrait_is_of_its_chosen_face_and_the_others_are_counted(monkeypatch):
    centred, aside = face(40, 40, 60, 60), face(0, 0, 30, 30)
    detector = Detector(OneCell())
    monkeypatch.setattr(detector, "detect", lambda images: [[aside, centred], [], [aside, centred]])
    images = [torch.zeros(3, 100, 100), torch.zeros(3, 9, 9), torch.zeros(3, 40, 40)]
    assert detector.portraits(images) == ([centred, None, aside], [2, 0, 2])


def onnxruntime_heads(image: torch.Tensor) -> dict[str, torch.Tensor]:
    """The file's outputs; onnxruntime wants no block size where one scale holds for a whole tensor."""
    onnx, onnxruntime = pytest.importorskip("onnx"), pytest.importorskip("onnxruntime")
    model = onnx.load_model(WEIGHTS.locate())
    single = {tensor.name for tensor in model.graph.initializer if list(tensor.dims) == [1]}
    for node in model.graph.node:
        if node.op_type == "DequantizeLinear" and node.input[1] in single:
            del node.attribute[:]
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    options.log_severity_level = 3
    session = onnxruntime.InferenceSession(model.SerializeToString(), options)
    names = [output.name for output in session.get_outputs()]
    values = session.run(names, {"input": (image.flip(1) * 255).numpy()})
    return {name: torch.from_numpy(value) for name, value in zip(names, values, strict=True)}


def test_the_network_is_that_of_onnxruntime():
    coarse = torch.rand(1, 3, 20, 20, generator=torch.Generator().manual_seed(0))
    image = F.interpolate(coarse, 640, mode="bicubic").clamp(0, 1)
    theirs = onnxruntime_heads(image)
    with torch.no_grad():
        heads = read_yunet(WEIGHTS.locate())(image)
    for head, stride in zip(heads, STRIDES, strict=True):
        faceness, box, presence, points = head.flatten(2).transpose(1, 2).split((1, 4, 1, 10), dim=-1)
        mine = {"cls": faceness.sigmoid(), "bbox": box, "obj": presence.sigmoid(), "kps": points}
        for kind, values in mine.items():
            torch.testing.assert_close(values, theirs[f"{kind}_{stride}"], rtol=1e-3, atol=1e-3)


@needs_shared
def test_faces_are_those_of_opencv(detector):
    """Boxes and landmarks within .01 px, scores within 1e-4, no face more or less."""
    cv2 = pytest.importorskip("cv2")
    images = photographs(16)
    height, width = images[0].shape[1:]
    oracle = cv2.FaceDetectorYN.create(str(WEIGHTS.locate()), "", (width, height), 0.6, 0.3, 5000)
    for image, mine in zip(images, detector.detect(images), strict=True):
        pixels = (image * 255).round().byte().flip(0).permute(1, 2, 0).contiguous().numpy()
        rows = oracle.detect(pixels)[1]
        assert len(mine) == len(rows)
        for found, row in zip(mine, rows, strict=True):
            left, top, right, bottom = found.box
            np.testing.assert_allclose([left, top, right - left, bottom - top], row[:4], atol=1e-2)
            np.testing.assert_allclose(found.landmarks.flatten(), row[4:14], atol=1e-2)
            assert found.score == pytest.approx(row[14], abs=1e-4)


@needs_shared
def test_a_face_is_found_at_other_sizes_at_the_same_place(detector):
    """The network's landmarks jitter by a tenth of the distance of the eyes when an image changes its size at all."""
    images = photographs(12)
    plain, _ = detector.portraits(images)
    for scale in (0.4, 4):
        scaled = [
            F.interpolate(image[None], scale_factor=scale, mode="bilinear", antialias=True)[0] for image in images
        ]
        shares = []
        for here, there in zip(plain, detector.portraits(scaled)[0], strict=True):
            back = (there.landmarks + 0.5) / scale - 0.5
            eyes = (here.landmarks[0] - here.landmarks[1]).norm()
            shares.append((back - here.landmarks) / eyes)
        off = torch.stack(shares)
        assert off.square().sum(-1).mean().sqrt() < 0.2
        assert off.mean((0, 1)).abs().max() < 0.1


@needs_shared
def test_landmarks_stand_in_their_order(detector):
    for found in detector.portraits(photographs(6))[0]:
        right_eye, left_eye, nose, right_mouth, left_mouth = found.landmarks
        assert right_eye[0] < left_eye[0]
        assert right_mouth[0] < left_mouth[0]
        assert max(right_eye[1], left_eye[1]) < nose[1] < min(right_mouth[1], left_mouth[1])


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@needs_shared
def test_a_gpu_finds_the_faces_of_the_cpu(detector):
    images = photographs(8)
    found, _ = load_detector("cuda").portraits(images)
    for mine, theirs in zip(detector.portraits(images)[0], found, strict=True):
        assert (mine.landmarks - theirs.landmarks).abs().max() < 0.5
