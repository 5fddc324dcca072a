"""Extensions, outside the paper's thirty: elastic transform."""

import torch
import torch.nn.functional as F

from jobs.oodface.filters import mirrored_gaussian
from jobs.oodface.randomness import Random
from jobs.oodface.scenario import Draws, Images, Scenario

CATEGORY = "Extensions"


class ElasticTransform(Scenario):
    """Each pixel taken from a place nearby, moved by two smooth random fields: as imagecorruptions has it.

    ImageNet-C itself first moves three points of the image (an affine map); imagecorruptions leaves that out, and so
    does this. The steps of either direction go with the height.
    """

    name, title, category = "elastic_transform", "Elastic Transform", CATEGORY
    levels = (12.5, 16.25, 21.25, 25.0, 30.0)  # what the smoothed fields are multiplied by
    STEP, SMOOTH = 0.005, 0.01  # largest step as a share of the height; deviation of the Gaussian, of each side

    def draw(self, random: Random, severity: int, height: int, width: int) -> Draws:
        """columns, rows: (batch, height, width) in [-1, 1), steps to the right and down before they are smoothed."""
        return {name: random.uniform(height, width, low=-1) for name in ("columns", "rows")}

    def apply(self, images: Images, severity: int, draws: Draws) -> Images:
        """Bilinear, the image mirrored at its edges."""
        height, width = images.shape[2:]
        sigma = (self.SMOOTH * height, self.SMOOTH * width)
        steps = torch.stack([draws["columns"], draws["rows"]], 1).to(images.device)
        moves = mirrored_gaussian(steps, sigma).mul_(self.STEP * height * self.level(severity))
        x, y = (torch.arange(side, device=images.device, dtype=images.dtype) for side in (width, height))
        # grid_sample counts from -1 at one edge to 1 at the other
        across, down = (2 * (x + moves[:, 0]) + 1) / width - 1, (2 * (y[:, None] + moves[:, 1]) + 1) / height - 1
        grid = torch.stack([across, down], 3)
        return F.grid_sample(images, grid, mode="bilinear", padding_mode="reflection", align_corners=False)
