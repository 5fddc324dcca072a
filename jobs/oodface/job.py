"""OODFace from a configuration to a report: a catalogue of the images, every scenario in shards, scores of models."""

import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import joblib
import pyarrow as pa

from cluster import datasets, runs, session
from cluster.errors import JobFailure, UserError, paths_named
from cluster.report import digest, read_json
from cluster.tracking import Tracker
from jobs.oodface import catalogue, protocols
from jobs.oodface.config import Corrupt, OodfaceConfig
from jobs.oodface.run import Run, catalogue_folder, demanded, prepare, usable, work_plan
from jobs.oodface.scenarios import PROCEDURAL

if TYPE_CHECKING:
    from jobs.oodface.pipeline import Task

PACKAGES = ("torch", "numpy", "kornia", "opencv-python-headless", "pillow", "ray", "pyspark")
IMAGES = "images"  # where `corrupt` puts files with output = folders, and `ask` those that it shows


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
        rows = usable(found.manifest.files(found.folder))
        images = run.folder / IMAGES if config.oodface.corrupt.output == "folders" else None
        shards = _shards(run, "corrupt", found, rows, run.folder / "shards", images)
        with session.connected(config), _tracked(run, found) as tracker:
            content, manifest = _made(run, shards, _writer(run))
            content = _provenance(run, found, tracker, "corrupt") | content | {"manifest": manifest.digest}
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
        rows, pairs = _compared(run, found)
        shards = _shards(run, "evaluate", found, rows, run.folder / "embeddings")
        with session.connected(config), _tracked(run, found) as tracker:
            content, manifest = _made(run, shards, _embedder(run))
            with run.phase("scoring"):
                scored = scoring.score(manifest.files(shards.folder), pairs, run.conditions, config.oodface)
            content = _provenance(run, found, tracker, "evaluate") | content | scored | {"pairs_dropped": pairs.dropped}
            content["seconds"] = run.state["seconds"]
            _track(tracker, scored["metrics"])
            _keep(run, tracker, content, [*report.plots(content, run.folder), *report.pictures(run, found, content)])
    return _told(run, content, report.evaluated)


def ask(config: OodfaceConfig, out: Path | None = None, fresh: bool = False, command: str = "") -> Path:
    """Asks vision-language models whether pairs show one person, under every chosen scenario and severity.

    Returns: the path of report.json.
    Raises: as `evaluate`, and JobFailure where an endpoint stays unreachable.
    """
    from jobs.oodface import pair_question, report

    with paths_named():
        run = prepare(config, out, command, "ask")
        runs.claim(run, fresh)
    with runs.exclusively(run.folder):
        found = _catalogue(run)
        answers = run.folder / "answers"
        wanted = pair_question.folders(answers, config.oodface.ask)
        names = {model: place.name for model, place in wanted.items()}
        if (content := _finished(run, found)) is not None and content["answers"] == names:
            return _told(run, content, report.asked)
        # MLflow keeps what a step has: figures of other answers are a later step's
        asked = 0 if content is None else content["asked"] + 1
        rows, pairs = _compared(run, found)
        images = run.folder / IMAGES
        shards = _shards(run, "ask", found, rows, run.folder / "shards", images)
        with session.connected(config), _tracked(run, found) as tracker:
            content, manifest = _made(run, shards, _photographer(run))
            lost = {one["image_id"] for one in content["lost"]}
            pairs = protocols.present(pairs, {*pairs.images()} - lost, "drop")
            with run.phase("questions"):
                dials = config.oodface
                files = pair_question.ask(wanted, images, manifest.digest, pairs, run.conditions, dials.ask)
                scored = pair_question.score(files, pairs, run.conditions, dials)
            content = _provenance(run, found, tracker, "ask") | content | scored | {"pairs_dropped": pairs.dropped}
            content |= {"seconds": run.state["seconds"], "answers": names, "asked": asked}
            _track(tracker, scored["metrics"], asked)
            _keep(run, tracker, content, [*report.plots(content, run.folder), *report.pictures(run, found, content)])
    return _told(run, content, report.asked)


def _data_digests(run: Run, found: catalogue.Catalogue) -> dict[str, str]:
    digests = {run.config.oodface.images: found.digest}
    if run.pairs is not None:
        told = [list(map(int, run.pairs.fold)), run.pairs.same.tolist(), run.pairs.image_a, run.pairs.image_b]
        digests[run.config.oodface.evaluate.pairs] = digest(told)
    return digests


def _catalogue(run: Run) -> catalogue.Catalogue:
    """The images' catalogue, shared by all runs on them."""
    dials = run.config.oodface
    folder = catalogue_folder(run.config)
    with run.phase("catalogue", goes_on=True), runs.exclusively(folder, wait_s=3600):
        print(f"catalogue of {dials.images}: {folder}", flush=True)
        cores = min(joblib.cpu_count(), run.config.workers.number * run.config.workers.cpus)
        master = run.config.cluster.spark_master
        with paths_named():
            found = catalogue.build(dials.layout, dials.images, folder, dials.near_duplicates, cores, master)
    for line in catalogue_lines(found.summary):
        print(line, flush=True)
    return found


def catalogue_lines(summary: Mapping[str, Any]) -> list[str]:
    """What a user should know of the images before hours of work on them."""
    of = f", of {summary['identities']} identities" if summary["identities"] else ""
    lines = [f"{summary['readable']} of {summary['images']} images can be read{of}"]
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
    if content is not None and content["data_digests"] != _data_digests(run, found):
        raise UserError(f"the images have changed since {run.folder} was made; --fresh makes it anew")
    return content


def _compared(run: Run, found: catalogue.Catalogue) -> tuple[pa.Table, protocols.Pairs]:
    """The pairs whose images are there, and these images' rows of the catalogue."""
    rows = usable(found.manifest.files(found.folder))
    pairs = protocols.present(run.pairs, rows["image_id"].to_pylist(), run.config.oodface.evaluate.missing)
    return rows.filter(pa.compute.is_in(rows["image_id"], pa.array(pairs.images()))), pairs


def _writer(run: Run) -> Callable[[], Any]:
    """What makes a worker's writer; small, for Ray sends it to each."""
    from jobs.oodface.work import Writer

    return partial(Writer, work_plan(run.config, run.conditions), run.config.oodface.corrupt, run.folder / IMAGES)


def _photographer(run: Run) -> Callable[[], Any]:
    """A writer of files that a model is shown."""
    from jobs.oodface.work import Writer

    shown = Corrupt(template=run.config.oodface.ask.template, output="folders")
    return partial(Writer, work_plan(run.config, run.conditions), shown, run.folder / IMAGES)


def _embedder(run: Run) -> Callable[[], Any]:
    from jobs.oodface.work import Embedder

    dials = run.config.oodface.evaluate
    return partial(Embedder, work_plan(run.config, run.conditions), dials.models, dials.defences)


@dataclass(frozen=True)
class _Shards:
    """All shards of a run and those that are missing; configuration: what decides what they hold. images: how many."""

    folder: Path
    configuration: Mapping[str, Any]
    images: int
    todo: Sequence["Task"]
    missing: Sequence["Task"]


def _shards(
    run: Run, what: str, found: catalogue.Catalogue, rows: pa.Table, folder: Path, images: Path | None = None
) -> _Shards:
    """What is to be made of these rows of the catalogue; `images` holds files that the shards name.

    Raises:
        UserError: what is missing cannot fit into this machine.
    """
    from jobs.oodface import pipeline

    dials = run.config.oodface
    configuration = {"identity": run.state["identity"], "images": found.digest}
    todo = pipeline.tasks(rows, dials.faces_per_shard)
    # what could not be read a while ago is tried again
    done = {index: shard for index, shard in datasets.prepare(folder, configuration).items() if not shard.note["lost"]}
    if images is not None:
        datasets.sweep(images)
        done = {index for index, shard in done.items() if pipeline.files_present(folder / shard.file, images)}
    missing = [task for task in todo if task.index not in done]
    print(f"{len(done)} of {len(todo)} shards are there already", flush=True)
    if missing:  # a run that only scores starts no worker
        demanded(run, what, pa.concat_tables(task.rows for task in missing)).require_fit()
    return _Shards(folder, configuration, rows.num_rows, todo, missing)


def _made(run: Run, shards: _Shards, maker: Callable[[], Any]) -> tuple[dict[str, Any], datasets.Manifest]:
    """The shards, all of them, and where the time went."""
    from jobs.oodface import pipeline

    dials, total = run.config.oodface, len(shards.todo)
    count, start = 0, time.monotonic()
    with run.phase("shards", goes_on=True):
        made = pipeline.run(shards.missing, shards.folder, maker, dials)
        for number, record in enumerate(made, total - len(shards.missing) + 1):
            count += record["rows"]
            print(f"shard {number}/{total}  {count / (time.monotonic() - start):.0f} images/s", flush=True)
    manifest = datasets.finish(shards.folder, shards.configuration, [task.index for task in shards.todo])
    notes = [shard.note for shard in manifest.shards]
    lost = [image for note in notes for image in note["lost"]]
    if lost and run.pairs is not None and dials.evaluate.missing == "refuse":
        raise JobFailure(
            f"{len(lost)} images could not be read when their turn came, the first {lost[0]['image_id']}, which "
            f"{lost[0]['problem']}; mend that and run the same command again, or leave their pairs out with "
            "oodface.evaluate.missing=drop"
        )
    content = {
        "images": shards.images - len(lost),
        "conditions": len(run.conditions),
        "rows": manifest.rows,
        "no_face": sorted({image for note in notes for image in note["no_face"]}),
        "several_faces": sorted({image for note in notes for image in note["several_faces"]}),
        "lost": lost,
        "work": pipeline.summary(manifest.shards),
        "seconds": run.state["seconds"],
    }
    return content, manifest


def _tracked(run: Run, found: catalogue.Catalogue) -> AbstractContextManager[Tracker]:
    scenarios = list(dict.fromkeys(name for name, severity in run.conditions if severity))
    severities = sorted({severity for _, severity in run.conditions if severity})
    parameters = {"oodface": {**run.settings, "scenarios": scenarios, "severities": severities}}
    tags = {"data_digest": found.digest, "images": run.config.oodface.images, "models": ",".join(run.versions)}
    return runs.tracked(run, "oodface", parameters, tags)


def _provenance(run: Run, found: catalogue.Catalogue, tracker: Tracker, what: str) -> dict[str, Any]:
    return {
        "system": "oodface",
        "job": what,
        "data_digests": _data_digests(run, found),
        "models": dict(run.versions),
        "procedural_stand_ins": [name for name in PROCEDURAL if name in dict(run.conditions)],
        "catalogue": {"folder": str(found.folder)} | {name: found.summary[name] for name in ("images", "readable")},
    } | runs.provenance(run, tracker, PACKAGES)


def _keep(run: Run, tracker: Tracker, content: dict[str, Any], pictures: Sequence[Path]) -> None:
    for path in pictures:
        tracker.artifact(path, "plots")
    runs.publish(content, run.folder, tracker)


def _track(tracker: Tracker, metrics: Mapping[str, Mapping[str, Any]], step: int = 0) -> None:
    for name, found in metrics.items():
        tracker.metrics({f"{name}/{key}": one["value"] for key, one in found.items()}, step, "evaluation")


def _told(run: Run, content: dict[str, Any], show: Callable[[dict[str, Any]], None]) -> Path:
    show(content)
    return run.folder / "report.json"
