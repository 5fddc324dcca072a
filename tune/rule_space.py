"""What a search over RULE may set: its configuration, the space, and whether a run takes all that is in it."""

from dataclasses import replace
from functools import partial
from math import ceil
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cluster.config import leaves, overlaid
from cluster.errors import UserError, without_credentials
from jobs.rule.config import RuleConfig
from jobs.rule.data import DEMO_NAME
from tune.config import Tune
from tune.space import Space, Values, configurations, keys_of, present, require_usable

if TYPE_CHECKING:
    from jobs.rule import job

PLACE = "tune.rule.space"
SETTINGS = "search.yaml"  # in a search's folder: what it was begun with
LOOKS = 12  # of a trial, where `rule.trace.every` does not say
SEARCHED = ("rule.rebo.", "rule.steering.", "rule.boundary.")
NOT_SEARCHED = ("rule.rebo.steps", "rule.rebo.updates_per_rollout")
OF_THE_DATA = "rule.boundary."  # what is read depends on these alone


class SearchConfig(RuleConfig):
    """The whole configuration of `python -m tune.rule`."""

    tune: Tune = Tune()


def settled(config: SearchConfig) -> tuple[RuleConfig, Space]:
    """The configuration of a trial that sets nothing, and the space.

    Paths in it are absolute, for a trial may run in another folder; the tracking address, which may hold a password and
    would be written with a trial, is left out.

    Raises:
        UserError: another method than RULE, an empty space, an entry of it that no configuration takes or a search
            cannot set, or more trials than there are configurations; naturalness asked for where no search reads it.
    """
    if config.rule.method != "RULE":
        raise UserError(f"rule.method = {config.rule.method} has no stage 2 to search; take RULE, or `compare`")
    if config.rule.trace.naturalness and not config.tune.rule.naturalness:
        raise UserError("rule.trace.naturalness is no objective of a search; set tune.rule.naturalness=true instead")
    base = RuleConfig(**{name: getattr(config, name) for name in RuleConfig.model_fields})
    keys = {
        "cluster.storage": str(Path(config.cluster.storage).expanduser().resolve()),
        "tracking.uri": None,
        "rule.trace.naturalness": config.tune.rule.naturalness,
    }
    for name in ("model", "data"):
        place = Path(getattr(config.rule, name)).expanduser()
        if place.exists() and getattr(config.rule, name) != DEMO_NAME:  # a folder of that name is not what a run takes
            keys[f"rule.{name}"] = str(place.resolve())
    entailment = config.rule.evaluation.entailment
    if entailment is not None and Path(entailment.model).expanduser().is_dir():
        keys["rule.evaluation.entailment.model"] = str(Path(entailment.model).expanduser().resolve())
    if base.rule.trace.every is None:
        keys["rule.trace.every"] = max(1, base.rule.rebo.steps // LOOKS) * base.rule.rebo.updates_per_rollout
    space = present(config.tune.rule.space, PLACE)
    known = set(leaves(RuleConfig))
    for name, dimension in space.items():
        for key in sorted(dimension.keys(name)):
            a_section = any(other.startswith(f"{key}.") for other in known)
            if key in known and (key in NOT_SEARCHED or a_section or not key.startswith(SEARCHED)):
                raise UserError(
                    f"{PLACE}: {key} cannot be searched: trials are compared at equal steps, on one model and the same "
                    f"probes; take a single key under {', '.join(SEARCHED)} but {' and '.join(NOT_SEARCHED)}"
                )
    base = overlaid(base, keys, "the search")
    require_usable(space, PLACE, partial(overlaid, base))
    most = configurations(space, partial(resolved, base, space))
    if config.tune.rule.trials > most:
        raise UserError(
            f"tune.rule.trials = {config.tune.rule.trials} is more than there is to try: with the one as it is {PLACE} "
            f"makes {most} different configurations; lower it to {most}, or widen the space"
        )
    return base, space


def usable(base: RuleConfig, space: Space, folder: Path | None = None, cleared: Path | None = None) -> list["job.Run"]:
    """Has every choice and values of each range checked as a run's data and plan would be; returns these runs.

    Args:
        folder: of the search, whose disk counts; by default that of a run.
        cleared: as in `jobs.rule.stages.check`.

    Raises:
        UserError: naming the entry of the space.
    """
    from jobs.rule import job, stages

    prepared = job.prepare(base, folder, "")
    runs = [prepared]

    def accept(keys: dict[str, Any], origin: str) -> None:
        config = overlaid(base, keys, origin)
        reads_otherwise = any(key.startswith(OF_THE_DATA) for key in keys)
        runs.append(job.prepare(config, folder, "") if reads_otherwise else replace(prepared, config=config))
        stages.check(runs[-1], cleared)

    require_usable(space, PLACE, accept)
    return runs


def resolved(base: RuleConfig, space: Space, values: Values) -> str:
    """Pins the configuration that values make, or, where no run takes it, these values: that trial will say so."""
    keys = keys_of(space, values)
    try:
        return overlaid(base, keys, PLACE).model_dump_json()
    except UserError:
        return repr(sorted(keys.items()))


def without_halving(base: RuleConfig, config: SearchConfig) -> str:
    """A line where no trial can be ended early, else an empty one."""
    last, every = base.rule.rebo.steps * base.rule.rebo.updates_per_rollout, base.rule.trace.every
    grace = config.tune.rule.grace_steps
    if every * ceil(max(every, grace) / every) < last:
        return ""
    return (
        f"no trial is ended early: of its {last} updates, looked at each rule.trace.every = {every}, none is looked at "
        f"between tune.rule.grace_steps = {grace} and the last\n"
    )


def remembered(config: SearchConfig, base: RuleConfig) -> dict[str, Any]:
    """The configuration with the paths of `base`, which are absolute: it may be resumed from elsewhere."""
    content, uri = config.model_dump(), config.tracking.uri
    content["cluster"]["storage"] = base.cluster.storage
    content["rule"] |= {name: getattr(base.rule, name) for name in ("model", "data")}
    content["rule"]["evaluation"]["entailment"] = base.model_dump()["rule"]["evaluation"]["entailment"]
    if uri is not None and without_credentials(uri) != uri:  # a password comes from the environment again
        content["tracking"]["uri"] = None
    return content
