"""Lighting & Weather: brightness, contrast, saturate, fog, snow."""

import torch
from jaxtyping import Float
from torch import Tensor

from jobs.oodface.filters import centre_zoom, streak
from jobs.oodface.randomness import Random
from jobs.oodface.scenario import Draws, Images, Scenario

CATEGORY = "Lighting & Weather"
LUMA = (0.299, 0.587, 0.114)  # of R, G, B


class Brightness(Scenario):
    """The value of HSV raised by a constant: with hue and saturation kept, every channel grows by one factor."""

    name, title, category = "brightness", "Brightness", CATEGORY
    levels = (0.1, 0.2, 0.3, 0.4, 0.5)

    def apply(self, images: Images, severity: int, draws: Draws) -> Images:
        """v := clip(v + c)."""
        value = images.amax(1, keepdim=True)
        raised = (value + self.level(severity)).clamp_(max=1)
        scaled = images * (raised / value.clamp(min=torch.finfo(images.dtype).tiny))
        return torch.where(value > 0, scaled, raised)  # black has no hue to keep


class Contrast(Scenario):
    """Every channel drawn towards its mean over the image."""

    name, title, category = "contrast", "Contrast", CATEGORY
    levels = (0.4, 0.3, 0.2, 0.1, 0.05)

    def apply(self, images: Images, severity: int, draws: Draws) -> Images:
        """(x - m) c + m."""
        # in double precision the last bits of a sum do not depend on how a batch is shared among threads
        mean = images.mean((2, 3), keepdim=True, dtype=torch.float64).to(images.dtype)
        return torch.lerp(mean, images, self.level(severity))


class Saturate(Scenario):
    """The saturation of HSV scaled and raised; hue and value are kept."""

    name, title, category = "saturate", "Saturate", CATEGORY
    levels = ((0.3, 0), (0.1, 0), (2, 0), (5, 0.1), (20, 0.2))

    def apply(self, images: Images, severity: int, draws: Draws) -> Images:
        """s := clip(a s + b); a grey pixel has hue 0, so that b makes it reddish."""
        factor, offset = self.level(severity)
        value = images.amax(1, keepdim=True)
        chroma = value - images.amin(1, keepdim=True)
        saturation = chroma / value.clamp(min=torch.finfo(images.dtype).tiny)
        changed = (saturation * factor + offset).clamp_(0, 1)
        ratio = changed / saturation.clamp(min=torch.finfo(images.dtype).tiny)
        result = value - (value - images) * ratio
        if not offset:
            return result
        red = torch.cat([value, *[value * (1 - changed)] * 2], 1)
        return torch.where(chroma > 0, result, red)


class Fog(Scenario):
    """A plasma cloud laid over the image, as bright as the image's brightest value allows."""

    name, title, category = "fog", "Fog", CATEGORY
    levels = ((1.5, 2.0), (2.0, 2.0), (2.5, 1.7), (2.5, 1.5), (3.0, 1.4))

    def draw(self, random: Random, severity: int, height: int, width: int) -> Draws:
        """plasma: (batch, side, side) in [-1, 1), one for every point of the cloud but the corner."""
        side = 1 << (max(height, width, 3) - 1).bit_length()
        return {"plasma": random.uniform(side, side, low=-1)}

    def apply(self, images: Images, severity: int, draws: Draws) -> Images:
        """(x + a P) max(x) / (max(x) + a)."""
        amount, decay = self.level(severity)
        cloud = plasma(draws["plasma"], decay)[:, None, : images.shape[2], : images.shape[3]]
        brightest = images.amax((1, 2, 3), keepdim=True)
        return torch.add(images, cloud, alpha=amount).mul_(brightest / (brightest + amount))


def plasma(noise: Float[Tensor, "batch side side"], decay: float) -> Float[Tensor, "batch side side"]:
    """Diamond-square on a torus, scaled to [0, 1]. A step's new points are the mean of four neighbours plus w^2 noise.

    noise: uniform in [-1, 1]; `side` is a power of two. w starts at 100 and is divided by `decay` after each step.
    """
    field = torch.zeros_like(noise)
    step, wobble = field.shape[-1], 100.0
    while step >= 2:
        half = step // 2
        corners = field[:, ::step, ::step]
        total = corners + corners.roll(-1, 1)
        total += total.roll(-1, 2)
        centres = torch.add(total / 4, noise[:, half::step, half::step], alpha=wobble**2)
        field[:, half::step, half::step] = centres
        above = centres + centres.roll(1, 1) + corners + corners.roll(-1, 2)
        beside = centres + centres.roll(1, 2) + corners + corners.roll(-1, 1)
        field[:, ::step, half::step] = torch.add(above / 4, noise[:, ::step, half::step], alpha=wobble**2)
        field[:, half::step, ::step] = torch.add(beside / 4, noise[:, half::step, ::step], alpha=wobble**2)
        step, wobble = half, wobble / decay
    field -= field.amin((1, 2), keepdim=True)
    return field.div_(field.amax((1, 2), keepdim=True))


class Snow(Scenario):
    """Blurred flakes in two directions over an image that turns pale."""

    name, title, category = "snow", "Snow", CATEGORY
    # mean, standard deviation, zoom and threshold of the flakes, radius and sigma of their streaks, share kept
    levels = (
        (0.1, 0.3, 3, 0.5, 10, 4, 0.8),
        (0.2, 0.3, 2, 0.5, 12, 4, 0.7),
        (0.55, 0.3, 4, 0.9, 12, 8, 0.7),
        (0.55, 0.3, 4.5, 0.85, 12, 8, 0.65),
        (0.55, 0.3, 2.5, 0.85, 12, 12, 0.55),
    )

    def draw(self, random: Random, severity: int, height: int, width: int) -> Draws:
        """flakes: (batch, height, width) standard normal. angle: (batch,) degrees in [-135, -45)."""
        return {"flakes": random.normal(height, width), "angle": random.uniform(low=-135, high=-45)}

    def apply(self, images: Images, severity: int, draws: Draws) -> Images:
        """k x + (1 - k) max(x, 1.5 grey(x) + .5), plus the layer, plus the layer turned by half a turn."""
        mean, deviation, zoom, threshold, radius, sigma, kept = self.level(severity)
        flakes = centre_zoom(draws["flakes"].mul(deviation).add_(mean)[:, None], zoom)
        flakes = flakes.masked_fill_(flakes < threshold, 0).clamp_(0, 1)
        layer = streak(flakes, radius, sigma, draws["angle"])
        layer = layer.mul_(255).round_().div_(255)[..., : images.shape[2], : images.shape[3]]
        red, green, blue = images.unbind(1)
        grey = red.mul(LUMA[0]).add_(green, alpha=LUMA[1]).add_(blue, alpha=LUMA[2])
        pale = torch.maximum(images, grey.mul_(1.5).add_(0.5)[:, None])
        return torch.lerp(pale, images, kept).add_(layer + layer.flip(2, 3))
