"""Where a generator takes the place of a procedural variation.

The paper inverts faces into StyleGAN2 (pivotal tuning, PTI), moves the latent along a direction and synthesises again.
`Editor` is what such a generator has to offer, `StyleGan2Editor` offers it for any mapping and synthesis network, and
`GeneratedVariation` makes a scenario of it. No weights come with the project: the paper's are not public.
"""

import copy
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from cluster.errors import UserError
from jobs.oodface.scenario import SEVERITIES, Draws, Images
from jobs.oodface.variations.base import ARCFACE, LEFT_EYE, RIGHT_EYE, SIDE, Face, Variation
from jobs.oodface.variations.drawing import inside, paint, sample

Latents = Float[Tensor, "batch layers width"]
Square = tuple[float, float, float]

# Which part of a face FFHQ's pictures show: centre (u, v) and side in units of the face. Its alignment takes a side of
# max(4 eye distances, 3.6 times from eyes to mouth) about a centre a tenth of the way from the eyes to the mouth.
FFHQ: Square = (0.0, 0.1155, 4.16)
EYES = ARCFACE[LEFT_EYE][0] - ARCFACE[RIGHT_EYE][0]


class Editor(Protocol):
    """What a generator has to offer: pictures of `side` x `side` pixels, RGB in [0, 1]."""

    side: int

    def invert(self, images: Images) -> Any:
        """What the generator needs to give these images again."""

    def edit(self, inversion: Any, direction: str, strength: float, layers: tuple[int, int] | None) -> Any:
        """The inversion moved along a direction, in all layers or from the first to the last of a range."""

    def synthesise(self, inversion: Any) -> Images:
        """The images of an inversion."""


@dataclass(frozen=True)
class Edit:
    """A direction's name, how far to go along it at severities 1 to 5, and the first and last layer moved (None: all).

    Raises:
        UserError: there are not five strengths.
    """

    direction: str
    strengths: tuple[float, ...]
    layers: tuple[int, int] | None = None

    def __post_init__(self) -> None:
        if len(self.strengths) != len(SEVERITIES):
            raise UserError(
                f"the edit '{self.direction}' has {len(self.strengths)} strengths; give one a severity, five"
            )


def ramp(strongest: float) -> tuple[float, ...]:
    """Five strengths that rise evenly to the strongest."""
    return tuple(strongest * severity / SEVERITIES[-1] for severity in SEVERITIES)


# Directions, layers and strongest values as in the authors' code (InterFaceGAN's f / 2 with f up to 3, GANSpace's
# components 46 and 54); how they spread them over five severities is not published, nor is which sign opens an eye.
EDITS: dict[str, Edit] = {
    "age_decrease": Edit("age", ramp(-1.5)),
    "age_increase": Edit("age", ramp(1.5)),
    "mouth_close": Edit("smile", ramp(-1.5)),
    "mouth_open": Edit("mouth", ramp(-6.0), (4, 5)),
    "eye_close": Edit("eyes", ramp(-20.0), (7, 8)),
    "eye_open": Edit("eyes", ramp(20.0), (7, 8)),
    "rotate_left": Edit("rotation", ramp(-1.5)),
    "rotate_right": Edit("rotation", ramp(1.5)),
}


@dataclass(frozen=True)
class Fitting:
    """How faces are inverted; the defaults are the authors' copy of PTI.

    Attributes:
        steps, rate: of Adam on one latent in W, from the mean one. samples: latents that the mean is taken over.
        tuning_steps, tuning_rate: of Adam on a copy of the synthesis network, image by image; 0 steps: no copy.
        stop: the perceptual distance at which tuning ends. squared, perceptual: weights of the two losses.
    """

    steps: int = 450
    rate: float = 5e-3
    samples: int = 10_000
    tuning_steps: int = 350
    tuning_rate: float = 3e-4
    stop: float = 0.06
    squared: float = 1.0
    perceptual: float = 1.0


@dataclass(frozen=True)
class Inversion:
    """Latents, and the synthesis networks that they belong to: one for all images, or after tuning one for each."""

    latents: Latents
    networks: tuple[nn.Module, ...]


class StyleGan2Editor:
    """Inversion by optimisation, and edits along directions of W, for a generator of StyleGAN2's kind.

    Args:
        mapping: (batch, width) standard normal to (batch, width), or to (batch, layers, width) with equal layers.
        synthesis: (batch, layers, width) to (batch, 3, side, side) in [-1, 1], without random noise.
        directions: vectors of W by name, (width,) each.
        layers: how many latents the synthesis takes.
        side: its pictures' side in pixels.
        fitting: how faces are inverted.
        perceptual: a distance such as LPIPS: two batches in [-1, 1] to (batch,). None leaves only the squared error.
        seed: of the latents that the mean is taken over.
    """

    def __init__(
        self,
        mapping: nn.Module,
        synthesis: nn.Module,
        directions: Mapping[str, Float[Tensor, " width"]],
        layers: int,
        side: int,
        fitting: Fitting | None = None,
        perceptual: Callable[[Images, Images], Float[Tensor, " batch"]] | None = None,
        seed: int = 0,
    ) -> None:
        self.mapping, self.synthesis, self.directions = mapping, synthesis, dict(directions)
        self.layers, self.side = layers, side
        self.fitting, self.perceptual, self.seed = fitting or Fitting(), perceptual, seed

    def load(self, weights: Path, directions: Path) -> None:
        """Takes both networks' weights and the directions from safetensors files.

        weights: tensors named mapping.* and synthesis.*, as in the state of a module that holds the two.

        Raises:
            UserError: a file cannot be read, or its tensors are not those of the networks.
        """
        whole = nn.ModuleDict({"mapping": self.mapping, "synthesis": self.synthesis})
        try:
            whole.load_state_dict(_tensors(weights))
        except RuntimeError as error:
            wrong = " ".join(str(error).split())
            raise UserError(f"{weights} does not hold the weights of these networks: {wrong[:300]}") from None
        self.directions = _tensors(directions)

    def mean_latent(self, width: int, device: torch.device) -> Float[Tensor, "1 width"]:
        """The mean of W over random latents."""
        generator = torch.Generator().manual_seed(self.seed)
        with torch.no_grad():
            drawn = torch.randn(self.fitting.samples, width, generator=generator).to(device)
            mapped = torch.cat([self.mapping(part) for part in drawn.split(1000)])
        return (mapped if mapped.ndim == 2 else mapped[:, 0]).mean(0, keepdim=True)

    def invert(self, images: Images) -> Inversion:
        """The latents in W that come nearest to the images, and networks tuned to give them.

        All networks move to the images' device, and stay there.
        """
        with torch.inference_mode(False), torch.enable_grad():
            # moved in here: under inference_mode the weights would become tensors that no gradient goes through again
            for one in (self.mapping, self.synthesis, self.perceptual):
                if isinstance(one, nn.Module):  # a perceptual distance may be any function
                    one.to(images.device)
            target = images.detach().clone() * 2 - 1
            latents = self._nearest(target)
            networks = (self.synthesis,)
            if self.fitting.tuning_steps:
                pairs = zip(latents.split(1), target.split(1), strict=True)
                networks = tuple(self._tuned(one, image) for one, image in pairs)
        return Inversion(latents, networks)

    def _nearest(self, target: Images) -> Latents:
        width = next(iter(self.directions.values())).shape[-1]
        start = self.mean_latent(width, target.device).expand(len(target), -1)
        latent = start.clone().requires_grad_()
        optimiser = torch.optim.Adam([latent], lr=self.fitting.rate)
        for _ in range(self.fitting.steps):
            loss, _ = self._loss(self.synthesis(self._spread(latent)), target)
            # not backward(): the networks' own gradients are nobody's business
            (latent.grad,) = torch.autograd.grad(loss, latent)
            optimiser.step()
        return self._spread(latent.detach())

    def _tuned(self, latents: Latents, target: Images) -> nn.Module:
        tuned = copy.deepcopy(self.synthesis).requires_grad_(True)
        optimiser = torch.optim.Adam(tuned.parameters(), lr=self.fitting.tuning_rate)
        for _ in range(self.fitting.tuning_steps):
            loss, distance = self._loss(tuned(latents), target)
            if distance is not None and float(distance.detach()) <= self.fitting.stop:
                break
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
        return tuned.requires_grad_(False)

    def _loss(self, made: Images, target: Images) -> tuple[Float[Tensor, ""], Float[Tensor, ""] | None]:
        """The images' losses added up, so that none depends on the others; and their perceptual part."""
        squared = (made - target).square().mean((1, 2, 3)).sum() * self.fitting.squared
        if self.perceptual is None:
            return squared, None
        distance = self.perceptual(made, target).sum()
        return squared + distance * self.fitting.perceptual, distance

    def _spread(self, latent: Float[Tensor, "batch width"]) -> Latents:
        return latent[:, None].expand(-1, self.layers, -1)

    def edit(
        self, inversion: Inversion, direction: str, strength: float, layers: tuple[int, int] | None = None
    ) -> Inversion:
        """w + strength x direction, in the layers from the first to the last of the range.

        Raises:
            UserError: no such direction, or the generator has no such layers.
        """
        if direction not in self.directions:
            raise UserError(f"there is no direction '{direction}'; the generator has {', '.join(self.directions)}")
        first, last = layers or (0, self.layers - 1)
        if not 0 <= first <= last < self.layers:
            raise UserError(f"layers {first} to {last} do not exist; the generator has 0 to {self.layers - 1}")
        latents = inversion.latents.clone()
        latents[:, first : last + 1] += strength * self.directions[direction].to(latents)
        return Inversion(latents, inversion.networks)

    def synthesise(self, inversion: Inversion) -> Images:
        """The images, cut to [0, 1]; gradients flow to the latents."""
        if len(inversion.networks) == 1:
            made = inversion.networks[0](inversion.latents)
        else:
            pairs = zip(inversion.networks, inversion.latents.split(1), strict=True)
            made = torch.cat([network(latents) for network, latents in pairs])
        return ((made + 1) / 2).clamp(0, 1)


def _tensors(path: Path) -> dict[str, Tensor]:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        return load_file(path)
    except (OSError, SafetensorError) as error:
        raise UserError(f"{path} cannot be read as safetensors: {error}") from None


class GeneratedVariation(Variation):
    """A variation made by a generator, under the name of the stand-in that it replaces.

    Args:
        editor: the generator.
        replaced: the procedural variation; name, title and category are its.
        edit: what is done; by default that of `EDITS`.
        square: which part of the face the generator's pictures show.
        template: as of `Variation`.

    Raises:
        UserError: no edit is given, nor known for this variation.
    """

    at_once, on_gpu = 1, 1  # a generator's pictures are some hundred times as large as a crop

    def __init__(
        self,
        editor: Editor,
        replaced: type[Variation],
        edit: Edit | None = None,
        square: Square = FFHQ,
        template: tuple[tuple[float, float], ...] = ARCFACE,
    ) -> None:
        super().__init__(template)
        found = edit or EDITS.get(replaced.name)
        if found is None:
            raise UserError(f"no edit of a generator is known for '{replaced.name}'; give one")
        self.name, self.title, self.category = replaced.name, replaced.title, replaced.category
        self.levels = found.strengths
        self.editor, self.edit, self.square = editor, found, square

    def vary(self, images: Images, face: Face, severity: int, draws: Draws) -> Images:
        """Cut out as the generator is used to see faces, invert, edit, synthesise, and lay over the image again."""
        centre_u, centre_v, extent = self.square
        axis = (torch.arange(self.editor.side, device=images.device, dtype=images.dtype) + 0.5) / self.editor.side - 0.5
        u, v = axis[None, None, :] * extent + centre_u, axis[None, :, None] * extent + centre_v
        shown = sample(images, *face.pixels(u, v))
        inverted = self.editor.invert(shown)
        edited = self.editor.edit(inverted, self.edit.direction, self.level(severity), self.edit.layers)
        made = self.editor.synthesise(edited)
        # reduced to about the pixels that it fills in the crop: sampled directly a large picture would alias
        size = min(self.editor.side, round(extent * EYES * images.shape[2] / SIDE))
        made = F.interpolate(made, size=(size, size), mode="bilinear", antialias=True)
        across, below = (face.u - centre_u) / extent, (face.v - centre_v) / extent
        laid = sample(made, (across + 0.5) * size - 0.5, (below + 0.5) * size - 0.5)
        alpha = inside(torch.maximum(across.abs(), below.abs()) - 0.48, 0.04)
        return paint(images, laid, alpha)
