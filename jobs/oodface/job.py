"""OODFace from a configuration to a report: a catalogue of the images, every scenario in shards, scores of models."""

import os
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pyarrow as pa
import pyarrow.parquet as pq

from cluster import datasets, runs, session
from cluster.errors import UserError, paths_named
from cluster.report import digest, read_json, write_json
from cluster.tracking import Tracker, masked
from jobs.oodface import catalogue, protocols
from jobs.oodface.config import Oodface, OodfaceConfig
from jobs.oodface.corruptions.occlusion import require_textures
from jobs.oodface.scenarios import GROUPS, selected
from jobs.oodface.sources import LAYOUTS

if TYPE_CHECKING:
    from jobs.oodface.work import Plan

PACKAGES = ("torch", "numpy", "kornia", "opencv-python-headless", "pillow", "ray", "pyspark")
CLEAN = ("clean", 0)
IMAGES = "images"  # where `corrupt` puts files with output = folders
VERSION = 1  # of what shards hold: another number makes all of them again
# what decides how fast shards are made and not what they hold; scenarios and severities count as conditions
SPEED = {"num_workers", "cpus_per_worker", "gpus_per_worker", "batch_size", "corrupt", "evaluate"}
SPEED |= {"scenarios", "severities", "clean"}


@dataclass
class Run(runs.Run):
    """One run's folder and what it works on."""

    config: OodfaceConfig
    folder: Path
    command: str
    conditions: tuple[tuple[str, int], ...]
    pairs: protocols.Pairs | None = None
    versions: Mapping[str, str] = field(default_factory=dict)
    state: dict[str, Any] = field(default_factory=dict)


def corrupt(config: OodfaceConfig, out: Path | None = None, fresh: bool = False, command: str = "") -> Path:
    """Writes every image under every chosen scenario and severity; returns the path of report.json.

    Raises:
        UserError: what its author can mend in configuration or images.
        JobFailure: the disk is full, workers died for good.
    """
    from jobs.oodface import report

    with paths_named():
        run = prepare(config, out, command, "corrupt")
        runs.claim(run, fresh)
    with runs.exclusively(run.folder):
        found = _catalogue(run)
        if (content := _finished(run, found)) is not None:
            return _told(run, content, report.corrupted)
        with session.connected(config), _tracked(run) as tracker:
            folder = run.folder / "shards"
            images = run.folder / IMAGES if config.oodface.corrupt.output == "folders" else None
            content, manifest = _made(run, found, _usable(found), folder, _writer(run), images)
            content = _provenance(run, found, tracker) | content | {"manifest": manifest.digest}
            _keep(run, tracker, content, report.pictures(run, found, content))
    return _told(run, content, report.corrupted)


def evaluate(config: OodfaceConfig, out: Path | None = None, fresh: bool = False, command: str = "") -> Path:
    """Asks every face model about every pair under every chosen scenario and severity; returns the path of report.json.

    Raises: as `corrupt`, and UserError for a list of pairs that is malformed or names images that are not there.
    """
    from jobs.oodface import report, scoring

    with paths_named():
        run = prepare(config, out, command, "evaluate")
        runs.claim(run, fresh)
    with runs.exclusively(run.folder):
        found = _catalogue(run)
        if (content := _finished(run, found)) is not None:
            return _told(run, content, report.evaluated)
        rows = _usable(found)
        pairs = protocols.present(run.pairs, rows["image_id"].to_pylist(), config.oodface.evaluate.missing)
        rows = rows.filter(pa.compute.is_in(rows["image_id"], pa.array(pairs.images())))
        with session.connected(config), _tracked(run) as tracker:
            folder = run.folder / "embeddings"
            content, manifest = _made(run, found, rows, folder, _embedder(run))
            with run.phase("scoring"):
                scored = scoring.score(manifest.files(folder), pairs, run.conditions, config.oodface)
            content = _provenance(run, found, tracker) | content | scored | {"pairs_dropped": pairs.dropped}
            content["seconds"] = run.state["seconds"]
            _keep(run, tracker, content, [*report.plots(content, run.folder), *report.pictures(run, found, content)])
            for name, metrics in scored["metrics"].items():
                tracker.metrics({f"{name}/{key}": one["value"] for key, one in metrics.items()}, 0, "evaluation")
    return _told(run, content, report.evaluated)


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
    if what == "evaluate":
        pairs, versions = _pairs(config), _versions(config)
    else:
        _require_small_shards(dials, len(conditions) + dials.clean)
    if dials.frost is not None:
        require_textures(Path(dials.frost))
    if dials.clean or what == "evaluate":
        conditions.insert(0, CLEAN)
    own = dials.model_dump(exclude=SPEED) | {what: getattr(dials, what).model_dump()}
    told = None if pairs is None else [list(map(int, pairs.fold)), pairs.same.tolist(), pairs.image_a, pairs.image_b]
    identity = digest([VERSION, what, own, conditions, dict(versions), told])
    folder = (out or session.storage(config) / "oodface" / f"{what}-{identity}").resolve()
    return Run(config, folder, command, tuple(conditions), pairs, versions, {"identity": identity})


def dry_run(config: OodfaceConfig, what: str) -> None:
    """Prints the resolved configuration and what would be made."""
    import yaml

    with paths_named():
        run = prepare(config, None, "", what)
    print(yaml.safe_dump(masked(config.model_dump(include={"cluster", "tracking", "oodface"})), sort_keys=False))
    print(f"{len(run.conditions)} versions of each image: {', '.join(selected(config.oodface.scenarios))}")
    if run.pairs is not None:
        print(f"{len(run.pairs)} pairs of {len(run.pairs.images())} images; models: {', '.join(run.versions)}")


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


def _versions(config: OodfaceConfig) -> dict[str, str]:
    from jobs.oodface.faces import models

    found: dict[str, str] = {}
    for entry in config.oodface.evaluate.models:
        model = models.load(entry)
        if model.name in found:
            raise UserError(f"oodface.evaluate.models names {model.name} twice; drop one or give it another name")
        found[model.name] = model.version
    return found


def _catalogue(run: Run) -> catalogue.Catalogue:
    """The images' catalogue, shared by all runs on them."""
    dials = run.config.oodface
    folder = session.storage(run.config) / "oodface" / f"catalogue-{digest([dials.layout, dials.images])}"
    with run.phase("catalogue"), runs.exclusively(folder, wait_s=3600):
        print(f"catalogue of {dials.images}: {folder}", flush=True)
        cores = min(os.cpu_count() or 1, run.config.workers.number * run.config.workers.cpus)
        found = catalogue.build(dials.layout, dials.images, folder, dials.near_duplicates, cores)
    for line in catalogue_lines(found.summary):
        print(line, flush=True)
    return found


def catalogue_lines(summary: Mapping[str, Any]) -> list[str]:
    """What a user should know of the images before hours of work on them."""
    lines = [f"{summary['readable']} of {summary['images']} images can be read, of {summary['identities']} identities"]
    for image in summary["unreadable"]["list"][:5]:
        lines.append(f"left out: {image['path']} {image['problem']}")
    if summary["unreadable"]["count"] > 5:
        lines.append(f"left out: {summary['unreadable']['count'] - 5} more, listed in the catalogue")
    if summary["duplicates"]["groups"]:
        found = summary["duplicates"]
        lines.append(f"{found['exact']} images are copies and {found['near']} nearly so, in {found['groups']} groups")
    for group in summary["conflicts"]["list"][:5]:
        lines.append(f"one picture under two names: {', '.join(group['images'][:4])}")
    return lines


def _finished(run: Run, found: catalogue.Catalogue) -> dict[str, Any] | None:
    """The report that an earlier driver wrote.

    Raises:
        UserError: the images are others by now.
    """
    content = read_json(run.folder / "report.json")
    if content is not None and content["data_digests"] != {run.config.oodface.images: found.manifest.digest}:
        raise UserError(f"the images have changed since {run.folder} was made; --fresh makes it anew")
    return content


def _usable(found: catalogue.Catalogue) -> pa.Table:
    columns = ["image_id", "identity", "path", "row", "readable"]
    table = pa.concat_tables(pq.read_table(file, columns=columns) for file in found.manifest.files(found.folder))
    return table.filter(table["readable"])


def _writer(run: Run) -> Callable[[], Any]:
    """What makes a worker's writer; small, for Ray sends it to each."""
    from jobs.oodface.work import Writer

    return partial(Writer, work_plan(run.config, run.conditions), run.config.oodface.corrupt, run.folder / IMAGES)


def _embedder(run: Run) -> Callable[[], Any]:
    from jobs.oodface.work import Embedder

    dials = run.config.oodface.evaluate
    return partial(Embedder, work_plan(run.config, run.conditions), dials.models, dials.defences)


def _made(
    run: Run,
    found: catalogue.Catalogue,
    rows: pa.Table,
    folder: Path,
    maker: Callable[[], Any],
    images: Path | None = None,
) -> tuple[dict[str, Any], datasets.Manifest]:
    """The shards of these rows, all of them, and where the time went; `images` holds files that the shards name."""
    from jobs.oodface import pipeline

    dials = run.config.oodface
    configuration = {"identity": run.state["identity"], "images": found.manifest.digest}
    todo = pipeline.tasks(rows, dials.faces_per_shard)
    done = datasets.prepare(folder, configuration)
    if images is not None:
        datasets.sweep(images)
        done = {index for index, shard in done.items() if pipeline.files_present(folder / shard.file, images)}
    missing = [task for task in todo if task.index not in done]
    print(f"{len(done)} of {len(todo)} shards are there already", flush=True)
    count, start = 0, time.monotonic()
    before = run.state.get("seconds", {}).get("shards", 0.0)  # of drivers that did not come to the end
    with run.phase("shards"):
        for number, record in enumerate(pipeline.run(missing, folder, maker, dials), len(done) + 1):
            count += record["rows"]
            print(f"shard {number}/{len(todo)}  {count / (time.monotonic() - start):.0f} images/s", flush=True)
    seconds = run.state["seconds"]
    run.save(seconds=seconds | {"shards": round(seconds["shards"] + before, 2)})
    manifest = datasets.finish(folder, configuration, [task.index for task in todo])
    notes = [shard.note for shard in manifest.shards]
    lost = [image for note in notes for image in note["lost"]]
    content = {
        "images": rows.num_rows - len(lost),
        "conditions": len(run.conditions),
        "rows": manifest.rows,
        "no_face": sorted({image for note in notes for image in note["no_face"]}),
        "lost": lost,
        "work": pipeline.summary(manifest.shards, min(dials.num_workers, len(todo))),
        "seconds": run.state["seconds"],
    }
    return content, manifest


def _tracked(run: Run) -> AbstractContextManager[Tracker]:
    parameters = run.config.model_dump(include={"oodface"})
    tags = {"images": run.config.oodface.images, "models": ",".join(run.versions)}
    return runs.tracked(run, "oodface", parameters, tags)


def _provenance(run: Run, found: catalogue.Catalogue, tracker: Tracker) -> dict[str, Any]:
    return {
        "system": "oodface",
        "data_digests": {run.config.oodface.images: found.manifest.digest},
        "models": dict(run.versions),
        "procedural_stand_ins": [name for name in GROUPS["variations"] if name in dict(run.conditions)],
        "catalogue": {"folder": str(found.folder)} | {name: found.summary[name] for name in ("images", "readable")},
    } | runs.provenance(run, tracker, PACKAGES)


def _keep(run: Run, tracker: Tracker, content: dict[str, Any], pictures: Sequence[Path]) -> None:
    for path in pictures:
        tracker.artifact(path, "plots")
    tracker.artifact(write_json(content, run.folder / "report.json"))


def _told(run: Run, content: dict[str, Any], show: Callable[[dict[str, Any]], None]) -> Path:
    show(content)
    return run.folder / "report.json"


def _resolved(config: OodfaceConfig) -> OodfaceConfig:
    """With absolute paths, for workers have other working folders; the name of a hub data set stays as it is."""
    dials = config.oodface
    changes: dict[str, Any] = {"frost": dials.frost and _absolute(dials.frost)}
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
