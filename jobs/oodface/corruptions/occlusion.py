"""Occlusion: random ellipses, frost, spatter."""

import hashlib
from functools import lru_cache
from importlib import metadata
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from cluster.errors import UserError
from jobs.oodface.filters import gaussian
from jobs.oodface.randomness import Random
from jobs.oodface.scenario import Draws, Images, Scenario
from jobs.oodface.threads import each

CATEGORY = "Occlusion"


class RandomOcclusion(Scenario):
    """Filled ellipses, nearly black."""

    name, title, category = "random_occlusion", "Random Occlusion", CATEGORY
    levels = (1, 2, 3, 4, 5)
    SHORTEST, SHADE = 20, 1 / 255

    def draw(self, random: Random, severity: int, height: int, width: int) -> Draws:
        """centre, axes: (batch, n, 2) pixels in x and y. angle: (batch, n) degrees in [0, 180]."""
        number = self.level(severity)
        longest = max(self.SHORTEST, width // 4)
        across, down = random.integers(0, width + 1, number), random.integers(0, height + 1, number)
        return {
            "centre": torch.stack([across, down], 2),
            "axes": random.integers(self.SHORTEST, longest + 1, number, 2),
            "angle": random.integers(0, 181, number),
        }

    def apply(self, images: Images, severity: int, draws: Draws) -> Images:
        """Half-axes of 20 pixels to a quarter of the width; ellipses may leave the image."""
        height, width = images.shape[2:]
        device = images.device
        across = torch.arange(width, device=device, dtype=torch.float32)
        down = torch.arange(height, device=device, dtype=torch.float32)[:, None]
        covered = torch.zeros(len(images), height, width, dtype=torch.bool, device=device)
        turn = torch.deg2rad(draws["angle"].to(device, torch.float32))[..., None, None]
        centre, axes = (draws[name].to(device, torch.float32)[..., None, None] for name in ("centre", "axes"))
        along, beside = axes[:, :, 0].pow(-2), axes[:, :, 1].pow(-2)
        square_x = turn.cos() ** 2 * along + turn.sin() ** 2 * beside
        square_y = turn.sin() ** 2 * along + turn.cos() ** 2 * beside
        mixed = 2 * turn.sin() * turn.cos() * (along - beside)
        for one in range(axes.shape[1]):
            x, y = across - centre[:, one, 0], down - centre[:, one, 1]
            distance = (x * mixed[:, one] + y * square_y[:, one]).mul_(y).add_(x.square() * square_x[:, one])
            covered |= distance <= 1
        covered = covered[:, None]
        return images.masked_fill(covered, self.SHADE)


class Frost(Scenario):
    """A photograph of frost laid over the image, cut at a random place of one of five textures.

    folder: with files of the names in FROST; by default that of the package imagecorruptions.
    """

    name, title, category = "frost", "Frost", CATEGORY
    levels = ((1.0, 0.4), (0.8, 0.6), (0.7, 0.7), (0.65, 0.7), (0.6, 0.75))

    def __init__(self, folder: Path | None = None) -> None:
        self.folder = folder

    def draw(self, random: Random, severity: int, height: int, width: int) -> Draws:
        """texture: (batch,) 0 to 4. place: (batch, 2) in [0, 1): the corner of the cut, as a share of the room."""
        return {"texture": random.integers(0, len(FROST)), "place": random.uniform(2)}

    def apply(self, images: Images, severity: int, draws: Draws) -> Images:
        """a x + b f."""
        kept, frosted = self.level(severity)
        height, width = images.shape[2:]
        cuts = []
        for texture, (down, right) in zip(draws["texture"].tolist(), draws["place"].tolist(), strict=True):
            frost = frost_texture(self.folder, texture, height, width, images.device)
            top, left = (int(share * room) for share, room in zip((down, right), _room(frost, images), strict=True))
            cuts.append(frost[:, top : top + height, left : left + width])
        return (images * kept).add_(torch.stack(cuts), alpha=frosted)


# The reference draws among the first five of its six files, of which the third has the pixels of the second.
FROST = ("frost1.png", "frost2.png", "frost2.png", "frost4.jpg", "frost5.jpg")


def _room(frost: Tensor, images: Images) -> tuple[int, int]:
    return frost.shape[1] - images.shape[2], frost.shape[2] - images.shape[3]


@lru_cache(maxsize=16)
@torch.inference_mode(False)
def frost_texture(
    folder: Path | None, index: int, height: int, width: int, device: torch.device
) -> Float[Tensor, "3 high wide"]:
    """A texture in RGB, 0 to 1, larger than the image: enlarged to it where smaller, then by a tenth (bicubic).

    Raises:
        UserError: the texture is not there.
    """
    import cv2

    texture = _frost_file(folder, FROST[index])
    high, wide = texture.shape[:2]
    scale = 1.1 * max(1.0, height / high, width / wide)
    size = (int(np.ceil(wide * scale)), int(np.ceil(high * scale)))
    enlarged = cv2.resize(texture, size, interpolation=cv2.INTER_CUBIC)
    return torch.from_numpy(enlarged[..., ::-1].copy()).permute(2, 0, 1).to(device, torch.float32).div_(255)


def _frost_file(folder: Path | None, name: str) -> np.ndarray:
    import cv2

    path = (folder or _shipped()) / name
    texture = cv2.imread(str(path))
    if texture is None:
        raise UserError(f"{path} is no image that can be read; frost needs {', '.join(sorted(set(FROST)))} there")
    return texture


def require_textures(folder: Path) -> list[str]:
    """The SHA-256 of each texture in a folder of the user's own, in the order of `FROST`.

    Raises:
        UserError: one of the textures is not there, or no image.
    """
    for name in FROST:
        _frost_file(folder, name)
    return [hashlib.sha256((folder / name).read_bytes()).hexdigest() for name in FROST]


def _shipped() -> Path:
    try:
        return Path(str(metadata.distribution("imagecorruptions").locate_file("imagecorruptions/frost")))
    except metadata.PackageNotFoundError:
        raise UserError("frost takes its textures from the package imagecorruptions; run make env") from None


class Spatter(Scenario):
    """Drops of water (severities 1 to 3) or splashes of mud (4 and 5)."""

    name, title, category = "spatter", "Spatter", CATEGORY
    # mean, deviation and blur of the liquid, its threshold, strength of water or blur of mud, whether it is mud
    levels = (
        (0.65, 0.3, 4, 0.69, 0.6, False),
        (0.65, 0.3, 3, 0.68, 0.6, False),
        (0.65, 0.3, 2, 0.68, 0.5, False),
        (0.65, 0.3, 1, 0.65, 1.5, True),
        (0.67, 0.4, 1, 0.65, 1.5, True),
    )
    WATER, MUD = (175 / 255, 238 / 255, 238 / 255), (63 / 255, 42 / 255, 20 / 255)

    def draw(self, random: Random, severity: int, height: int, width: int) -> Draws:
        """liquid: (batch, height, width) standard normal."""
        return {"liquid": random.normal(height, width)}

    def apply(self, images: Images, severity: int, draws: Draws) -> Images:
        """Water adds m (175, 238, 238)/255; mud: x (1 - m) + m (63, 42, 20)/255."""
        mean, deviation, sigma, threshold, strength, muddy = self.level(severity)
        liquid = gaussian(draws["liquid"].mul(deviation).add_(mean)[:, None], sigma)
        if muddy:
            mask = gaussian((liquid > threshold).to(images.dtype), strength)
            mask = mask.masked_fill_(mask < 0.8, 0)
            return torch.lerp(images, _colour(self.MUD, images), mask)
        liquid = liquid.masked_fill_(liquid < threshold, 0).mul_(255).to(torch.uint8).cpu()
        mask = torch.stack(each(_drops, liquid[:, 0]))[:, None].to(images.device) * strength
        return torch.addcmul(images, mask, _colour(self.WATER, images))


def _colour(rgb: tuple[float, float, float], images: Images) -> Float[Tensor, "3 1 1"]:
    return torch.tensor(rgb, device=images.device, dtype=images.dtype).view(3, 1, 1)


def _drops(liquid: Tensor) -> Float[Tensor, "height width"]:
    """How bright water is at each pixel, 0 to 1: the liquid's height times its embossed distance from the edges.

    By OpenCV on the CPU, whose thresholds define the scenario; it takes the drawn liquid only, never the image.
    """
    import cv2

    height = liquid.numpy()
    distance = cv2.distanceTransform(255 - cv2.Canny(height, 50, 150), cv2.DIST_L2, 5)
    distance = cv2.blur(np.minimum(distance, 20), (3, 3)).astype(np.uint8)
    emboss = np.array([[-2, -1, 0], [-1, 1, 1], [0, 1, 2]])
    distance = cv2.filter2D(cv2.equalizeHist(distance), cv2.CV_8U, emboss)
    product = height * cv2.blur(distance, (3, 3)).astype(np.float32)
    return torch.from_numpy(product / max(product.max(), 1.0))
