"""Drawn people: portraits by numbers, so that everything can be tried without photographs of anybody.

Figures on them say nothing about real faces.
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import yaml
from PIL import Image, ImageDraw, ImageFilter

from cluster.errors import UserError

SIDE, FINE = 250, 3  # pixels of a portrait, and how many times finer it is drawn
FOLDS = 10
Colour = tuple[int, ...]


@dataclass(frozen=True)
class Person:
    """What stays the same in all portraits of a person; lengths in pixels of a portrait."""

    skin: Colour
    hair: Colour
    eyes: Colour
    lips: Colour
    wide: float
    tall: float
    apart: float
    eye: float
    brow: float
    nose: float
    mouth: float
    fringe: float
    long_hair: bool

    @classmethod
    def of(cls, seed: int) -> "Person":
        """The person of a number."""
        draw = np.random.default_rng([seed, 0])
        light, warm = draw.uniform(0.35, 1.0), draw.uniform(0.9, 1.05)
        skin = (232 * light, 182 * light * warm, 148 * light * warm)
        hair = [(58, 36, 24), (24, 20, 20), (140, 96, 50), (190, 160, 100), (120, 52, 28), (130, 130, 132)]
        eyes = [(70, 98, 60), (60, 90, 140), (80, 52, 30), (40, 30, 24)]
        lips = (skin[0] * 0.8, skin[1] * 0.5, skin[2] * 0.55)
        lengths = {"wide": (46, 58), "tall": (62, 74), "apart": (19, 27), "eye": (8.5, 13), "brow": (2, 6)}
        lengths |= {"nose": (26, 42), "mouth": (13, 24), "fringe": (0, 26)}
        return cls(
            _colour(skin),
            hair[draw.integers(len(hair))],
            eyes[draw.integers(len(eyes))],
            _colour(lips),
            **{name: float(draw.uniform(*ends)) for name, ends in lengths.items()},
            long_hair=bool(draw.integers(2)),
        )


def portrait(person: Person, seed: int) -> Image.Image:
    """A person once: 250 x 250 RGB. `seed` decides pose, light, background and the noise of the camera."""
    draw = np.random.default_rng([seed, 1])
    canvas = Image.new("RGB", (SIDE * FINE, SIDE * FINE), _colour(draw.uniform(60, 190, 3)))
    pen = ImageDraw.Draw(canvas)
    x, y = 125 + draw.uniform(-3, 3), 126 + draw.uniform(-3, 3)
    _behind(pen, person, x, y, _colour(draw.uniform(20, 150, 3)))
    soft = canvas.filter(ImageFilter.GaussianBlur(5 * FINE))
    canvas = Image.blend(canvas, soft, 0.55)
    _features(ImageDraw.Draw(canvas), person, x, y, smile=float(draw.uniform(-1.5, 3)))
    canvas = canvas.rotate(float(draw.uniform(-5, 5)), Image.Resampling.BICUBIC, center=(x * FINE, y * FINE))
    blurred = canvas.filter(ImageFilter.GaussianBlur(1.1 * FINE)).resize((SIDE, SIDE), Image.Resampling.LANCZOS)
    rows, columns = np.mgrid[0:SIDE, 0:SIDE] / SIDE - 0.5
    tilt = draw.uniform(-0.35, 0.35, 2)
    light = draw.uniform(0.8, 1.15) * (1 + tilt[0] * columns + tilt[1] * rows - 0.15 * rows**2)
    pixels = np.asarray(blurred, dtype=float) * light[..., None] + draw.normal(0, 2.2, (SIDE, SIDE, 3))
    return Image.fromarray(pixels.clip(0, 255).astype(np.uint8))


def write(folder: Path, people: int = 40, shots: int = 3, seed: int = 0) -> Path:
    """Portraits in LFW's layout below images/, pairs.csv in ten folds, and oodface.yaml that names both; its path.

    Raises:
        UserError: the folder holds something, or there are too few people for ten folds.
    """
    if folder.exists() and any(folder.iterdir()):
        raise UserError(f"--out {folder} is not empty; name a new folder")
    if people < 2 * FOLDS or shots < 2:
        raise UserError(
            f"{people} people in {shots} portraits are too few; take at least {2 * FOLDS} people and 2 portraits"
        )
    names = [f"Drawn_{number:03d}" for number in range(people)]
    lines = ["fold,same,image_a,image_b"]
    for number, name in enumerate(names):
        place = folder / "images" / name
        place.mkdir(parents=True)
        person = Person.of(seed + number)
        for shot in range(1, shots + 1):
            portrait(person, 1000 * (seed + number) + shot).save(place / f"{name}_{shot:04d}.png")
        fold = number * FOLDS // people
        # pairs of two people stay within a fold, as in LFW
        members = [other for other in range(people) if other * FOLDS // people == fold]
        other = names[members[(members.index(number) + 1) % len(members)]]
        for shot in range(2, shots + 1):
            lines.append(f"{fold},1,{name}/{name}_0001.png,{name}/{name}_{shot:04d}.png")
            lines.append(f"{fold},0,{name}/{name}_0001.png,{other}/{other}_{shot:04d}.png")
    (folder / "pairs.csv").write_text("\n".join(lines) + "\n", encoding="utf-8")
    place = folder.resolve()
    dials = {"images": str(place / "images"), "layout": "lfw", "evaluate": {"pairs": str(place / "pairs.csv")}}
    dials["near_duplicates"] = 0  # drawings resemble one another more than photographs do
    path = folder / "oodface.yaml"
    path.write_text(yaml.safe_dump({"oodface": dials}, sort_keys=False), encoding="utf-8")
    return path


def _behind(pen: ImageDraw.ImageDraw, person: Person, x: float, y: float, clothes: Colour) -> None:
    """Shoulders, neck, hair and the bare head."""
    ellipse = _ellipses(pen)
    if person.long_hair:
        ellipse(x, y + 20, person.wide + 17, person.tall + 22, person.hair)
    ellipse(x, y + 146, 92, 70, clothes)
    pen.rectangle([(x - 20) * FINE, (y + 45) * FINE, (x + 20) * FINE, (y + 98) * FINE], fill=_shaded(person.skin, 0.85))
    ellipse(x, y - 14, person.wide + 12, person.tall + 10, person.hair)
    for side in (-1, 1):
        ellipse(x + side * (person.wide + 1), y + 4, 8, 14, _shaded(person.skin, 0.95))
    ellipse(x, y + 2, person.wide, person.tall, person.skin)
    ellipse(x, y - 68 + person.fringe / 2, person.wide - 1, 14 + person.fringe / 2, person.hair)


def _features(pen: ImageDraw.ImageDraw, person: Person, x: float, y: float, smile: float) -> None:
    """Brows, eyes, nose and mouth."""
    ellipse = _ellipses(pen)
    for side in (-1, 1):
        at, size = x + side * person.apart, person.eye
        ellipse(at, y - 12, size + 2, size * 0.65, _shaded(person.skin, 0.88))
        ellipse(at, y - 11, size, size * 0.5, (245, 240, 236))
        ellipse(at, y - 11, size * 0.47, size * 0.48, person.eyes)
        ellipse(at, y - 11, size * 0.22, size * 0.24, (10, 10, 10))
        ellipse(at + 1.6, y - 13, 1, 1, (255, 255, 255))
        brow = [(at - 1.2 * size, y - 24), (at, y - 28), (at + 1.2 * size, y - 24)]
        _line(pen, brow, _shaded(person.hair, 0.9), person.brow)
    tip = y - 14 + person.nose
    pen.polygon(
        [(px * FINE, py * FINE) for px, py in ((x, y - 14), (x - 9, tip), (x + 9, tip))], _shaded(person.skin, 0.95)
    )
    ellipse(x, tip, 11, 6, _shaded(person.skin, 0.92))
    for side in (-1, 1):
        ellipse(x + side * 6, tip + 2, 2.6, 1.8, _shaded(person.skin, 0.58))
    low = tip + 21
    ellipse(x, low, person.mouth, 6, person.lips)
    line = [(x - person.mouth + 1, low - smile), (x, low + smile / 2), (x + person.mouth - 1, low - smile)]
    _line(pen, line, _shaded(person.lips, 0.6), 1.5)


def _ellipses(pen: ImageDraw.ImageDraw) -> Callable[[float, float, float, float, Colour], None]:
    def ellipse(x: float, y: float, across: float, down: float, colour: Colour) -> None:
        ends = (x - across, y - down, x + across, y + down)
        pen.ellipse([end * FINE for end in ends], fill=colour)

    return ellipse


def _line(pen: ImageDraw.ImageDraw, points: list[tuple[float, float]], colour: Colour, width: float) -> None:
    pen.line([(x * FINE, y * FINE) for x, y in points], fill=colour, width=round(width * FINE), joint="curve")


def _shaded(colour: Colour, share: float) -> Colour:
    return _colour(np.array(colour) * share)


def _colour(values: np.ndarray | tuple[float, ...]) -> Colour:
    return tuple(int(min(255, max(0, one))) for one in values)
