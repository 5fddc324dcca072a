"""The dials of a search, and the space that it searches."""

import re
from typing import Annotated, Any

from pydantic import AfterValidator, Field, model_validator

from cluster.config import Section

MOST = 100_000  # trials, or what else is counted here
NUMBER = re.compile(r"[+-]?\d+(\.\d*)?[eE][+-]?\d+")
Plain = bool | int | float | str | None


def _rises(ends: tuple[float, float]) -> tuple[float, float]:
    if ends[0] >= ends[1]:
        raise ValueError(f"the range [{ends[0]:g}, {ends[1]:g}] is empty; write the lower end first")
    return ends


def _numbers(choices: list[Plain]) -> list[Plain]:
    """YAML reads 1e-6, without a dot, as text."""
    return [float(one) if isinstance(one, str) and NUMBER.fullmatch(one) else one for one in choices]


Range = Annotated[tuple[float, float], AfterValidator(_rises)]


class Dimension(Section):
    """What one name of the space may be: exactly one of the fields is given.

    choice: values of the key. uniform, log_uniform: both ends of a range. settings: label -> keys that are set
    together, under a name that need not be a key.
    """

    choice: Annotated[list[Plain], AfterValidator(_numbers)] | None = Field(default=None, min_length=1)
    uniform: Range | None = None
    log_uniform: Range | None = None
    settings: dict[str, dict[str, Any]] | None = Field(default=None, min_length=1)

    def keys(self, name: str) -> set[str]:
        """The configuration keys that it sets under `name`."""
        return {name} if self.settings is None else {key for one in self.settings.values() for key in one}

    @model_validator(mode="after")
    def _one_of_them(self) -> "Dimension":
        given = [name for name in type(self).model_fields if getattr(self, name) is not None]
        if len(given) != 1:
            raise ValueError(f"give one of {', '.join(type(self).model_fields)}, not {' and '.join(given) or 'none'}")
        if self.log_uniform is not None and self.log_uniform[0] <= 0:
            raise ValueError(f"log_uniform starts at {self.log_uniform[0]:g}; it must start above 0")
        return self


class Search(Section):
    """One search. All its objectives are maximised; trials that fall behind at equal steps are ended (halving)."""

    trials: int = Field(default=24, ge=1, le=MOST)
    max_concurrent: int | None = Field(default=None, ge=1, le=MOST)
    naturalness: bool = False
    seed: int = Field(default=0, ge=0, lt=2**32)
    grace_steps: int = Field(default=4, ge=1, le=MOST)
    reduction_factor: float = Field(default=2, gt=1)
    space: dict[Annotated[str, Field(pattern="^[^/]+$")], Dimension | None] = Field(default_factory=dict)


class Tune(Section):
    """A search a system."""

    rule: Search = Search()
