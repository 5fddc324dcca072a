"""Age: younger and older."""

import torch

from jobs.oodface.filters import gaussian
from jobs.oodface.randomness import Random
from jobs.oodface.scenario import Draws, Images
from jobs.oodface.variations.base import LEFT_EYE, NOSE, RIGHT_EYE, SIDE, Face, Plane, Variation
from jobs.oodface.variations.drawing import (
    Colour,
    bump,
    colour,
    enlarged,
    halved,
    luma,
    magnified,
    moved,
    paint,
    sample,
    smooth,
)
from jobs.oodface.variations.skin import Tones, compare, hair_colour, saturation, skin_colour
from jobs.oodface.variations.wrinkles import GROUPS, lines_on

CATEGORY = "Age"
BLOTCHES = (24, 20)  # rows and columns of the noise laid over a face


class AgeDecrease(Variation):
    """A younger face: a procedural stand-in for a generator's age direction, not the paper's generator.

    Skin is smoothed where it has no strong edge, brightened and reddened, grey hair darkened; eyes grow, nose and jaw
    shrink.
    """

    name, title, category = "age_decrease", "Age Decrease", CATEGORY
    levels = (0.2, 0.4, 0.6, 0.8, 1.0)
    # radii of the smoothing in a crop of 112 pixels
    RADII = (0.9, 2.0)
    ROSY, BROWN = (1.04, 0.93, 0.94), (0.5, 0.42, 0.36)

    def vary(self, images: Images, face: Face, severity: int, draws: Draws) -> Images:
        """Surface first, then shape."""
        strength = self.level(severity)
        skin, hair = skin_colour(images, face), hair_colour(images, face)
        cover, brown = covers(images, face, skin, hair)
        light = luma(images)
        even = light
        for radius in self.RADII:
            detail = even - gaussian(even, radius * images.shape[2] / SIDE)
            # shadows of wrinkles go sooner than light; what is stronger than either is a feature
            weak = 1 - smooth(detail.clamp(min=0) / 0.12 - detail.clamp(max=0) / 0.2)
            even = even - detail * weak * (cover * strength)[:, None]
        tint = images - light
        lively = (1 + 0.09 * strength) * (even + (1 + 0.15 * strength) * tint)
        young = paint(even + tint, lively, cover)
        u, v = face.fitted()
        cheeks = bump(((u.abs() - 0.55) / 0.42).square() + ((v - 0.62) / 0.38).square()) * cover * strength
        brown = brown * greyness(hair, skin) * strength * 0.9
        ones = torch.ones_like(hair)
        young = young * paint(ones, colour(self.ROSY, images), cheeks) * paint(ones, colour(self.BROWN, images), brown)
        return reshaped(young, face, strength)


class AgeIncrease(Variation):
    """An older face: a procedural stand-in for a generator's age direction, not the paper's generator.

    Wrinkles on forehead, around eyes and mouth, stronger texture and paler, blotchy skin, hair and brows turned grey.
    """

    name, title, category = "age_increase", "Age Increase", CATEGORY
    levels = (0.2, 0.4, 0.6, 0.8, 1.0)
    # radii between which texture is strengthened, in a crop of 112 pixels
    FINE, COARSE = 0.6, 2.2
    TINT = (0.9, 1.0, 1.04)  # of what is darkened: blood shows less

    def draw(self, random: Random, severity: int, height: int, width: int) -> Draws:
        """weights: (batch, 4) of the wrinkles' groups. bend, blotches: (batch, channels, rows, columns) in [-1, 1)."""
        return {
            "weights": random.uniform(len(GROUPS), low=0.75, high=1.25),
            "bend": random.uniform(2, 5, 5, low=-1),
            "blotches": random.uniform(1, *BLOTCHES, low=-1),
        }

    def vary(self, images: Images, face: Face, severity: int, draws: Draws) -> Images:
        """Shape first, then surface."""
        strength = self.level(severity)
        images = reshaped(images, face, -strength)
        skin, hair = skin_colour(images, face), hair_colour(images, face)
        cover, greyed = covers(images, face, skin, hair)
        light, scale = luma(images), images.shape[2] / SIDE
        texture = (gaussian(light, self.FINE * scale) - gaussian(light, self.COARSE * scale)) * 0.7 * strength
        weights, bend, blotches = (draws[name].to(images.device) for name in ("weights", "bend", "blotches"))
        lines = 0.34 * strength * lines_on(images, face, weights, bend)
        u, v = face.fitted()
        spots = 0.07 * strength * sample(blotches, (u + 1.2) * 8, (v + 1.2) * 7.5)[:, 0]
        tint = colour(self.TINT, images)
        shading = 1 + (lines * cover)[:, None] * tint + (spots * cover)[:, None] * tint.square()
        old = (images + texture * cover[:, None]) * shading
        old = paint(old, luma(old), 0.35 * strength * cover)
        # a factor, not a sum, leaves a black background beside black hair black
        mean = (luma(hair) + 0.32).clamp(max=0.72)
        bright = luma(old) * (mean / luma(hair).clamp(min=0.05)).clamp(1, 3.2) / (mean + 0.3)
        grey = torch.maximum(luma(old), (mean + 0.3) * bright / (1 + bright.square()).sqrt())
        return paint(old, grey, greyed * (1 - greyness(hair, skin)) * strength * 0.85)


def reshaped(images: Images, face: Face, young: float) -> Images:
    """Features of a child's proportions (young = 1) or of an old face (young = -1)."""
    coarse = face.halved()
    right, left, nose = face.marks[RIGHT_EYE], face.marks[LEFT_EYE], face.marks[NOSE]
    u, v = coarse.fitted()
    # a child's jaw is narrow and short; an old one sags
    jaw = bump((u / 1.5).square() + ((v - 1.55) / 0.95).square())
    shifts = (
        *(magnified(coarse.u, coarse.v, eye, (0.5, 0.42), (0.2 * young, 0.26 * young)) for eye in (right, left)),
        magnified(coarse.u, coarse.v, nose, (0.5, 0.6), (-0.16 * young, -0.14 * young)),
        magnified(coarse.u, coarse.v, face.mouth, (0.7, 0.34), (0.0, 0.14 * young)),
        (u * jaw * 0.16 * young, (v - 0.9).clamp(min=0) * jaw * 0.1 * young),
    )
    shift = enlarged(torch.stack([sum(one[axis] for one in shifts) for axis in (0, 1)], 1), face)
    # a fifth of the time of cubic interpolation, and the surface is smoothed or sharpened anyway
    return moved(images, face, face.u + shift[:, 0], face.v + shift[:, 1], mode="bilinear")


def covers(images: Images, face: Face, skin: Colour, hair: Colour) -> tuple[Plane, Plane]:
    """How much of each pixel is the face's skin, and how much hair."""
    coarse, few = face.halved(), halved(images)
    tones = compare(few, skin)
    both = torch.stack([skin_cover(coarse, tones), hair_cover(coarse, few, tones, hair)], 1)
    return enlarged(both, face).unbind(1)


def skin_cover(face: Face, tones: Tones) -> Plane:
    """Where the face's skin is: in the face's outline, of its tint, and neither eye nor lip."""
    u, v = face.fitted()
    oval = smooth((1.12 - (((u + 1.4 * face.turned) / 1.08).square() + ((v - 0.42) / 1.62).square()).sqrt()) / 0.2)
    eyes = bump(((u.abs() - 0.5) / 0.34).square() + (v / 0.2).square())
    mouth = bump((u / 0.62).square() + ((v - 1.17) / 0.34).square())
    toned = tones.tinted(0.14, 0.32) * smooth((tones.light - 0.25) / 0.25)
    return oval * toned * (1 - smooth(eyes / 0.4)) * (1 - smooth(mouth / 0.5))


def hair_cover(face: Face, images: Images, tones: Tones, hair: Colour) -> Plane:
    """Where hair is: around the face, of the colour found above it and unlike skin; and in it, as brows or beard."""
    u, v = face.fitted()
    outline = u + 1.4 * face.turned
    # hair hangs as far as it likes: beyond the head its colour decides, less and less
    head = smooth((1.6 - ((outline / 1.1).square() + ((v + 0.05) / 1.4).square()).sqrt()) / 0.65)
    oval = smooth((1.0 - ((outline / 0.95).square() + ((v - 0.45) / 1.42).square()).sqrt()) / 0.15)
    alike = smooth((0.3 - (images - hair).abs().amax(1)) / 0.18) * (1 - compare(hair, tones.skin).skinlike)
    around = head * (1 - oval) * smooth((1.5 - v) / 0.8) * alike * (1 - tones.skinlike)
    brows = bump(((u.abs() - 0.52) / 0.5).square() + ((v + 0.28) / 0.2).square())
    beard = smooth((v - 0.85) / 0.2) * smooth((1.85 - v) / 0.2) * smooth((0.95 - outline.abs()) / 0.15)
    lips = bump((u / 0.6).square() + ((v - 1.19) / 0.33).square())
    within = (smooth(brows / 0.5) + beard * (1 - smooth(lips / 0.35))) * smooth((0.58 - tones.light) / 0.25)
    return gaussian(torch.maximum(around, within.clamp(max=1))[:, None], 0.7)[:, 0]


def greyness(hair: Colour, skin: Colour) -> Plane:
    """1 for hair that is grey already, 0 for hair that has a colour or is dark, and for a white cap."""
    light = compare(hair, skin).light
    pale = smooth((0.35 - saturation(hair)) / 0.15)
    return pale * smooth((light - 0.4) / 0.2) * smooth((1.55 - light) / 0.2)
