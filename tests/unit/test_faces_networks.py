"""Face networks: what they give is what onnxruntime and dlib give with the same files."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from jobs.oodface.faces import dlib_resnet, sface


def smooth_images(count: int, side: int, seed: int) -> torch.Tensor:
    """Coloured blobs in [0, 1]: nearer to photographs than noise is."""
    generator = torch.Generator().manual_seed(seed)
    coarse = torch.rand(count, 3, 9, 9, generator=generator)
    return F.interpolate(coarse, side, mode="bicubic", align_corners=True).clamp(0, 1)


def session(path, batch: str):
    """The file with every graph input dropped but the image, and its batch made dynamic."""
    onnx = pytest.importorskip("onnx")
    onnxruntime = pytest.importorskip("onnxruntime")
    model = onnx.load_model(path)
    [image] = [found for found in model.graph.input if found.name == "data"]
    for value in (image, *model.graph.output):
        value.type.tensor_type.shape.dim[0].dim_param = batch
    repaired = onnx.helper.make_graph(
        model.graph.node, "repaired", [image], model.graph.output, initializer=model.graph.initializer
    )
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    options.log_severity_level = 3
    content = onnx.helper.make_model(repaired, opset_imports=model.opset_import, ir_version=10).SerializeToString()
    return onnxruntime.InferenceSession(content, options)


@pytest.fixture(scope="module")
def face_net() -> sface.SFace:
    return sface.read_sface(sface.WEIGHTS.locate())


@pytest.fixture(scope="module")
def resnet() -> dlib_resnet.DlibResNet:
    return dlib_resnet.read_dlib_resnet(dlib_resnet.WEIGHTS.locate())


def test_sface_is_that_of_onnxruntime(face_net):
    images = torch.cat([smooth_images(4, sface.SIDE, seed=0), torch.rand(2, 3, sface.SIDE, sface.SIDE)])
    with torch.no_grad():
        mine = face_net(images)
    [raw] = session(sface.WEIGHTS.locate(), "batch").run(None, {"data": (images * 255).numpy()})
    theirs = F.normalize(torch.from_numpy(raw))
    assert mine.shape == (6, sface.DIM)
    torch.testing.assert_close(mine.norm(dim=1), torch.ones(6))
    assert F.cosine_similarity(mine.double(), theirs.double()).min() >= 1 - 1e-5
    torch.testing.assert_close(mine, theirs, rtol=0, atol=1e-5)


def test_dlibs_resnet_is_that_of_dlib(resnet):
    dlib = pytest.importorskip("dlib")
    chips = (smooth_images(4, dlib_resnet.SIDE, seed=1) * 255).byte()
    oracle = dlib.face_recognition_model_v1(str(dlib_resnet.WEIGHTS.locate()))
    pixels = chips.permute(0, 2, 3, 1).contiguous().numpy()
    theirs = torch.tensor([list(oracle.compute_face_descriptor(chip)) for chip in pixels])
    with torch.no_grad():
        mine = resnet(chips / 255)
    torch.testing.assert_close(mine, theirs, rtol=0, atol=1e-5)
    assert F.cosine_similarity(mine.double(), theirs.double()).min() >= 1 - 1e-6


@pytest.mark.parametrize("name", ["face_net", "resnet"])
def test_an_embedding_does_not_depend_on_its_batch(name, request):
    network = request.getfixturevalue(name)
    images = smooth_images(3, {"face_net": sface.SIDE, "resnet": dlib_resnet.SIDE}[name], seed=2)
    with torch.no_grad():
        together = network(images)
        alone = torch.cat([network(image[None]) for image in images])
        turned = network(images.flip(0)).flip(0)
    torch.testing.assert_close(alone, together, rtol=0, atol=2e-6)
    torch.testing.assert_close(turned, together, rtol=0, atol=2e-6)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("name", ["face_net", "resnet"])
def test_a_gpu_gives_the_embeddings_of_the_cpu(name, request):
    network = request.getfixturevalue(name)
    images = smooth_images(8, {"face_net": sface.SIDE, "resnet": dlib_resnet.SIDE}[name], seed=3)
    with torch.no_grad():
        on_cpu = network(images)
        on_gpu = network.to("cuda")(images.cuda()).cpu()
        half = network.half()(images.cuda()).float().cpu()
    network.float().cpu()
    assert F.cosine_similarity(on_cpu, on_gpu).min() >= 1 - 1e-3
    assert F.cosine_similarity(on_cpu, half).min() >= 1 - 1e-2


def test_a_block_that_halves_pads_what_comes_out_smaller():
    """4 px: the convolution leaves 1, the pooled shortcut 2; the sum has 2, the convolution in its corner."""
    block = dlib_resnet.Block(2, 3, halves=True)
    x = torch.randn(1, 2, 4, 4)
    with torch.no_grad():
        y = block(x)
        convolved = block.second(F.relu(block.first(x)))
        shortcut = F.avg_pool2d(x, 2)
    assert convolved.shape[2:] == (1, 1)
    assert y.shape == (1, 3, 2, 2)
    torch.testing.assert_close(y[:, :, 1, 1], F.relu(F.pad(shortcut, (0, 0, 0, 0, 0, 1)))[:, :, 1, 1])
    torch.testing.assert_close(y[0, :2, 0, 0], F.relu(shortcut[0, :, 0, 0] + convolved[0, :2, 0, 0]))
    torch.testing.assert_close(y[0, 2, 0, 0], F.relu(convolved[0, 2, 0, 0]))
