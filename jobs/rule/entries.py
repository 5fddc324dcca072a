"""What a comparison is of: methods as they are, methods at a learning rate, configurations from a file, models."""

import math
import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from cluster.config import overlaid
from cluster.errors import UserError
from jobs.rule import methods
from jobs.rule.config import RuleConfig

NAME = re.compile(r"[\w+@-][\w.+@-]*")
LABEL = re.compile(r"[\w+-][\w.+-]*")  # METHOD@LEARNING_RATE is a run of METHOD
FILES = (".yaml", ".log")  # beside the folders of runs
OWN = ("rule.method", "rule.rebo.", "rule.steering.", "rule.boundary.", "rule.baseline.")


@dataclass(frozen=True)
class Entry:
    """A method, with a learning rate of its own or the configuration's; or a configuration under a label."""

    method: str
    learning_rate: float | None = None
    label: str | None = None
    keys: Mapping[str, Any] = field(default_factory=dict, hash=False)

    @property
    def name(self) -> str:
        """The label, or METHOD, or METHOD@LEARNING_RATE, as 2e-6."""
        return self.label or (self.method if self.learning_rate is None else f"{self.method}@{self.rate}")

    @property
    def group(self) -> str:
        """Of entries of one group the best is taken: a method at several rates."""
        return self.label or self.method

    @property
    def rate(self) -> str:
        """The learning rate as people write it, without zeros in the exponent."""
        return re.sub(r"e([+-])0+(\d)", r"e\1\2", str(self.learning_rate))

    @property
    def slug(self) -> str:
        """Its name in folders, the registry and MLflow."""
        return slug(self.name)

    def applied(self, config: RuleConfig) -> RuleConfig:
        """The configuration of its run.

        Raises:
            UserError: a key of a labelled entry that no configuration takes.
        """
        if self.label is not None:
            return overlaid(config, self.keys, f"entry {self.label}")
        rule = config.rule.model_copy(update={"method": self.method})
        if self.learning_rate is not None:
            part = {methods.RULE: "rebo", methods.STEERING_ONLY: "steering"}.get(self.method, "baseline")
            settings = getattr(rule, part).model_copy(update={"learning_rate": self.learning_rate})
            rule = rule.model_copy(update={part: settings})
        return config.model_copy(update={"rule": rule})


def entries(text: str) -> list[Entry]:
    """Entries of a list such as "RULE,NPO@2e-6,NPO@5e-6".

    Raises:
        UserError: an unknown method (the nearest is named), a learning rate that is none, an entry twice.
    """
    found: list[Entry] = []
    for part in text.split(","):
        method, at, number = part.strip().partition("@")
        methods.find(method)
        try:
            rate = float(number) if at else None
        except ValueError:
            rate = 0.0
        if rate is not None and not 0 < rate < math.inf:
            raise UserError(f"--methods {part.strip()}: '{number}' is no learning rate; write METHOD or METHOD@NUMBER")
        if rate is not None and method == methods.PROMPT_ONLY:
            raise UserError(f"--methods {part.strip()}: {method} trains nothing and takes no learning rate")
        entry = Entry(method, rate)
        if entry in found:
            raise UserError(f"--methods names {entry.name} twice; name each once")
        found.append(entry)
    return found


def from_file(path: Path, config: RuleConfig) -> list[Entry]:
    """Entries of a YAML file: a label each, and below it the keys in which it differs from the configuration.

    Raises:
        UserError: the file cannot be read or has another form; a label that is no name; a key that may not differ.
    """
    try:
        text = path.read_text(encoding="utf-8")
        content, node = yaml.safe_load(text), yaml.compose(text, yaml.SafeLoader)
    except (OSError, ValueError, yaml.YAMLError) as error:  # no UTF-8, and 2026-13-45, which is no date
        raise UserError(f"--entries {path} cannot be read as YAML: {' '.join(str(error).split())}") from None
    if not isinstance(content, dict) or not content:
        raise UserError(f"--entries {path} must hold labels, and below each the keys in which it differs")
    found = []
    written = [key.value for key, _ in node.value]
    if twice := {label for label in written if written.count(label) > 1}:
        raise UserError(f"--entries {path} has {min(twice)} twice; give each label once")
    for label, keys in content.items():
        if not isinstance(label, str):
            raise UserError(f"--entries {path}: YAML reads {label!r} there, which is no label; quote it")
        if not LABEL.fullmatch(label) or label.endswith(FILES):
            raise UserError(
                f"--entries {path}: {label!r} is no label; take letters, digits and . + - _, no dot first, and no "
                f"{' or '.join(FILES)} last"
            )
        if not isinstance(keys, dict) or not all(isinstance(key, str) for key in keys):
            raise UserError(f"--entries {path}: below {label} stand no keys, such as rule.rebo.advantage: rloo")
        for key in keys:
            if not key.startswith(OWN):
                raise UserError(
                    f"--entries {path}: {label} sets {key}, but entries are asked the same questions on the same "
                    f"cluster; they may differ in {', '.join(OWN)}, written with dots, as rule.rebo.advantage: rloo"
                )
        entry = Entry(str(keys.get("rule.method", config.rule.method)), label=label, keys=keys)
        methods.find(entry.method)
        found.append(entry)
    return found


def require_distinct(found: Sequence[Entry], models: Collection[str]) -> None:
    """Raises UserError where a label or a model has the name, the group or the folder of another row.

    Of one group the best is taken, so that a model would stand for a method, or hide behind one.
    """
    taken = {"original", "gold", *(name.casefold() for one in found if one.label is None for name in _names(one))}
    for entry in found:
        if entry.label is not None:
            _require_free(f"label {entry.label}", _names(entry), taken)
            taken |= {name.casefold() for name in _names(entry)}
    for name in models:
        _require_free(f"--model {name}", {name, group_of(name), slug(name)}, taken)


def slug(name: str) -> str:
    """The name of a row in folders, the registry and MLflow: NPO-KLR-at-1e-5 for NPO+KLR@1e-5."""
    method, at, rate = name.partition("@")
    return method.replace("+", "-") + ("-at-" + rate if at else "")


def group_of(name: str) -> str:
    """The method of METHOD@LEARNING_RATE, or of a model that is named so."""
    return name.partition("@")[0]


def _names(entry: Entry) -> set[str]:
    return {entry.name, entry.group, entry.slug}


def _require_free(what: str, names: Collection[str], taken: Collection[str]) -> None:
    for name in sorted(names):
        if name.casefold() in taken:
            raise UserError(f"{what}: {name} is another row's name or method (or original, or gold); take another name")


def named_models(texts: Sequence[str], taken: Collection[str]) -> dict[str, Path]:
    """Name -> directory, from NAME=DIR texts.

    Raises:
        UserError: a text of another form, a name twice or one of `taken`.
    """
    found: dict[str, Path] = {}
    for text in texts:
        name, equals, folder = text.partition("=")
        if not equals or not NAME.fullmatch(name):
            raise UserError(
                f"--model {text} is not of the form NAME=DIR, NAME of letters, digits and . + @ - _, no dot first"
            )
        if name in taken or slug(name) in map(slug, found):
            raise UserError(f"--model {text}: there is a model {name} already; take another name")
        found[name] = Path(folder)
    return found
