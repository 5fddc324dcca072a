"""Configuration: `ray_config.yaml` < profile < `--config FILE` < environment < `--set`, checked by pydantic.

Imports neither torch nor ray, so that a wrong key is told within a second.
"""

import difflib
import importlib.util
import os
import re
import reprlib
from abc import abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple, Self, TypeVar, get_args, get_origin

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from cluster.errors import UserError

DEFAULT_FILE = Path(__file__).resolve().parent.parent / "ray_config.yaml"
ENVIRONMENT_PREFIX = "RAYWARD__"
STORAGE_VARIABLE = "RAYWARD_STORAGE"  # what `make up` sets for the jobs that are submitted to it


class Section(BaseModel):
    """A part of the configuration: immutable, and an unknown key is an error, as is infinity or not-a-number."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


class Cluster(Section):
    """Where the job runs and where its results live."""

    address: str | None = None
    num_cpus: int | None = Field(default=None, ge=1, le=10_000)
    storage: str = "results"
    spark_master: Annotated[str, Field(pattern=r"^(spark://|k8s://|yarn$|local-cluster\[)")] | None = None


class Lora(Section):
    """Low-rank adaptation (peft); merged into the weights when a stage ends."""

    rank: int = Field(ge=1, le=100_000)
    alpha: float = Field(gt=0)
    dropout: float = Field(default=0.0, ge=0, lt=1)
    target_modules: str = "all-linear"

    @field_validator("target_modules")
    @classmethod
    def _is_pattern(cls, value: str) -> str:
        try:
            re.compile(value)
        except re.error as error:
            told = f"'{value}' is no regular expression ({error}); take all-linear, or one as .*[qv]_proj"
            raise ValueError(told) from None
        return value


class Train(Section):
    """How many workers train, on what, and how often they save."""

    num_workers: int = Field(default=1, ge=1, le=100_000)
    cpus_per_worker: int = Field(default=2, ge=1, le=10_000)
    gpus_per_worker: int = Field(default=0, ge=0, le=1)
    precision: Literal["auto", "float32", "bfloat16"] = "float32"
    strategy: Literal["ddp", "fsdp"] = "ddp"
    activation_checkpointing: bool = False
    tokens_per_row: int = Field(default=512, ge=16, le=10_000_000)
    checkpoint_every: int = Field(default=20, ge=1, le=1_000_000)
    max_failures: int = Field(default=2, ge=0, le=10_000)
    lora: Lora | None = None

    @model_validator(mode="after")
    def _recomputes_what_it_computed(self) -> "Train":
        dropout = self.lora.dropout if self.lora is not None else 0
        if dropout and self.strategy == "fsdp" and self.activation_checkpointing:
            raise ValueError(
                f"lora.dropout = {dropout} with strategy = fsdp and activation_checkpointing = true: the recomputation "
                "would drop other units; take dropout 0, or no checkpointing"
            )
        return self


class Generation(Section):
    """The engine that writes completions, in training rollouts and in evaluation."""

    engine: Literal["auto", "vllm", "transformers"] = "auto"
    max_batch_sequences: int = Field(default=64, ge=1, le=1_000_000)
    gpu_memory_utilization: float = Field(default=0.35, gt=0, lt=1)


class Tracking(Section):
    """The MLflow run of the job."""

    uri: str | None = None
    experiment: str = Field(default="rayward", min_length=1, max_length=250)
    register_as: str | None = Field(default=None, min_length=1, max_length=250)


class Workers(NamedTuple):
    """How many workers a job has and what each holds; `section` is where that is configured."""

    section: str
    number: int
    cpus: int
    gpus: float


class Config(Section):
    """The sections that every job has; a job adds its own."""

    cluster: Cluster = Cluster()
    tracking: Tracking = Tracking()

    @property
    @abstractmethod
    def workers(self) -> Workers:
        """What the cluster must have room for."""


class TrainingConfig(Config):
    """The sections of a job that trains a language model."""

    train: Train = Train()
    generation: Generation = Generation()

    @property
    def workers(self) -> Workers:
        """What the cluster must have room for."""
        return Workers("train", self.train.num_workers, self.train.cpus_per_worker, self.train.gpus_per_worker)

    def alone(self) -> Self:
        """The same with one worker: what a job needs that asks a model and trains none."""
        return self.model_copy(update={"train": self.train.model_copy(update={"num_workers": 1})})


SomeConfig = TypeVar("SomeConfig", bound=Config)
Origins = dict[str, str]


def load(
    schema: type[SomeConfig],
    profile: str | None = None,
    files: Sequence[Path] = (),
    sets: Sequence[str] = (),
    environ: Mapping[str, str] = os.environ,
    base: Path = DEFAULT_FILE,
) -> SomeConfig:
    """Merges and checks all sources, the later ones winning.

    Args:
        schema: the job's configuration class.
        profile: a name under `profiles` in the base file, or None.
        files: YAML files laid over the profile.
        sets: `a.b=value` assignments, as after `--set`.
        environ: variables `RAYWARD__A__B=value` are taken from here.
        base: the base file.

    Raises:
        UserError: unknown key (with the nearest known one), wrong type, missing or malformed file, unknown profile.
    """
    origins: Origins = {}
    values = _read(base)
    profiles = values.pop("profiles", {})
    _mark(values, base.name, origins)

    def laid(above: dict, origin: str) -> dict:
        for section, value in above.items():
            _require_sections(schema, str(section), value, origin)
        return _merge(schema, values, above, origin, origins)

    if profile is not None:
        if profile not in profiles:
            raise UserError(f"profile '{profile}' is not in {base.name}; take one of {', '.join(sorted(profiles))}")
        values = laid(profiles[profile], f"profile {profile} in {base.name}")
    for path in files:
        values = laid(_read(path), str(path))
    if environ.get(STORAGE_VARIABLE):
        values = laid({"cluster": {"storage": environ[STORAGE_VARIABLE]}}, STORAGE_VARIABLE)
    for name in sorted(environ):
        if name.startswith(ENVIRONMENT_PREFIX):
            key = name.removeprefix(ENVIRONMENT_PREFIX).lower().replace("__", ".")
            values = laid(_nest(key, environ[name], name), name)
    for assignment in sets:
        key, equals, text = assignment.partition("=")
        if not equals or not key:
            raise UserError(f"--set {assignment} is not of the form section.key=value")
        origin = f"--set {assignment if len(assignment) <= 200 else f'{assignment[:197]}...'}"
        _require_read(schema, key.strip().partition(".")[0], origin)
        values = laid(_nest(key.strip(), text, origin), origin)
    mine = {key: value for key, value in values.items() if key in schema.model_fields or not _is_another_system(key)}
    try:
        config = schema.model_validate(mine)
    except ValidationError as error:
        raise UserError("; ".join(_sentences(error, schema, origins))) from None
    if not isinstance(config, TrainingConfig) or config.train.precision != "auto":
        return config
    return config.model_copy(update={"train": config.train.model_copy(update={"precision": fast_precision(config)})})


def overlaid(config: SomeConfig, values: Mapping[str, Any], origin: str) -> SomeConfig:
    """The configuration with dotted keys set to other values, checked as `load` does.

    Raises:
        UserError: unknown key (with the nearest known one), wrong type; `origin` says where the values came from.
    """
    origins: Origins = {}
    content = config.model_dump()
    for key, value in values.items():
        nested = _under(key, value)
        for section, below in nested.items():
            _require_sections(type(config), section, below, origin)
        content = _merge(type(config), content, nested, origin, origins)
    try:
        return type(config).model_validate(content)
    except ValidationError as error:
        raise UserError("; ".join(_sentences(error, type(config), origins))) from None


def fast_precision(config: TrainingConfig, cpuinfo: Path = Path("/proc/cpuinfo")) -> Literal["float32", "bfloat16"]:
    """What `train.precision = auto` stands for: bfloat16 on GPUs and on processors with AMX.

    Elsewhere on CPUs bfloat16 is slow, up to ten times where it is emulated.
    """
    amx = cpuinfo.exists() and "amx_bf16" in cpuinfo.read_text(encoding="utf-8", errors="replace").split()
    return "bfloat16" if config.train.gpus_per_worker or amx else "float32"


def _require_sections(schema: type[BaseModel], key: str, value: Any, origin: str) -> None:
    """A scalar or nothing where a section stands would drop all that lies below it."""
    inner: Any = schema
    for part in key.split("."):
        field = inner.model_fields.get(part)
        if field is None or (inner := _section_of(field.annotation)) is None:
            return
    if isinstance(value, dict):
        for name, below in value.items():
            _require_sections(schema, f"{key}.{name}", below, origin)
    elif value is not None or type(None) not in get_args(field.annotation):
        raise UserError(
            f"{origin}: {key} = {value!r} is wrong: it is a section; set the keys in it, as {key}.KEY=value"
        )


def leaves(schema: type[BaseModel], prefix: str = "") -> Iterator[str]:
    """Every dotted key of a configuration class, sections included."""
    for name, field in schema.model_fields.items():
        yield f"{prefix}{name}"
        inner = _section_of(field.annotation)
        if inner is not None:
            yield from leaves(inner, f"{prefix}{name}.")


def _known(schema: type[BaseModel], place: Sequence[str | int]) -> list[str]:
    """The keys that a wrong one may have been meant for: all, or in a member of a list that member's."""
    section, inside = schema, False
    for part in place:
        field = section.model_fields.get(str(part))
        annotation = field.annotation if field else None
        members = get_args(annotation) if get_origin(annotation) is list else ()
        inside |= bool(members)
        section = next(filter(None, map(_section_of, (*members, annotation))), section)
    prefix = "".join(f"{part}." for part in place)
    return [f"{prefix}{name}" for name in section.model_fields] if inside else list(leaves(schema))


def _section_of(annotation: Any) -> type[BaseModel] | None:
    """The section that a key holds, or may hold beside something else; members of lists and mappings are no keys."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    if get_origin(annotation) in (list, dict):
        return None
    return next(filter(None, map(_section_of, get_args(annotation))), None)


def _require_read(schema: type[BaseModel], section: str, origin: str) -> None:
    """What stands in a file may be for another command; what is typed after one is for that one."""
    if section not in schema.model_fields and _is_another_system(section):
        raise UserError(
            f"{origin}: this command does not read the section {section}; it reads {', '.join(schema.model_fields)}"
        )


def _is_another_system(key: str) -> bool:
    return (
        key == "tune"
        or key in TrainingConfig.model_fields
        or (key.isidentifier() and importlib.util.find_spec(f"jobs.{key}") is not None)
    )


def _read(path: Path) -> dict:
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"configuration file {path} does not exist; check the path") from None
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"configuration file {path} cannot be read: {error}") from None
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        place = f" line {mark.line + 1}" if mark else ""
        raise UserError(f"{path}{place} is not valid YAML: {getattr(error, 'problem', error)}") from None
    if content is None:
        return {}
    if not isinstance(content, dict):
        raise UserError(f"{path} must hold a mapping of sections, but holds a {type(content).__name__}")
    _require_names(content, str(path))
    return content


def _require_names(value: Any, origin: str) -> None:
    """YAML takes anything as a key: `null:`, `1:`, and `on:` for true."""
    if not isinstance(value, dict):
        return
    for key, below in value.items():
        if not isinstance(key, str):
            raise UserError(f"{origin}: the key {key!r} is no name; write the name of a setting there, or quote it")
        _require_names(below, origin)


def _nest(key: str, text: str, origin: str) -> dict:
    try:
        value: Any = yaml.safe_load(text) if text else ""
    except (yaml.YAMLError, ValueError):
        raise UserError(f"{origin}: {reprlib.repr(text)} is not a YAML value; quote it") from None
    _require_names(value, origin)
    return _under(key, value)


def _under(key: str, value: Any) -> dict:
    for part in reversed(key.split(".")):
        value = {part: value}
    return value


def _mark(values: object, origin: str, origins: Origins, prefix: str = "") -> None:
    if isinstance(values, dict):
        for key, value in values.items():
            origins[f"{prefix}{key}"] = origin
            _mark(value, origin, origins, f"{prefix}{key}.")


def _merge(schema: type[BaseModel], below: dict, above: object, origin: str, origins: Origins) -> dict:
    _mark(above, origin, origins)

    def merged(low: Any, high: Any, section: type[BaseModel] | None) -> Any:
        if not (isinstance(low, dict) and isinstance(high, dict)):
            return high
        if section is None:  # a mapping of the user's own names: what stands under one is replaced whole
            return low | high
        fields = section.model_fields
        inner = {key: _section_of(fields[key].annotation) if key in fields else None for key in high}
        return low | {key: merged(low.get(key), value, inner[key]) for key, value in high.items()}

    return merged(below, above or {}, schema)


def _sentences(error: ValidationError, schema: type[BaseModel], origins: Origins) -> Iterator[str]:
    for problem in error.errors(include_url=False):
        # pydantic puts the tag of a union's member into the place; ours stand in brackets
        loc = [part for part in problem["loc"] if not str(part).startswith("(")]
        key = ".".join(map(str, loc))
        above = [".".join(map(str, loc[:length])) for length in range(len(loc), 0, -1)]
        place = next((origins[one] for one in above if one in origins), "the configuration")
        if problem["type"] == "extra_forbidden":
            known = _known(schema, loc[:-1])
            nearest = difflib.get_close_matches(key, known, n=1, cutoff=0.0)
            yield f"{place}: unknown key {key}; the nearest known key is {nearest[0]}"
        else:
            message = problem["msg"].removeprefix("Value error, ")
            yield f"{place}: {key} = {reprlib.repr(problem['input'])} is wrong: {message}"
