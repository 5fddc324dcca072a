"""The ten variations, in the paper's order: procedural stand-ins, placed by landmarks, for its generators' edits.

The paper makes them with StyleGAN2, HiSD and BeautyGAN, whose weights are not public. Those here are drawn and warped:
alike in kind, not in their numbers. `generator.py` puts a generator in their place.
"""

from jobs.oodface.variations.age import AgeDecrease, AgeIncrease
from jobs.oodface.variations.bangs_glasses import BangsGlasses
from jobs.oodface.variations.base import Variation
from jobs.oodface.variations.expression import EyeClose, EyeOpen, MouthClose, MouthOpen
from jobs.oodface.variations.makeup import Makeup
from jobs.oodface.variations.rotation import RotateLeft, RotateRight

VARIATIONS: tuple[type[Variation], ...] = (
    *(AgeDecrease, AgeIncrease),
    *(MouthClose, MouthOpen, EyeClose, EyeOpen),
    *(RotateLeft, RotateRight),
    *(BangsGlasses, Makeup),
)
