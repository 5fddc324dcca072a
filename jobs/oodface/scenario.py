"""What a scenario is: a name, a category, five levels, draws, and their application to a batch of faces."""

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any, ClassVar

from jaxtyping import Float, Int
from torch import Tensor

from jobs.oodface.randomness import Random

Images = Float[Tensor, "batch 3 height width"]
Draws = Mapping[str, Tensor]
SEVERITIES = (1, 2, 3, 4, 5)
CLEAN = ("clean", 0)  # the condition of a crop as it is, among (scenario, severity)


class Scenario(ABC):
    """One way in which a face image leaves the distribution, at five severities.

    Drawing and applying are apart: what `draw` returned can be kept, looked at and applied again, to any image of the
    same size. Each tensor of the draws has the batch as its first dimension.

    Attributes:
        name: as in configuration, shards and reports. title: as in the paper's table.
        category: of the paper's nine, or Extensions.
        levels: the constants of severities 1 to 5: those of ImageNet-C, unscaled, where it has the scenario.
        at_once: values that a CPU computes at a time; they stay in its cache. 1 takes one image after another, where
            a product or a transform may sum in another order in another batch: a sample's bits must not depend on it.
        on_gpu: values that a GPU computes at a time; None for a whole batch.
    """

    name: ClassVar[str]
    title: ClassVar[str]
    category: ClassVar[str]
    levels: ClassVar[tuple[Any, ...]]
    at_once: ClassVar[int] = 1 << 18
    on_gpu: ClassVar[int | None] = None

    def draw(self, random: Random, severity: int, height: int, width: int) -> Draws:
        """The random parameters of a batch; none by default."""
        return {}

    @abstractmethod
    def apply(self, images: Images, severity: int, draws: Draws) -> Images:
        """The images under this scenario: float32 in [0, 1] before the final clipping, which the caller does."""

    def rows(self, images: Images, severity: int) -> tuple[Images, Int[Tensor, " height"]] | None:
        """For a scenario that ends by repeating rows: the different ones, and which of them each row of the result is.

        Clipping these instead of the result saves a third of the time. None for all other scenarios.
        """
        return None

    def level(self, severity: int) -> Any:
        """The constants of a severity."""
        return self.levels[severity - 1]
