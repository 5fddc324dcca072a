"""The peers' side of corruptions.py: runs in an environment of its own, reads `{"peer", "name", "severity", "seconds"}`
a line, answers with the milliseconds an image takes.
"""

import json
import sys
import time
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from tests.fixtures.imagecorruptions.make import with_multichannel

CALLED = {"facial_distortion": "glass_blur"}
ABSENT = ("color_shift", "salt_pepper_noise", "random_occlusion")  # imagecorruptions has no such


def face_like() -> np.ndarray:
    """A 112 x 112 picture in 8 bits."""
    y, x = np.mgrid[0:112, 0:112] / 112.0
    image = np.stack([0.5 + 0.4 * np.sin(9 * x + 3 * y), 0.5 + 0.3 * np.cos(7 * y), 0.3 + 0.5 * x * y], 2)
    image[(x - 0.5) ** 2 + (y - 0.45) ** 2 < 0.05] += 0.2
    return (image.clip(0, 1) * 255).astype(np.uint8)


def imagecorruptions_call(name: str, severity: int):
    """The library's own call, or None where it has no such corruption."""
    if name in ABSENT:
        return None
    import skimage.filters

    skimage.filters.gaussian = with_multichannel(skimage.filters.gaussian)
    import imagecorruptions

    image = face_like()
    return lambda: imagecorruptions.corrupt(image, severity=severity, corruption_name=CALLED.get(name, name))


def albumentations_call(name: str, severity: int):
    """The nearest transform, at a strength like that of the severity; None where there is none."""
    import albumentations as A

    strength = (severity - 1) / 4
    nearest = {
        "brightness": lambda: A.RandomBrightnessContrast((0.1 * severity,) * 2, (0, 0), p=1),
        "contrast": lambda: A.RandomBrightnessContrast((0, 0), (-0.5 - 0.1 * severity,) * 2, p=1),
        "saturate": lambda: A.HueSaturationValue((0, 0), (20 * severity,) * 2, (0, 0), p=1),
        "fog": lambda: A.RandomFog(fog_coef_range=(0.3 + 0.1 * severity,) * 2, p=1),
        "snow": lambda: A.RandomSnow(snow_point_range=(0.1 * severity,) * 2, p=1),
        "defocus_blur": lambda: A.Defocus(radius=((3, 4, 6, 8, 10)[severity - 1],) * 2, p=1),
        "color_shift": lambda: A.HueSaturationValue((-36 * severity // 2, 36 * severity // 2), (0, 0), (0, 0), p=1),
        "pixelate": lambda: A.Downscale(scale_range=((0.6, 0.5, 0.4, 0.3, 0.25)[severity - 1],) * 2, p=1),
        "motion_blur": lambda: A.MotionBlur(blur_limit=((21, 31, 31, 31, 41)[severity - 1],) * 2, p=1),
        "zoom_blur": lambda: A.ZoomBlur(max_factor=(1.1 + 0.05 * severity,) * 2, step_factor=(0.02, 0.02), p=1),
        "facial_distortion": lambda: A.GlassBlur(
            sigma=(0.7, 0.9, 1, 1.1, 1.5)[severity - 1],
            max_delta=(1, 2, 2, 3, 4)[severity - 1],
            iterations=(2, 1, 3, 2, 2)[severity - 1],
            p=1,
        ),
        "gaussian_noise": lambda: A.GaussNoise(std_range=(0.08 + 0.3 * strength,) * 2, p=1),
        "impulse_noise": lambda: A.SaltAndPepper(amount=(0.03 + 0.24 * strength,) * 2, p=1),
        "shot_noise": lambda: A.ShotNoise(scale_range=(0.1 + 0.2 * strength,) * 2, p=1),
        "speckle_noise": lambda: A.MultiplicativeNoise((0.55, 1.45), per_channel=True, elementwise=True, p=1),
        "salt_pepper_noise": lambda: A.SaltAndPepper(amount=(0.06 + 0.2 * strength,) * 2, p=1),
        "jpeg_compression": lambda: A.ImageCompression(quality_range=((25, 18, 15, 10, 7)[severity - 1],) * 2, p=1),
        "random_occlusion": lambda: A.CoarseDropout((severity, severity), (20, 28), (20, 28), p=1),
        "spatter": lambda: A.Spatter(mode="rain" if severity < 4 else "mud", p=1),
    }
    if name not in nearest:
        return None
    transform, image = nearest[name](), face_like()
    return lambda: transform(image=image)


def main() -> None:
    """Answers until the input ends."""
    import warnings

    warnings.simplefilter("ignore")
    import cv2

    cv2.setNumThreads(1)
    calls = {"imagecorruptions": imagecorruptions_call, "albumentations": albumentations_call}
    answers, sys.stdout = sys.stdout, sys.stderr  # the libraries print
    for line in sys.stdin:
        asked = json.loads(line)
        call = calls[asked["peer"]](asked["name"], asked["severity"])
        found = None
        if call is not None:
            call()
            times, until = [], time.process_time() + asked["seconds"]
            while time.process_time() < until or len(times) < 2:
                start = time.process_time()
                call()
                times.append(time.process_time() - start)
            found = float(np.median(times)) * 1e3
        print(json.dumps(found), file=answers, flush=True)


if __name__ == "__main__":
    main()
