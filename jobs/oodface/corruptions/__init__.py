"""The twenty corruptions, a file a category."""

from jobs.oodface.corruptions.data import (
    GaussianNoise,
    ImpulseNoise,
    JpegCompression,
    SaltPepperNoise,
    ShotNoise,
    SpeckleNoise,
)
from jobs.oodface.corruptions.lighting import Brightness, Contrast, Fog, Saturate, Snow
from jobs.oodface.corruptions.movement import FacialDistortion, MotionBlur, ZoomBlur
from jobs.oodface.corruptions.occlusion import Frost, RandomOcclusion, Spatter
from jobs.oodface.corruptions.sensor import ColorShift, DefocusBlur, Pixelate

CORRUPTIONS = (
    *(Brightness, Contrast, Saturate, Fog, Snow),
    *(DefocusBlur, ColorShift, Pixelate),
    *(MotionBlur, ZoomBlur, FacialDistortion),
    *(GaussianNoise, ImpulseNoise, ShotNoise, SpeckleNoise, SaltPepperNoise, JpegCompression),
    *(RandomOcclusion, Frost, Spatter),
)
