"""Movement: motion blur, zoom blur, facial distortion."""

import torch
import torch.nn.functional as F
from jaxtyping import Int
from torch import Tensor

from jobs.oodface.filters import centre_zoom, gaussian, streak
from jobs.oodface.randomness import Random
from jobs.oodface.scenario import Draws, Images, Scenario

CATEGORY = "Movement"


class MotionBlur(Scenario):
    """A one-sided streak in a direction of its own for each image."""

    name, title, category = "motion_blur", "Motion Blur", CATEGORY
    levels = ((10, 3), (15, 5), (15, 8), (15, 12), (20, 15))

    def draw(self, random: Random, severity: int, height: int, width: int) -> Draws:
        """angle: (batch,) degrees in [-45, 45)."""
        return {"angle": random.uniform(low=-45, high=45)}

    def apply(self, images: Images, severity: int, draws: Draws) -> Images:
        """Weights exp(-i^2 / 2 sigma^2), i = 0..2 radius."""
        return streak(images, *self.level(severity), draws["angle"])


class ZoomBlur(Scenario):
    """The mean of the image and of its centre at rising magnification."""

    name, title, category = "zoom_blur", "Zoom Blur", CATEGORY
    # step and number of the zooms, which start at 1
    levels = ((0.01, 12), (0.01, 16), (0.02, 11), (0.02, 13), (0.03, 11))
    at_once = 1 << 20

    def apply(self, images: Images, severity: int, draws: Draws) -> Images:
        """(x + sum of zooms) / (n + 1)."""
        step, number = self.level(severity)
        step = (1 + step) - 1  # as NumPy's arange steps: a last bit decides how many pixels a zoom keeps
        batch, channels, height, width = images.shape
        planes = images.reshape(1, batch * channels, height, width)
        if not images.is_cuda:  # pixel by pixel all planes at once: an eighth of the time
            # planes that do not fill a vector of the processor would be rounded in another way
            planes = F.pad(planes, (0, 0, 0, 0, 0, -batch * channels % 16))
            planes = planes.contiguous(memory_format=torch.channels_last)
        total = planes * 2  # itself, and zoom 1
        for index in range(1, number):
            total += centre_zoom(planes, 1 + index * step)[..., :height, :width]
        return total[:, : batch * channels].div_(number + 1).contiguous().view_as(images)


class FacialDistortion(Scenario):
    """Glass blur: pixels take the place of neighbours between two Gaussian blurs.

    The reference walks over the pixels from the last to the first, and each takes the value that its neighbour has at
    that moment (it means to swap, but both names are views of one array). A neighbour later in the image has taken
    another's value already: so a pixel's source is found by following these steps to the first neighbour that had not
    been visited, for all pixels at once, and exactly.
    """

    name, title, category = "facial_distortion", "Facial Distortion", CATEGORY
    levels = ((0.7, 1, 2), (0.9, 2, 1), (1.0, 2, 3), (1.1, 3, 2), (1.5, 4, 2))

    def draw(self, random: Random, severity: int, height: int, width: int) -> Draws:
        """rows, columns: (batch, iterations, height, width) steps in [-delta, delta), used inside the border."""
        _, delta, iterations = self.level(severity)
        bits = random.bits(iterations, height, width)
        rows, columns = ((half & 0xFFFF).mul_(2 * delta).bitwise_right_shift_(16) for half in (bits, bits >> 16))
        return {"rows": rows.sub_(delta), "columns": columns.sub_(delta)}

    def apply(self, images: Images, severity: int, draws: Draws) -> Images:
        """Blur, cut to 8 bits, distort, blur."""
        sigma, delta, iterations = self.level(severity)
        blurred = gaussian(images, sigma).mul_(255).floor_().div_(255)
        batch, channels, height, width = images.shape
        if min(height, width) > 2 * delta:
            source = sources(draws["rows"][:, 0], draws["columns"][:, 0], delta)
            for again in range(1, iterations):
                source = source.gather(1, sources(draws["rows"][:, again], draws["columns"][:, again], delta))
            flat = blurred.view(batch, channels, -1)
            blurred = flat.gather(2, source[:, None].expand(-1, channels, -1)).view_as(blurred)
        return gaussian(blurred, sigma)


def sources(
    rows: Int[Tensor, "batch height width"], columns: Int[Tensor, "batch height width"], delta: int
) -> Int[Tensor, "batch pixels"]:
    """Where each pixel's value comes from after one walk from the last pixel to the first; flat indices."""
    batch, height, width = rows.shape
    here = torch.arange(height * width, dtype=torch.int32, device=rows.device).view(height, width)
    visited = torch.zeros(height, width, dtype=torch.bool, device=rows.device)
    visited[delta + 1 : height - delta + 1, delta + 1 : width - delta + 1] = True
    # a neighbour that was visited before lies later in the image, inside the border
    steps = torch.where(visited, rows * width + columns, 0)
    end = (here + steps).view(batch, -1).to(torch.int64)
    later = visited.view(-1).index_select(0, end.view(-1)) & (steps.view(-1) > 0)
    first = torch.arange(batch, device=rows.device).mul_(height * width)[:, None]
    end = end.add_(first).view(-1)
    neighbour = end.clone()
    waiting = later.nonzero().view(-1)
    while len(waiting):
        reached = end[waiting]
        end[waiting] = neighbour[reached]
        waiting = waiting[later[reached]]
    return end.view(batch, -1).sub_(first)
