"""All scenarios by name, and their application to a batch whose samples may differ in severity."""

import difflib
import sys
from collections.abc import Callable, Iterator, Sequence
from functools import wraps
from numbers import Integral
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor

from cluster.errors import UserError
from jobs.oodface.corruptions import CORRUPTIONS
from jobs.oodface.corruptions.extensions import ElasticTransform
from jobs.oodface.randomness import Random
from jobs.oodface.scenario import SEVERITIES, Draws, Images, Scenario
from jobs.oodface.variations import VARIATIONS
from jobs.oodface.variations.base import Landmarks, Variation
from jobs.oodface.variations.face_mask import FaceMask

EXTENSIONS: tuple[type[Scenario], ...] = (ElasticTransform, FaceMask)  # outside the paper's thirty
SCENARIOS: dict[str, type[Scenario]] = {one.name: one for one in (*CORRUPTIONS, *VARIATIONS, *EXTENSIONS)}
GROUPS = {
    "corruptions": tuple(one.name for one in CORRUPTIONS),
    "variations": tuple(one.name for one in VARIATIONS),
    "extensions": tuple(one.name for one in EXTENSIONS),
}
# change the face itself; all are stand-ins, drawn and warped
PROCEDURAL = tuple(name for name, one in SCENARIOS.items() if issubclass(one, Variation))
# as the authors' code and imagecorruptions call them
ALIASES = {
    "glass_blur": "facial_distortion",
    "random_hue_shift": "color_shift",
    "salt_and_pepper_noise": "salt_pepper_noise",
    "saturation": "saturate",
}


def find(name: str) -> Scenario:
    """The scenario of a name, with its default settings.

    Raises:
        UserError: no scenario has that name; the nearest is named.
    """
    known = ALIASES.get(name, name)
    if known in SCENARIOS:
        return SCENARIOS[known]()
    near = difflib.get_close_matches(name, [*SCENARIOS, *ALIASES], 1, 0)
    raise UserError(f"there is no scenario '{name}'; did you mean {near[0]}? All are: {', '.join(SCENARIOS)}")


def selected(names: Sequence[str]) -> list[str]:
    """The scenarios that a configuration names, by name, category or group: in the paper's order, extensions last.

    Raises:
        UserError: a name that is none of these; the nearest is named.
    """
    categories = {one.category.lower(): [] for one in SCENARIOS.values()}
    for one in SCENARIOS.values():
        categories[one.category.lower()].append(one.name)
    chosen: set[str] = set()
    for name in names:
        known = GROUPS.get(name.lower()) or categories.get(name.lower())
        if known is None and name not in SCENARIOS and name not in ALIASES:
            titles = {one.category for one in SCENARIOS.values()}
            [near] = difflib.get_close_matches(name, [*SCENARIOS, *ALIASES, *GROUPS, *titles], 1, 0)
            raise UserError(
                f"there is no scenario '{name}'; did you mean {near}? There are the groups {', '.join(GROUPS)}, the "
                f"categories {', '.join(sorted(titles))}, and {', '.join(SCENARIOS)}"
            )
        chosen |= {*(known or [find(name).name])}
    return [name for name in SCENARIOS if name in chosen]


def require_severity(severity: int) -> int:
    """The severity itself.

    Raises:
        UserError: it is none of 1 to 5.
    """
    if severity not in SEVERITIES:
        raise UserError(f"severity {severity} does not exist; take one of 1 to 5")
    return severity


def _opaque(function: Callable[..., Images]) -> Callable[..., Images]:
    """Kept from torch.compile, which guards every number of the tables, and from autocast, which rounds weights.

    torch.compiler.disable as a decorator would load the compiler, seconds at each start, where nothing is compiled.
    """

    def exact(images: Images, *args: Any, **kwargs: Any) -> Images:
        with torch.autocast(images.device.type, enabled=False):
            return function(images, *args, **kwargs)

    @wraps(function)
    def called(*args: Any, **kwargs: Any) -> Images:
        return (torch.compiler.disable(exact) if "torch._dynamo" in sys.modules else exact)(*args, **kwargs)

    return called


@_opaque
def distort(
    images: Images,
    scenario: Scenario | str,
    severity: int | Sequence[int] | Int[Tensor, " batch"],
    keys: Int[Tensor, " batch"],
    truncate: bool = False,
    landmarks: Landmarks | None = None,
) -> Images:
    """Images under a scenario, in [0, 1] and of the type and on the device that they came in.

    A sample depends on its image, severity and key alone: on a CPU bit for bit. On a GPU it should differ in last
    digits, and by more where a scenario itself rounds, as snow does, or compares with a threshold; the test for that
    (tests/unit/test_corruptions_on_gpu.py) has not met a GPU yet.

    Args:
        images: RGB in [0, 1].
        scenario: a name, or one with settings of its own.
        severity: 1 to 5, one for all or one a sample.
        keys: what each sample's random numbers come from (`randomness.keys`).
        truncate: cuts to the 256 values of 8 bits, as the reference writes its files.
        landmarks: where each face lies, for the variations; by default where aligners put it (`Variation.apply`).

    Raises:
        UserError: an unknown scenario or severity, images that are no RGB floats, severities or keys that are not one
            an image, landmarks that are no face's.
    """
    one = find(scenario) if isinstance(scenario, str) else scenario
    levels = [int(severity)] * len(images) if isinstance(severity, Integral) else torch.as_tensor(severity).tolist()
    _require_batch(images, levels, keys)
    result = torch.empty_like(images)
    for level in dict.fromkeys(levels):
        require_severity(level)
        for part in _parts([at for at, other in enumerate(levels) if other == level], images, one):
            draws = one.draw(Random(keys[part], images.device), level, images.shape[2], images.shape[3])
            if (reduced := one.rows(images[part], level)) is not None:
                _repeated(*reduced, truncate, result, part)
                continue
            own = result[part] if isinstance(part, slice) else None
            placed = None if landmarks is None else landmarks[part]
            changed = _applied(images[part], one, level, draws, truncate, placed, own)
            if changed is not own:
                result[part] = changed.to(images.dtype)
    return result


def _repeated(
    rows: Images, index: Int[Tensor, " height"], truncate: bool, result: Images, part: slice | list[int]
) -> None:
    rows = _finished(rows, truncate, None)
    if isinstance(part, slice) and not rows.requires_grad and rows.dtype == result.dtype:
        torch.index_select(rows, 2, index, out=result[part])
    else:
        result[part] = rows.index_select(2, index).to(result.dtype)


def _require_batch(images: Images, levels: Sequence[int], keys: Int[Tensor, " batch"]) -> None:
    shape = tuple(images.shape)
    if not images.is_floating_point() or len(shape) != 4 or shape[1] != 3:
        raise UserError(f"images of {images.dtype} and shape {shape} are no (batch, 3, height, width) floats in [0, 1]")
    if not len(levels) == len(keys) == len(images):
        given = f"{len(levels)} and {len(keys)}"
        raise UserError(f"{len(images)} images need as many severities and keys; {given} were given")


@_opaque
def apply(
    images: Images,
    scenario: Scenario,
    severity: int,
    draws: Draws,
    truncate: bool = False,
    landmarks: Landmarks | None = None,
    out: Images | None = None,
) -> Images:
    """Images under a scenario whose random parameters are given: float32, in [0, 1], under autocast too.

    Args: as of `distort`.
        out: takes the result, and is returned, where no gradients pass.

    Raises:
        UserError: an unknown severity.
    """
    return _applied(images, scenario, require_severity(severity), draws, truncate, landmarks, out)


def _applied(
    images: Images,
    scenario: Scenario,
    severity: int,
    draws: Draws,
    truncate: bool,
    landmarks: Landmarks | None,
    out: Images | None,
) -> Images:
    changed = _changed(images, scenario, severity, draws, landmarks)
    return _finished(changed, truncate, None if changed.requires_grad else out)


def _changed(images: Images, scenario: Scenario, severity: int, draws: Draws, landmarks: Landmarks | None) -> Images:
    given, images = images, images.float().contiguous()
    if isinstance(scenario, Variation):
        changed = scenario.apply(images, severity, draws, landmarks)
    else:
        changed = scenario.apply(images, severity, draws)
    return changed.clone() if changed.data_ptr() == given.data_ptr() else changed


def _finished(changed: Images, truncate: bool, out: Images | None) -> Images:
    """Clipped to [0, 1], on the 256 steps of 8 bits where asked, in `out` if it is given."""
    if truncate:
        # in place where it is ours alone: a pass over the images costs as much as some scenarios
        steps = (changed.clamp(0, 1) if changed.requires_grad else changed.clamp_(0, 1)).mul_(255).floor_()
        if out is None or out.dtype != steps.dtype:
            return steps.div_(255) if out is None else out.copy_(steps.div_(255))
        return torch.div(steps, 255, out=out)
    if out is None:
        return changed.clamp(0, 1)
    return torch.clamp(changed, 0, 1, out=out) if out.dtype == changed.dtype else out.copy_(changed.clamp(0, 1))


def _parts(members: list[int], images: Images, scenario: Scenario) -> Iterator[slice | list[int]]:
    """As slices where the members follow one another: a view costs nothing."""
    values = scenario.on_gpu if images.is_cuda else scenario.at_once
    size = len(members) if values is None else max(1, values // images[0].numel())
    for start in range(0, len(members), size):
        part = members[start : start + size]
        yield slice(part[0], part[-1] + 1) if part[-1] - part[0] == len(part) - 1 else part
