"""A generator in the place of a procedural variation, by a tiny random one of StyleGAN's kind."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import nn

from cluster.errors import UserError
from jobs.oodface import scenarios
from jobs.oodface.randomness import keys
from jobs.oodface.scenarios import _parts, distort
from jobs.oodface.variations import VARIATIONS, AgeIncrease, Makeup
from jobs.oodface.variations.base import ARCFACE, place_template
from jobs.oodface.variations.generator import EDITS, Edit, Fitting, GeneratedVariation, StyleGan2Editor, ramp

WIDTH, LAYERS, SIDE = 8, 6, 32
QUICK = Fitting(steps=25, rate=0.1, samples=200, tuning_steps=12, tuning_rate=5e-4)


@pytest.fixture(autouse=True)
def one_thread():
    """Several threads on so little work mostly wait for one another."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


class Mapping(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.LeakyReLU(0.2), nn.Linear(WIDTH, WIDTH))
        nn.init.normal_(self.layers[2].weight, std=1.0)

    def forward(self, latent):
        return self.layers(F.normalize(latent, dim=1) * WIDTH**0.5)


class Synthesis(nn.Module):
    """A constant, and six convolutions whose input each latent scales channel by channel; 4 to 32 pixels."""

    def __init__(self) -> None:
        super().__init__()
        self.constant = nn.Parameter(torch.randn(1, WIDTH, 4, 4))
        self.styles = nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(LAYERS))
        self.convolutions = nn.ModuleList(nn.Conv2d(WIDTH, WIDTH, 3, padding=1) for _ in range(LAYERS))
        self.colours = nn.Conv2d(WIDTH, 3, 1)
        for one in (*self.convolutions, *self.styles):
            nn.init.normal_(one.weight, std=1.4 / one.weight[0].numel() ** 0.5)

    def forward(self, latents):
        x = self.constant.expand(len(latents), -1, -1, -1)
        for layer, (style, convolution) in enumerate(zip(self.styles, self.convolutions, strict=True)):
            if layer in (1, 3, 5):
                x = F.interpolate(x, scale_factor=2.0, mode="bilinear")
            x = F.leaky_relu(convolution(x * (1 + style(latents[:, layer]))[:, :, None, None]), 0.2)
        return torch.tanh(self.colours(x))


class Older(GeneratedVariation):
    """As docs/oodface.md has it."""

    name, title, category = AgeIncrease.name, AgeIncrease.title, AgeIncrease.category

    def __init__(self) -> None:
        super().__init__(editor(), AgeIncrease)


def test_a_class_takes_the_place_of_a_stand_in(monkeypatch):
    monkeypatch.setitem(scenarios.SCENARIOS, Older.name, Older)
    images, drawn = torch.rand(1, 3, 112, 112), keys(["a"], Older.name, 3)
    wanted = distort(images, GeneratedVariation(editor(), AgeIncrease), 3, drawn)
    assert torch.equal(distort(images, "age_increase", 3, drawn), wanted)
    assert not torch.equal(distort(images, AgeIncrease(), 3, drawn), wanted)


def editor(fitting: Fitting = QUICK, perceptual=None) -> StyleGan2Editor:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        mapping, synthesis = Mapping(), Synthesis()
        directions = {"age": F.normalize(torch.randn(WIDTH), dim=0), "eyes": F.normalize(torch.randn(WIDTH), dim=0)}
    return StyleGan2Editor(mapping, synthesis, directions, LAYERS, SIDE, fitting, perceptual)


def some_images(one: StyleGan2Editor, count: int) -> torch.Tensor:
    """What the generator itself makes of other latents than the mean, with something that it cannot make."""
    with torch.no_grad():
        drawn = one.mapping(torch.randn(count, WIDTH, generator=torch.Generator().manual_seed(5)))
        images = (one.synthesis(drawn[:, None].expand(-1, LAYERS, -1)) + 1) / 2
    images[:, :, 4:6, 4:6] = 0.9
    return images


def error(made: torch.Tensor, images: torch.Tensor) -> torch.Tensor:
    return (made - images).square().mean((1, 2, 3))


def distance(made: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    return (F.avg_pool2d(made, 4) - F.avg_pool2d(target, 4)).square().mean((1, 2, 3))


def test_the_defaults_are_those_of_pivotal_tuning():
    default = Fitting()
    assert (default.steps, default.rate, default.tuning_steps, default.tuning_rate) == (450, 5e-3, 350, 3e-4)
    assert (default.stop, default.squared, default.perceptual) == (0.06, 1, 1)


@pytest.mark.parametrize("perceptual", [None, distance])
def test_inversion_comes_nearer_and_tuning_nearer_still(perceptual):
    one = editor(Fitting(**{**vars(QUICK), "tuning_steps": 0}), perceptual)
    images = some_images(one, 3)
    start = one.mean_latent(WIDTH, images.device)[:, None].expand(3, LAYERS, -1)
    with torch.no_grad():
        before = error((one.synthesis(start) + 1) / 2, images)
        inverted = one.invert(images)
        after = error(one.synthesise(inverted), images)
        tuned = editor(QUICK if perceptual is None else Fitting(**{**vars(QUICK), "stop": 0.0}), perceptual)
        best = error(tuned.synthesise(tuned.invert(images)), images)
    assert (after < 0.7 * before).all()
    assert (best < 0.9 * after).all()
    assert torch.equal(inverted.latents, inverted.latents[:, :1].expand(-1, LAYERS, -1))


def test_tuning_ends_where_the_images_look_alike():
    one = editor(Fitting(**{**vars(QUICK), "stop": 1e9}), distance)
    inverted = one.invert(some_images(one, 2))
    for network in inverted.networks:
        assert all(torch.equal(a, b) for a, b in zip(network.parameters(), one.synthesis.parameters(), strict=True))


def test_the_generator_itself_is_left_alone():
    one = editor()
    before = copy.deepcopy([one.mapping.state_dict(), one.synthesis.state_dict()])
    with torch.inference_mode():
        inverted = one.invert(some_images(one, 2))
    for state, module in zip(before, (one.mapping, one.synthesis), strict=True):
        assert all(torch.equal(value, state[name]) for name, value in module.state_dict().items())
        assert all(parameter.grad is None and parameter.requires_grad for parameter in module.parameters())
    assert len(inverted.networks) == 2
    changed = [
        any(not torch.equal(a, b) for a, b in zip(network.parameters(), one.synthesis.parameters(), strict=True))
        for network in inverted.networks
    ]
    assert all(changed)


def test_what_is_known_of_the_papers_edits_is_at_hand():
    assert set(EDITS) == {one.name for one in VARIATIONS} - {"bangs_glasses", "makeup"}  # those are no StyleGAN's
    assert EDITS["mouth_open"].layers == (4, 5)
    assert EDITS["eye_close"].layers == (7, 8)
    torch.testing.assert_close(ramp(1.5), (0.3, 0.6, 0.9, 1.2, 1.5))


def test_an_edit_moves_the_image_further_the_stronger_it_is():
    one = editor(Fitting(**{**vars(QUICK), "tuning_steps": 0}))
    images = some_images(one, 2)
    inverted = one.invert(images)
    with torch.no_grad():
        made = [one.synthesise(one.edit(inverted, "age", strength)) for strength in (0, *ramp(1.5))]
    changes = torch.stack([(later - made[0]).abs().mean((1, 2, 3)) for later in made])
    assert (changes.diff(dim=0) > 0).all()


def test_layers_outside_the_range_are_untouched():
    one = editor(Fitting(**{**vars(QUICK), "steps": 1, "tuning_steps": 0}))
    inverted = one.invert(some_images(one, 1))
    moved = one.edit(inverted, "eyes", 2.0, (2, 3)).latents - inverted.latents
    assert (moved[:, [0, 1, 4, 5]] == 0).all()
    torch.testing.assert_close(moved[:, 2:4], 2 * one.directions["eyes"].expand(1, 2, -1))


def test_gradients_reach_the_latents():
    one = editor(Fitting(**{**vars(QUICK), "steps": 1, "tuning_steps": 0}))
    inverted = one.invert(some_images(one, 1))
    latents = inverted.latents.clone().requires_grad_()
    made = one.synthesise(type(inverted)(latents, inverted.networks))
    (flow,) = torch.autograd.grad(made.mean(), latents)
    assert (flow != 0).any()


def test_a_generated_variation_is_a_scenario_and_does_not_depend_on_its_batch():
    one = GeneratedVariation(editor(Fitting(**{**vars(QUICK), "tuning_steps": 3})), AgeIncrease)
    assert (one.name, one.title, one.category) == ("age_increase", AgeIncrease.title, "Age")
    images = torch.rand(3, 3, 64, 64, generator=torch.Generator().manual_seed(1))
    drawn = keys(list("abc"), one.name, 1)
    whole = distort(images, one, [1, 5, 5], drawn)
    assert whole.isfinite().all()
    assert torch.equal(distort(images[1:2], one, 5, drawn[1:2]), whole[1:2])
    stronger = distort(images[:1], one, 5, drawn[:1])
    assert not torch.equal(stronger, whole[:1])


class Echo:
    """An editor that returns what it was shown, made darker by the strength."""

    side = 80

    def invert(self, images):
        return images

    def edit(self, inversion, direction, strength, layers):
        return inversion * (1 - strength)

    def synthesise(self, inversion):
        return inversion


def test_the_generator_sees_its_square_and_its_picture_is_laid_back():
    rows, columns = torch.linspace(0, 1, 112)[:, None], torch.linspace(0, 1, 112)
    images = (0.5 + 0.2 * (5 * rows).sin() * (4 * columns).cos()).expand(2, 3, -1, -1).contiguous()
    strengths = (0.0, 0.1, 0.2, 0.3, 0.5)
    one = GeneratedVariation(Echo(), Makeup, Edit("any", strengths), square=(0.0, 0.5, 2.0))
    landmarks = place_template(ARCFACE, 112, 112).expand(2, -1, -1)
    torch.testing.assert_close(one.apply(images, 1, {}, landmarks), images, atol=5e-3, rtol=0)
    darker = one.apply(images, 5, {}, landmarks)
    torch.testing.assert_close(darker[:, :, 50:90, 30:80], images[:, :, 50:90, 30:80] / 2, atol=5e-3, rtol=0)
    assert torch.equal(darker[:, :, :30], images[:, :, :30])
    assert torch.equal(darker[..., :18], images[..., :18])


def test_weights_and_directions_come_from_safetensors(tmp_path):
    whole, other = editor(), editor()
    with torch.no_grad():
        for parameter in other.synthesis.parameters():
            parameter.zero_()
    state = nn.ModuleDict({"mapping": whole.mapping, "synthesis": whole.synthesis}).state_dict()
    save_file(state, tmp_path / "weights.safetensors")
    save_file({"smile": torch.ones(WIDTH)}, tmp_path / "directions.safetensors")
    other.load(tmp_path / "weights.safetensors", tmp_path / "directions.safetensors")
    assert list(other.directions) == ["smile"]
    assert torch.equal(other.synthesis.constant, whole.synthesis.constant)


def test_files_that_do_not_fit_are_refused(tmp_path):
    one = editor()
    save_file({"mapping.layers.0.weight": torch.zeros(1)}, tmp_path / "other.safetensors")
    (tmp_path / "text.safetensors").write_text("no tensors")
    for name, said in (
        ("other", "does not hold the weights"),
        ("text", "cannot be read"),
        ("absent", "cannot be read"),
    ):
        path = tmp_path / f"{name}.safetensors"
        with pytest.raises(UserError, match=f"{name}.safetensors {said}"):
            one.load(path, path)


def test_unknown_directions_layers_and_edits_are_refused():
    one = editor(Fitting(**{**vars(QUICK), "steps": 1, "tuning_steps": 0}))
    inverted = one.invert(some_images(one, 1))
    with pytest.raises(UserError, match="no direction 'smile'; the generator has age, eyes"):
        one.edit(inverted, "smile", 1.0)
    with pytest.raises(UserError, match="layers 7 to 8 do not exist; the generator has 0 to 5"):
        one.edit(inverted, "eyes", 1.0, EDITS["eye_open"].layers)
    with pytest.raises(UserError, match="no edit of a generator is known for 'makeup'"):
        GeneratedVariation(one, Makeup)
    with pytest.raises(UserError, match="'age' has 2 strengths"):
        Edit("age", (1.0, 2.0))


class Distance(nn.Module):
    """A perceptual distance with weights."""

    def __init__(self) -> None:
        super().__init__()
        self.weights = nn.Parameter(torch.ones(3))

    def forward(self, made, target):
        return ((made - target).square().mean((2, 3)) * self.weights).sum(1)


@pytest.mark.parametrize("inference", [False, True])
def test_all_networks_move_to_where_the_images_are(inference):
    """The device meta computes nothing, and refuses tensors of another one as a GPU does."""
    one = editor(Fitting(steps=2, samples=10, tuning_steps=0), Distance())
    with torch.inference_mode(inference):
        inverted = one.invert(torch.zeros(2, 3, SIDE, SIDE, device="meta"))
        assert one.synthesise(one.edit(inverted, "age", 1.0)).is_meta
    for module in (one.mapping, one.synthesis, one.perceptual):
        assert all(value.is_meta and not value.is_inference() for value in module.parameters())
    one.invert(torch.zeros(2, 3, SIDE, SIDE, device="meta"))  # gradients go through them later too


def test_a_generator_takes_one_image_after_another_on_a_gpu_too():
    on_gpu = type("OnGpu", (), {"is_cuda": True, "__getitem__": lambda self, at: torch.zeros(3, 112, 112)})()
    generated = GeneratedVariation(editor(), AgeIncrease)
    assert list(_parts([0, 1, 2], on_gpu, generated)) == [slice(0, 1), slice(1, 2), slice(2, 3)]
    assert list(_parts([0, 1, 2], on_gpu, AgeIncrease())) == [slice(0, 3)]
