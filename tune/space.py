"""From the configured space to Optuna's distributions, and from a trial's values back to configuration keys."""

import math
import random
from collections.abc import Callable, Iterator, Mapping
from typing import TYPE_CHECKING, Any

from cluster.errors import UserError
from tune.config import Dimension, Plain

if TYPE_CHECKING:
    from optuna.distributions import BaseDistribution

Space = Mapping[str, Dimension]
Values = dict[str, Plain]


def present(space: Mapping[str, Dimension | None], place: str) -> Space:
    """The dimensions that are not switched off with null.

    Raises:
        UserError: none is left.
    """
    chosen = {name: dimension for name, dimension in space.items() if dimension is not None}
    if not chosen:
        raise UserError(
            f"{place} is empty; name a key and what it may be, as rule.rebo.advantage: {{choice: [grpo, rloo]}}"
        )
    return chosen


def distributions(space: Space) -> "dict[str, BaseDistribution]":
    """Optuna's form."""
    from optuna.distributions import CategoricalDistribution, FloatDistribution

    found: dict[str, BaseDistribution] = {}
    for name, dimension in space.items():
        if dimension.choice is not None:
            found[name] = CategoricalDistribution(dimension.choice)
        elif dimension.settings is not None:
            found[name] = CategoricalDistribution(list(dimension.settings))
        else:
            low, high = dimension.uniform or dimension.log_uniform
            found[name] = FloatDistribution(low, high, log=dimension.log_uniform is not None)
    return found


def drawn(space: Space, generator: random.Random) -> Values:
    """Values at random."""
    found: Values = {}
    for name, dimension in space.items():
        options = dimension.choice or list(dimension.settings or ())
        if options:
            found[name] = generator.choice(options)
        elif dimension.uniform is not None:
            found[name] = generator.uniform(*dimension.uniform)
        else:
            found[name] = math.exp(generator.uniform(*map(math.log, dimension.log_uniform)))
    return found


def configurations(space: Space, resolved: Callable[[Values], str]) -> float:
    """How many there are to try, the one as it is among them; infinity where a dimension is a range.

    `resolved` pins the configuration that values make: two that make the same count once. No two dimensions set one
    key (`require_usable`), so that each is counted alone.
    """
    count, holds_the_one_as_it_is = 1, True
    for name, dimension in space.items():
        options = dimension.choice or dimension.settings
        if options is None:
            return math.inf
        different = {resolved({name: option}) for option in options}
        count *= len(different)
        holds_the_one_as_it_is &= resolved({}) in different
    return count if holds_the_one_as_it_is else count + 1


def keys_of(space: Space, values: Values) -> dict[str, Any]:
    """The configuration keys that a trial sets."""
    keys: dict[str, Any] = {}
    for name, value in values.items():
        settings = space[name].settings
        keys |= {name: value} if settings is None else settings[value]
    return keys


def corners(space: Space) -> Iterator[tuple[str, Values]]:
    """Each choice, and of a range both ends and a value between, alone; with the words that name it in a message."""
    for name, dimension in space.items():
        ends = dimension.uniform or dimension.log_uniform
        # a key that takes whole numbers only takes both ends of [4, 16], and nothing that is drawn
        for value in dimension.choice or dimension.settings or (*ends, ends[0] + (ends[1] - ends[0]) / math.pi):
            yield f"{name} = {value}", {name: value}


def require_usable(space: Space, place: str, accept: Callable[[dict[str, Any], str], None]) -> None:
    """Has `accept` look at the keys of every corner before anything starts.

    Raises:
        UserError: two names of the space set one key; or from `accept`, with the corner named in front.
    """
    setters: dict[str, str] = {}
    for name, dimension in space.items():
        for key in sorted(dimension.keys(name)):
            if setters.setdefault(key, name) != name:
                raise UserError(f"{place}: {setters[key]} and {name} both set {key}; keep one of them")
    for words, values in corners(space):
        origin = f"{place}: {words}"
        try:
            accept(keys_of(space, values), origin)
        except UserError as error:
            message = str(error)
            raise UserError(message if message.startswith(origin) else f"{origin}: {message}") from None
