"""What happens to one shard of faces: align once, then every scenario and severity, then write or embed.

Knows no Ray. A shard's content depends on its images and the plan alone: not on the size of the batches, the number
of workers or what ran before.
"""

import json
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from jaxtyping import Float, UInt8
from torch import Tensor

from cluster.datasets import make_folders, settle, write_file
from cluster.errors import UserError
from jobs.oodface.config import Corrupt
from jobs.oodface.corruptions.occlusion import Frost
from jobs.oodface.defences import defended
from jobs.oodface.faces import models
from jobs.oodface.faces.align import DLIB_YUNET, TEMPLATES, Aligned, Template, align
from jobs.oodface.faces.config import Detection, OwnFace
from jobs.oodface.faces.detector import load_detector
from jobs.oodface.randomness import keys
from jobs.oodface.scenario import CLEAN, Images, Scenario
from jobs.oodface.scenarios import PROCEDURAL, distort, find
from jobs.oodface.sources import stays_inside
from jobs.oodface.threads import use_threads
from jobs.oodface.variations.base import SIDE, Landmarks, fitting

NONE = "none"  # no defence
PIXELS_AT_ONCE = 1 << 25  # of photographs as floats, 12 bytes each, or of one that has more


@dataclass(frozen=True)
class Plan:
    """What is done to every shard.

    conditions: scenario and severity, ("clean", 0) for the crop as it is.
    threads: of torch. processors: of the worker beside the one that decodes: files that are encoded at a time, and
        threads of what a GPU does not compute: JPEG, drops of water, an ONNX model without a GPU build.
    """

    conditions: tuple[tuple[str, int], ...]
    seed: int
    truncate: bool
    frost: str | None
    batch_size: int
    device: str = "cpu"
    threads: int = 1
    processors: int = 1
    detector: Detection = field(default_factory=Detection)


@dataclass
class Shard:
    """Decoded images that belong together: `pixels` are (height, width, 3) uint8 each."""

    index: int
    image_ids: list[str]
    identities: list[str | None]
    pixels: list[np.ndarray]


@dataclass
class Clock:
    """Seconds a stage took; on a GPU, until its kernels were done."""

    device: torch.device
    seconds: dict[str, float] = field(default_factory=dict)

    @contextmanager
    def __call__(self, stage: str) -> Iterator[None]:
        start = time.perf_counter()
        yield
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        self.seconds[stage] = self.seconds.get(stage, 0.0) + time.perf_counter() - start


@dataclass(frozen=True)
class Crops:
    """A shard's faces at one template; the landmarks of a face that was not found are the template's own.

    faces: how many the photograph shows, of which one was chosen.
    """

    images: Images
    landmarks: Landmarks
    found: list[bool]
    faces: list[int]


class Faces:
    """Detects and aligns on a device, and puts crops under the plan's conditions."""

    def __init__(self, plan: Plan) -> None:
        torch.set_num_threads(plan.threads)
        self.plan, self.device = plan, torch.device(plan.device)
        use_threads(plan.processors if self.device.type == "cuda" else plan.threads)
        if self.device.type == "cuda":
            # TF32, and algorithms chosen by batch size, would move landmarks by parts of a pixel
            torch.backends.cudnn.allow_tf32 = False
            torch.backends.cudnn.deterministic = True
        self.detector = load_detector(self.device, plan.detector)
        self.scenarios = {name: _configured(name, plan) for name, severity in plan.conditions if severity}
        self.clock = Clock(self.device)

    def aligned(self, shard: Shard, templates: Sequence[Template]) -> dict[str, Crops]:
        """The crops at each template, by its name."""
        with self.clock("align"):
            parts = [self._aligned(part, templates) for part in _in_parts(shard.pixels)]
            found = {}
            for template, made in zip(templates, zip(*(aligned for aligned, _ in parts), strict=True), strict=True):
                crops = torch.cat([one.crops for one in made])
                if self.plan.truncate:  # aligners write files of 8 bits, and scenarios act on those
                    crops.mul_(255).round_().div_(255)
                landmarks = fitting(torch.cat([one.landmarks for one in made]), crops, _points(template))
                there = torch.cat([one.found for one in made]).tolist()
                found[template.name] = Crops(crops, landmarks, there, [count for _, part in parts for count in part])
            return found

    def _aligned(self, pixels: list[np.ndarray], templates: Sequence[Template]) -> tuple[list[Aligned], list[int]]:
        """Crops a template, and how many faces each photograph shows."""
        images = [_image(one, self.device) for one in pixels]
        chosen, counts = self.detector.portraits(images)
        return [align(images, chosen, template) for template in templates], counts

    def under(self, crops: Crops, image_ids: Sequence[str], scenario: str, severity: int) -> Images:
        """The crops under a condition."""
        with self.clock("distort"):
            if (scenario, severity) == CLEAN:
                return crops.images
            drawn = keys(image_ids, scenario, severity, self.plan.seed)
            step = self.plan.batch_size
            parts = [slice(start, start + step) for start in range(0, len(image_ids), step)]
            one, truncate = self.scenarios[scenario], self.plan.truncate
            return torch.cat(
                [
                    distort(crops.images[part], one, severity, drawn[part], truncate, crops.landmarks[part])
                    for part in parts
                ]
            )


class Writer:
    """Encodes every condition of a shard: a table of images, or of the files that it wrote."""

    rows_per_group = None  # of its table in parquet

    def __init__(self, plan: Plan, dials: Corrupt, folder: Path) -> None:
        self.faces, self.dials, self.folder = Faces(plan), dials, folder
        self.clock = self.faces.clock
        self.pool = ThreadPoolExecutor(plan.processors)
        self.encode = encoder(dials.format, dials.quality)

    def __call__(self, shard: Shard) -> pa.Table:
        """Rows: image_id, identity, scenario, severity, found, faces, and image {bytes, path} or file and sha256.

        Files are on the disk when it returns, before an entry says that the shard is there.

        Raises:
            UserError: an image is called so that its file would lie outside the folder.
            JobFailure: the disk is full, or the folder cannot be written.
        """
        if self.dials.output == "folders":
            for image_id in shard.image_ids:
                if not stays_inside(image_id):
                    raise UserError(f"the image {image_id!r} would be written outside {self.folder}; rename it")
        template = TEMPLATES[self.dials.template]
        crops = self.faces.aligned(shard, [template])[template.name]
        rows: list[dict[str, Any]] = []
        for scenario, severity in self.faces.plan.conditions:
            images = self.faces.under(crops, shard.image_ids, scenario, severity)
            with self.clock("encode"):
                kept = self._kept(images, shard.image_ids, Path(scenario, str(severity)))
            for image_id, identity, found, faces, one in zip(
                shard.image_ids, shard.identities, crops.found, crops.faces, kept, strict=True
            ):
                told = {"scenario": scenario, "severity": severity, "found": found, "faces": faces}
                rows.append({"image_id": image_id, "identity": identity} | told | one)
        if self.dials.output == "folders":
            with self.clock("write"):
                settle((self.folder / row["file"] for row in rows), self.folder)
        return pa.Table.from_pylist(rows, schema=self._schema())

    def empty(self) -> pa.Table:
        """The table of a shard of which no image could be read."""
        return self._schema().empty_table()

    def _kept(self, images: Images, image_ids: Sequence[str], below: Path) -> list[dict[str, Any]]:
        """The columns of each image's row that say where its encoded form is."""
        names = [below / f"{image_id}.{SUFFIXES[self.dials.format]}" for image_id in image_ids]
        if self.dials.output == "parquet":
            files = self.pool.map(self.encode, bits(images))
            return [{"image": {"bytes": file, "path": str(name)}} for name, file in zip(names, files, strict=True)]
        make_folders({(self.folder / name).parent for name in names})

        def write(name: Path, planes: np.ndarray) -> str:
            return write_file(self.folder / name, self.encode(planes))

        digests = self.pool.map(write, names, bits(images))
        return [{"file": str(name), "sha256": digest} for name, digest in zip(names, digests, strict=True)]

    def _schema(self) -> pa.Schema:
        text = pa.string()
        columns = [("image_id", text), ("identity", text), ("scenario", text), ("severity", pa.int8())]
        columns += [("found", pa.bool_()), ("faces", pa.int16())]
        if self.dials.output == "parquet":
            columns.append(("image", pa.struct([("bytes", pa.binary()), ("path", text)])))
        else:
            columns += [("file", text), ("sha256", text)]
        schema = pa.schema(columns)
        features = {field.name: {"dtype": str(field.type), "_type": "Value"} for field in schema}
        if self.dials.output == "parquet":
            features["image"] = {"_type": "Image"}  # what makes `datasets` decode the column
        told = {"huggingface": json.dumps({"info": {"features": features}})}
        if drawn := [name for name in PROCEDURAL if name in dict(self.faces.plan.conditions)]:
            told["procedural_stand_ins"] = json.dumps(drawn)  # who finds the shards alone shall know
        return schema.with_metadata(told)


class Embedder:
    """Asks the face models about every condition of a shard, without the images touching the disk."""

    rows_per_group = 4096  # a few conditions: scoring reads some of them at a time, and in small groups pages grow

    def __init__(self, plan: Plan, entries: Sequence[str | OwnFace], defences: Sequence[str]) -> None:
        self.faces, self.defences = Faces(plan), (NONE, *defences)
        threads = plan.processors if self.faces.device.type == "cuda" else None  # torch's are one beside a GPU
        self.models = [models.load(entry, plan.device, threads=threads) for entry in entries]
        self.clock = self.faces.clock

    def __call__(self, shard: Shard) -> pa.Table:
        """Rows: image_id, scenario, severity, defence, model, found, faces, embedding (float32, of length 1)."""
        templates = {model.template.name: model.template for model in self.models}
        crops = self.faces.aligned(shard, list(templates.values()))
        parts = []
        for scenario, severity in self.faces.plan.conditions:
            changed = {name: self.faces.under(crops[name], shard.image_ids, scenario, severity) for name in templates}
            for model in self.models:
                for defence in self.defences:
                    with self.clock("embed"):
                        embeddings = self._embedded(model, changed[model.template.name], defence, shard.image_ids)
                    told = {"found": crops[model.template.name].found, "faces": crops[model.template.name].faces}
                    parts.append(
                        _embedding_rows(shard.image_ids, scenario, severity, defence, model.name, told, embeddings)
                    )
        return pa.concat_tables(parts)

    def empty(self) -> pa.Table:
        """The table of a shard of which no image could be read."""
        return _embedding_rows([], *CLEAN, NONE, "", {"found": [], "faces": []}, np.zeros((0, 1), np.float32))

    def _embedded(
        self, model: models.FaceModel, images: Images, defence: str, image_ids: Sequence[str]
    ) -> Float[np.ndarray, "images dim"]:
        if defence == NONE:
            return self._asked(model, images).cpu().numpy()
        drawn = keys(image_ids, defence, 0, self.faces.plan.seed)
        forms = [self._asked(model, form) for form in defended(images, defence, drawn)]
        return torch.nn.functional.normalize(torch.stack(forms).mean(0)).cpu().numpy()

    def _asked(self, model: models.FaceModel, images: Images) -> Float[Tensor, "images dim"]:
        return torch.cat([model.embed(part) for part in images.split(self.faces.plan.batch_size)])


SUFFIXES = {"png": "png", "webp": "webp", "jpeg": "jpg"}


def bits(images: Images) -> UInt8[np.ndarray, "batch 3 height width"]:
    """Images as 8 bits, the nearest of the 256 values; what lies outside [0, 1] is cut."""
    return images.clamp(0, 1).mul_(255).round_().to(torch.uint8).cpu().numpy()


def encoder(format: str, quality: int) -> Callable[[UInt8[np.ndarray, "3 height width"]], bytes]:
    """Makes an image file of RGB planes; png and webp are lossless, quality (1 to 100) is jpeg's."""
    import cv2

    options = {
        "png": [cv2.IMWRITE_PNG_COMPRESSION, 1],
        "webp": [cv2.IMWRITE_WEBP_QUALITY, 101],  # above 100: lossless
        "jpeg": [cv2.IMWRITE_JPEG_QUALITY, quality],
    }[format]

    def file(planes: np.ndarray) -> bytes:
        return cv2.imencode(f".{SUFFIXES[format]}", cv2.merge(planes[::-1]), options)[1].tobytes()

    return file


def _configured(name: str, plan: Plan) -> Scenario:
    return Frost(Path(plan.frost)) if name == Frost.name and plan.frost else find(name)


def _points(template: Template) -> list[tuple[float, float]]:
    """The detector's landmarks in a crop of the template, in px of one of 112 x 112."""
    points = DLIB_YUNET.points if template.landmarks == "dlib" else template.points
    scale = SIDE / template.height
    middle = template.width / 2 * scale
    return [((x + 0.5) * scale - middle + SIDE / 2 - 0.5, (y + 0.5) * scale - 0.5) for x, y in points]


def _in_parts(pixels: Sequence[np.ndarray]) -> Iterator[list[np.ndarray]]:
    """The photographs of a shard, some of `PIXELS_AT_ONCE` together; as floats they take four times their bytes."""
    part, held = [], 0
    for one in pixels:
        size = one.shape[0] * one.shape[1]
        if part and held + size > PIXELS_AT_ONCE:
            yield part
            part, held = [], 0
        part.append(one)
        held += size
    yield part


def _image(pixels: np.ndarray, device: torch.device) -> Float[Tensor, "3 height width"]:
    return torch.tensor(pixels, device=device).permute(2, 0, 1).float().div_(255)


def _embedding_rows(
    image_ids: Sequence[str],
    scenario: str,
    severity: int,
    defence: str,
    model: str,
    told: Mapping[str, Sequence[int]],
    embeddings: Float[np.ndarray, "images dim"],
) -> pa.Table:
    count, size = embeddings.shape
    text = pa.string()
    constant = {"scenario": scenario, "defence": defence, "model": model}
    columns = {"image_id": pa.array(image_ids, text), "severity": pa.array([severity] * count, pa.int8())}
    columns |= {name: pa.array([value] * count, text) for name, value in constant.items()}
    flat = pa.array(np.ascontiguousarray(embeddings, np.float32).reshape(-1))
    starts = pa.array(np.arange(count + 1) * size, pa.int32())  # models differ in size
    embedding = pa.ListArray.from_arrays(starts, flat)
    columns |= {"found": pa.array(told["found"], pa.bool_()), "faces": pa.array(told["faces"], pa.int16())}
    return pa.table(columns | {"embedding": embedding})
