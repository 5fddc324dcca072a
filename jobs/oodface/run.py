"""A run of OODFace before anything is started: what it works on, and what is wrong with it."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from cluster import datasets, runs, session
from cluster.errors import UserError, paths_named
from cluster.report import digest
from cluster.tracking import masked
from jobs.oodface import protocols
from jobs.oodface.config import Oodface, OodfaceConfig
from jobs.oodface.corruptions.occlusion import require_textures
from jobs.oodface.faces.detector import load_detector
from jobs.oodface.scenario import CLEAN
from jobs.oodface.scenarios import selected
from jobs.oodface.sources import LAYOUTS

if TYPE_CHECKING:
    from jobs.oodface.plan import Demand
    from jobs.oodface.work import Plan

VERSION = 4  # of what shards hold: another number makes all of them again
# what decides how fast shards are made and not what they hold; scenarios and severities count as conditions
SPEED = {"num_workers", "cpus_per_worker", "gpus_per_worker", "batch_size", "corrupt", "evaluate", "ask"}
SPEED |= {"scenarios", "severities", "clean", "near_duplicates"}


@dataclass
class Run(runs.Run):
    """One run's folder and what it works on. settings: those that decide what comes out, but models and conditions."""

    config: OodfaceConfig
    folder: Path
    command: str
    conditions: tuple[tuple[str, int], ...]
    settings: Mapping[str, Any]
    pairs: protocols.Pairs | None = None
    versions: Mapping[str, str] = field(default_factory=dict)
    state: dict[str, Any] = field(default_factory=dict)


def prepare(config: OodfaceConfig, out: Path | None, command: str, what: str) -> Run:
    """Finds what is wrong with configuration, models and pairs before anything is started or written."""
    session.prepare(config)
    config = _resolved(config)
    dials = config.oodface
    if not dials.images:
        raise UserError(
            "oodface.images is not set; name a folder of photographs, as --set oodface.images=DIR, and its layout with "
            f"--set oodface.layout={'|'.join(LAYOUTS)}"
        )
    severities = sorted(set(dials.severities))
    conditions = [(name, severity) for name in selected(dials.scenarios) for severity in severities]
    pairs, versions = None, {}
    if what != "corrupt":
        pairs, versions = _pairs(config), _versions(config, what)
    else:
        _require_small_shards(dials, len(conditions) + dials.clean)
    own = dials.model_dump(exclude=SPEED) | {what: getattr(dials, what).model_dump(exclude={"endpoints"})}
    if dials.frost is not None:
        own["frost"] = digest(require_textures(Path(dials.frost)))
    for section in (own["detector"], *(one for one in own[what].get("models", []) if isinstance(one, dict))):
        if section["factory"] is None:  # as before there were any
            del section["factory"], section["options"]
    if dials.detector.path is not None:
        own["detector"] |= {"path": load_detector(dials=dials.detector).version}  # or says what is wrong with it
    if dials.clean or what != "corrupt":
        conditions.insert(0, CLEAN)
    if what == "ask":  # of any models: another one is asked about the same photographs
        own |= {"evaluate": dials.evaluate.model_dump(include={"missing", "resamples"})}
    told = None if pairs is None else [list(map(int, pairs.fold)), pairs.same.tolist(), pairs.image_a, pairs.image_b]
    identity = digest([VERSION, what, own, conditions, {} if what == "ask" else dict(versions), told])
    folder = (out or session.storage(config) / "oodface" / f"{what}-{identity}").resolve()
    return Run(config, folder, command, tuple(conditions), own, pairs, versions, {"identity": identity})


def dry_run(config: OodfaceConfig, what: str) -> None:
    """Prints the resolved configuration and what would be made."""
    import yaml

    with paths_named():
        run = prepare(config, None, "", what)
        images = Path(run.config.oodface.images)
        if run.config.oodface.layout != "hub" and not images.exists():
            raise UserError(f"oodface.images = {images} does not exist or is not seen from here; check the path")
    print(yaml.safe_dump(masked(config.model_dump(include={"cluster", "tracking", "oodface"})), sort_keys=False))
    print(f"{len(run.conditions)} versions of each image: {', '.join(selected(config.oodface.scenarios))}")
    if run.pairs is not None:
        asked = f" ({len(run.pairs) * len(run.conditions)} questions each)" if what == "ask" else ""
        print(f"{len(run.pairs)} pairs of {len(run.pairs.images())} images; models: {', '.join(run.versions)}{asked}")
    planned = demanded(run, what, catalogued(run))
    planned.show()
    planned.require_fit()


def demanded(run: Run, what: str, rows: pa.Table | None) -> "Demand":
    """What the run takes of its machine; `rows` are those of the catalogue, None before it is made."""
    from jobs.oodface.plan import demand

    images = None if run.pairs is None else len(run.pairs.images())
    return demand(run.config, what, len(run.conditions), rows, images)


def catalogue_folder(config: OodfaceConfig) -> Path:
    """Where the images' catalogue lies, shared by all runs on them."""
    dials = config.oodface
    name = f"catalogue-{digest([dials.layout, dials.images, dials.near_duplicates])}"
    return session.storage(config) / "oodface" / name


def catalogued(run: Run) -> pa.Table | None:
    """The rows of an earlier run's catalogue that this one is about, None where there is none."""
    folder = catalogue_folder(run.config)
    try:
        manifest = datasets.read_manifest(folder)
    except UserError:  # a damaged one is made again
        return None
    if manifest is None or not all(file.exists() for file in manifest.files(folder)):
        return None
    rows = usable(manifest.files(folder))
    return rows if run.pairs is None else rows.filter(pc.is_in(rows["image_id"], pa.array(run.pairs.images())))


def usable(files: Sequence[Path]) -> pa.Table:
    """The rows of a catalogue's images that can be read."""
    columns = ["image_id", "identity", "path", "row", "place", "width", "height", "readable"]
    table = pa.concat_tables(pq.read_table(file, columns=columns) for file in files)
    return table.filter(table["readable"])


def work_plan(config: OodfaceConfig, conditions: Sequence[tuple[str, int]]) -> "Plan":
    """What a worker is told."""
    from jobs.oodface.work import Plan

    dials = config.oodface
    gpu = dials.gpus_per_worker > 0
    return Plan(
        tuple(conditions),
        dials.seed,
        dials.truncate,
        dials.frost,
        dials.batch_size,
        "cuda" if gpu else "cpu",
        1 if gpu else max(1, dials.cpus_per_worker - (dials.cpus_per_worker > 2)),
        max(1, dials.cpus_per_worker - 1),  # the other one decodes meanwhile
        dials.detector,
    )


def _pairs(config: OodfaceConfig) -> protocols.Pairs:
    dials = config.oodface.evaluate
    if not dials.pairs:
        raise UserError(
            "oodface.evaluate.pairs is not set; name the list of pairs, and its form with "
            f"--set oodface.evaluate.protocol={'|'.join(protocols.PROTOCOLS)}"
        )
    pairs = protocols.load(dials.protocol, Path(dials.pairs).expanduser())
    return pairs if dials.pairs_per_fold is None else protocols.quick(pairs, dials.pairs_per_fold)


def _versions(config: OodfaceConfig, what: str) -> dict[str, str]:
    """What is asked, by name: face models and their versions, or models and their endpoints."""
    if what == "ask":
        from jobs.oodface import pair_question

        pair_question.clients(config.oodface.ask)
        return {one.model: one.base_url for one in config.oodface.ask.endpoints}
    from jobs.oodface.faces import models

    found: dict[str, str] = {}
    for entry in config.oodface.evaluate.models:
        model = models.load(entry)
        if model.name in found:
            raise UserError(f"oodface.evaluate.models names {model.name} twice; drop one or give it another name")
        found[model.name] = model.version
    return found


def _resolved(config: OodfaceConfig) -> OodfaceConfig:
    """With absolute paths, for workers have other working folders; the name of a hub data set stays as it is."""
    dials = config.oodface
    changes: dict[str, Any] = {"frost": dials.frost and _absolute(dials.frost)}
    if dials.detector.path is not None:
        changes["detector"] = dials.detector.model_copy(update={"path": _absolute(dials.detector.path)})
    if dials.images and dials.layout != "hub":
        changes["images"] = _absolute(dials.images)
    entries = [
        one if isinstance(one, str) else one.model_copy(update={"path": _absolute(one.path)})
        for one in dials.evaluate.models
    ]
    changes["evaluate"] = dials.evaluate.model_copy(update={"models": entries})
    return config.model_copy(update={"oodface": dials.model_copy(update=changes)})


def _absolute(place: str) -> str:
    return str(Path(place).expanduser().resolve())


def _require_small_shards(dials: Oodface, conditions: int) -> None:
    """A column of parquet holds 2 GiB of a shard's images, which as noise are as large as their pixels."""
    from jobs.oodface.faces.align import TEMPLATES

    template = TEMPLATES[dials.corrupt.template]
    most = (1 << 31) // (conditions * template.height * template.width * 3 + 1)
    if dials.corrupt.output == "parquet" and dials.faces_per_shard > most:
        raise UserError(
            f"oodface.faces_per_shard = {dials.faces_per_shard} x {conditions} versions may exceed the 2 GiB that a "
            f"shard's images can have; lower it to {most}"
        )
