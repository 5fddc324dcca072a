"""Torch networks of a user's own: made by an importable callable, filled from safetensors, tried before work."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from pydantic import ValidationError
from safetensors.torch import save_file, save_model

from cluster.config import load as load_configuration
from cluster.errors import UserError
from jobs.oodface.config import OodfaceConfig
from jobs.oodface.faces.config import Detection, OwnFace
from jobs.oodface.faces.detector import load_detector
from jobs.oodface.faces.models import load

SOURCE = '''
from functools import partial

import torch
from torch import nn

class Pooled(nn.Module):
    """The first channel of 4 x 4 patches, weighted: easy to compute by hand."""
    def __init__(self, form="plain"):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(1, dtype=torch.bfloat16))
        self.form = form
    def forward(self, images):
        if self.form == "fail":
            raise ValueError("the first line\\nthe second")
        if self.form == "total":
            return images.sum()
        out = nn.functional.avg_pool2d(images, 4)[:, 0] * self.weight
        if self.form == "map":
            return out
        out = out.flatten(1)
        return {"plain": out, "pair": (out, out.norm()), "squeezed": out.squeeze()}[self.form]

class Tied(nn.Module):
    """Two names of one weight, of which a file keeps one."""
    def __init__(self):
        super().__init__()
        self.one = nn.Linear(3, 4)
        self.other = nn.Linear(3, 4)
        self.other.weight = self.one.weight
    def forward(self, images):
        return self.other(images.mean((2, 3)))

halved = partial(Pooled, form="pair")

class Found(nn.Module):
    """Two faces in each image, told three times in all, and a weaker third one."""
    def __init__(self, columns=15, sides=False, least=0):
        super().__init__()
        self.scores = nn.Parameter(torch.zeros(4))
        self.columns, self.sides, self.least = columns, sides, least
    def forward(self, images):
        assert images.shape[2] >= self.least
        landmarks = torch.tensor([10.0, 20, 30, 20, 20, 30, 12, 40, 28, 40])
        boxes = torch.tensor([[5.0, 5, 35, 50], [6, 5, 36, 50], [50, 5, 60, 20], [5, 60, 20, 80]])
        if self.sides:
            boxes[:, 2:] -= boxes[:, :2]
        table = torch.cat([boxes, self.scores[:, None], landmarks.expand(4, 10)], dim=1)[:, : self.columns]
        return [table[:0] if image.max() == 0 else table for image in images]

def number():
    return 3

CONSTANT = 3
'''


@pytest.fixture
def networks(tmp_path, monkeypatch) -> Path:
    """A folder on the path with the module `my_networks`."""
    (tmp_path / "my_networks.py").write_text(SOURCE)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "my_networks", raising=False)
    importlib.invalidate_caches()
    return tmp_path


def weights(path: Path, **tensors: torch.Tensor) -> str:
    save_file(tensors, path)
    return str(path)


def own(path: str, factory: str = "my_networks:Pooled", **settings: object) -> OwnFace:
    return OwnFace(name="mine", path=path, factory=factory, **settings)


@pytest.mark.parametrize("form", ["plain", "pair", "squeezed"])
def test_a_module_sees_pixels_as_configured(networks, form):
    path = weights(networks / "net.safetensors", weight=torch.tensor([-2.0]))
    settings = {"mean": (10, 20, 30), "std": (2, 4, 8), "size": (16, 24), "options": {"form": form}}
    crops = torch.rand(9, 3, 16, 24)  # eight a pass, so that one is left
    wanted = F.avg_pool2d(((crops * 255) - 10) / 2, 4)[:, 0].flatten(1) * -2
    torch.testing.assert_close(load(own(path, **settings)).embed(crops), F.normalize(wanted))
    wanted = F.avg_pool2d(((crops[:, 2:] * 255) - 10) / 2, 4).flatten(1) * -2
    torch.testing.assert_close(load(own(path, colour="bgr", **settings)).embed(crops), F.normalize(wanted))
    larger = F.interpolate(crops, (40, 40), mode="bilinear")
    resized = F.interpolate(larger, (16, 24), mode="bilinear", align_corners=False)
    model = load(own(path, **settings))
    torch.testing.assert_close(model.embed(larger), model.embed(resized))


def test_a_module_of_an_installed_package(tmp_path):
    from torchvision.models import resnet18

    module = resnet18(num_classes=16).eval()
    kept = {name: value for name, value in module.state_dict().items() if not name.endswith("num_batches_tracked")}
    path = weights(tmp_path / "resnet.safetensors", **kept)
    model = load(own(path, "torchvision.models:resnet18", options={"num_classes": 16}, template="dlib"))
    crops = torch.rand(3, 3, 150, 150)
    assert model.template.name == "dlib"
    torch.testing.assert_close(model.embed(crops), F.normalize(module((crops * 255 - 127.5) / 127.5)))
    plain, half = model.embed(crops), model.to("cpu", torch.bfloat16).embed(crops)
    assert next(model.network.module.parameters()).dtype == torch.bfloat16
    assert half.dtype == torch.float32
    assert F.cosine_similarity(plain, half).min() > 0.98


def test_weights_and_source_are_the_version(networks):
    path = weights(networks / "net.safetensors", weight=torch.ones(1))
    versions = {load(own(path)).version}
    weights(networks / "net.safetensors", weight=torch.zeros(1))
    versions.add(load(own(path)).version)
    (networks / "my_networks.py").write_text(SOURCE + "\n")
    versions.add(load(own(path)).version)
    versions.add(load(own(path, "my_networks:halved")).version)  # of which no source is known, but its module's
    (networks / "my_networks.py").write_text(SOURCE + "\n\n")
    versions.add(load(own(path, "my_networks:halved")).version)
    assert len(versions) == 5


def test_weights_of_two_names_are_kept_once(networks):
    import my_networks

    module = my_networks.Tied().eval()
    save_model(module, networks / "tied.safetensors")
    model = load(own(str(networks / "tied.safetensors"), "my_networks:Tied"))
    crops = torch.rand(2, 3, 112, 112)
    torch.testing.assert_close(model.embed(crops), F.normalize(module((crops * 255 - 127.5) / 127.5)))


@pytest.mark.parametrize(
    ("factory", "options", "told"),
    [
        ("absent_package.net:Net", {}, "needs the module absent_package, which is missing; install its package"),
        ("broken_networks:Net", {}, "the module broken_networks cannot be imported"),
        ("parsing_networks:Net", {}, "the module parsing_networks cannot be imported"),
        ("my_networks:Pooled", {"form": "map"}, r"gives \(2, 28, 28\) for two images, which is no embedding an image"),
        ("my_networks:Absent", {}, "my_networks has nothing to call by the name Absent"),
        ("my_networks:CONSTANT", {}, "nothing to call by the name CONSTANT"),
        ("my_networks:number", {}, "makes a int; name one that makes a torch.nn.Module"),
        ("my_networks:Pooled", {"depth": 3}, r"cannot be called with options \{'depth': 3\} \(.*unexpected keyword"),
        ("my_networks:Found", {}, "scores is missing, 1 in all; weight is not among its weights, 1 in all"),
        ("my_networks:Pooled", {"form": "fail"}, r"fails on 2 images of 112x112 px \(the first line\)"),
        ("my_networks:Pooled", {"form": "total"}, r"gives \(\) for two images, which is no embedding an image"),
    ],
)
def test_what_makes_no_embedding_model_is_refused(networks, factory, options, told):
    (networks / "broken_networks.py").write_text("def Net(:")
    (networks / "parsing_networks.py").write_text("raise SystemExit(2)")
    path = weights(networks / "net.safetensors", weight=torch.ones(1))
    with pytest.raises(UserError, match=told):
        load(own(path, factory, options=options))


def test_files_that_hold_other_things_are_refused(networks):
    with pytest.raises(UserError, match=r"there is no file .*absent\.safetensors"):
        load(own(str(networks / "absent.safetensors")))
    damaged = networks / "damaged.safetensors"
    for content in (b"", b"hello" * 10, b"\x80\x04K\x01."):
        damaged.write_bytes(content)
        with pytest.raises(UserError, match="is no safetensors file"):
            load(own(str(damaged)))
    shaped = weights(networks / "shaped.safetensors", weight=torch.ones(2))
    with pytest.raises(UserError, match=r"does not hold the weights of my_networks:Pooled \(size mismatch for weight"):
        load(own(shaped))


def test_settings_that_do_not_go_together_are_refused():
    with pytest.raises(ValidationError, match=r"\.pth files can run code when they are loaded"):
        own("net.pth")
    with pytest.raises(ValidationError, match=r"\.pt files can run code"):
        Detection(path="net.pt")
    with pytest.raises(ValidationError, match="weights alone are no network; name in factory"):
        OwnFace(name="mine", path="net.safetensors")
    with pytest.raises(ValidationError, match=r"beside a factory, path is a \.safetensors file"):
        own("net.onnx")
    with pytest.raises(ValidationError, match="options are arguments of a factory"):
        OwnFace(name="mine", path="net.onnx", options={"depth": 3})
    with pytest.raises(ValidationError, match="a factory needs the weights of its network"):
        Detection(factory="my_networks:Found")
    with pytest.raises(ValidationError, match="should match pattern"):
        own("net.safetensors", "my_networks.Found")


@pytest.mark.parametrize(
    ("entry", "told"),
    [
        ("{name: a, pth: x}", "unknown key oodface.evaluate.models.0.pth; the nearest known key is "),
        ("{name: a, path: x, mean: 3}", "oodface.evaluate.models.0.mean = 3 is wrong"),
        ("{name: a, path: x.pth}", r"oodface.evaluate.models.0 = .* is wrong: \.pth files can run code"),
    ],
)
def test_one_sentence_says_what_is_wrong_with_an_entry(entry, told):
    with pytest.raises(UserError, match=told) as caught:
        load_configuration(OodfaceConfig, sets=[f"oodface.evaluate.models=[{entry}]"])
    assert "oodface.evaluate.models.0.str" not in str(caught.value)


def test_faces_of_an_own_detector_are_told_in_px_of_the_photograph(networks):
    path = weights(networks / "net.safetensors", scores=torch.tensor([0.8, 0.9, 0.7, 0.5]))
    detector = load_detector(dials=Detection(path=path, factory="my_networks:Found", longest_side=100))
    seen, dark = torch.rand(3, 200, 100) + 0.1, torch.zeros(3, 200, 100)
    one, none = detector.detect([seen, dark])
    assert none == []
    assert [face.score for face in one] == pytest.approx([0.9, 0.7])  # the first box is told twice, the last too weak
    assert one[0].box == pytest.approx((12.5, 10.5, 72.5, 100.5))
    torch.testing.assert_close(one[0].landmarks[0], torch.tensor([20.5, 40.5]))
    chosen, counts = detector.portraits([seen, dark])
    assert (chosen[0].box, chosen[1]) == (one[0].box, None)
    assert counts == [2, 0]


def test_what_tells_no_faces_is_refused(networks):
    path = weights(networks / "net.safetensors", scores=torch.ones(4))
    dials = Detection(path=path, factory="my_networks:Found", options={"columns": 14})
    with pytest.raises(UserError, match=r"each wants a torch tensor of shape \(faces, 15\)"):
        load_detector(dials=dials)
    other = weights(networks / "other.safetensors", weight=torch.ones(1))
    with pytest.raises(UserError, match="each wants a torch tensor"):
        load_detector(dials=Detection(path=other, factory="my_networks:Pooled"))
    dials = Detection(path=path, factory="my_networks:Found", options={"least": 700}, longest_side=640)
    with pytest.raises(UserError, match="fails on 1 images of 640x480 px"):
        load_detector(dials=dials)
    detector = load_detector(dials=Detection(path=path, factory="my_networks:Found", options={"sides": True}))
    with pytest.raises(UserError, match=r"tells of a face .*, where left < right"):
        detector.detect([torch.rand(3, 64, 64) + 0.1])
