"""A scenario as a kornia augmentation, for training pipelines of others."""

from typing import Any

import torch
from kornia.augmentation import IntensityAugmentationBase2D
from torch import Tensor

from cluster.errors import UserError
from jobs.oodface.scenario import SEVERITIES, Scenario
from jobs.oodface.scenarios import distort, find, require_severity


class RandomScenario(IntensityAugmentationBase2D):
    """Applies a scenario at a random severity; parameters can be read from `_params` and passed again, as in kornia.

        augment = kornia.augmentation.AugmentationSequential(RandomScenario("fog", severity=(1, 3), p=0.5))

    Args:
        scenario: a name, or a scenario with settings of its own, as JpegCompression("differentiable").
        severity: 1 to 5, or the first and last of a range that a sample's is drawn from.
        p, p_batch, same_on_batch, keepdim: as everywhere in kornia.

    Raises:
        UserError: an unknown scenario, a severity out of range.
    """

    def __init__(
        self,
        scenario: Scenario | str,
        severity: int | tuple[int, int] = (SEVERITIES[0], SEVERITIES[-1]),
        p: float = 1.0,
        p_batch: float = 1.0,
        same_on_batch: bool = False,
        keepdim: bool = False,
    ) -> None:
        super().__init__(p=p, p_batch=p_batch, same_on_batch=same_on_batch, keepdim=keepdim)
        self.scenario = find(scenario) if isinstance(scenario, str) else scenario
        self.first, self.last = (severity, severity) if isinstance(severity, int) else severity
        if require_severity(self.first) > require_severity(self.last):
            raise UserError(f"severity ({self.first}, {self.last}) is empty; write the lower one first")
        self.flags = {"scenario": self.scenario.name, "severity": (self.first, self.last)}

    def generate_parameters(self, batch_shape: tuple[int, ...]) -> dict[str, Tensor]:
        """severity, keys: (batch,) int64, from torch's own generator, so that torch.manual_seed repeats them."""
        count = 1 if self.same_on_batch else batch_shape[0]
        whole = torch.iinfo(torch.int64)
        drawn = {
            "severity": torch.randint(self.first, self.last + 1, (count,)),
            "keys": torch.randint(whole.min, whole.max, (count,)),
        }
        return {name: value.expand(batch_shape[0]) for name, value in drawn.items()}

    def apply_transform(
        self, input: Tensor, params: dict[str, Tensor], flags: dict[str, Any], transform: Tensor | None = None
    ) -> Tensor:
        """Called by kornia."""
        return distort(input, self.scenario, params["severity"], params["keys"])
