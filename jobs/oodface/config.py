"""The dials of OODFace; imports neither torch nor Ray."""

from typing import Annotated, Literal

from pydantic import Field

from cluster.config import Config, Section, Workers
from jobs.oodface.faces.config import Detection, FaceEntry
from jobs.scoring.chat import ChatSettings

Severity = Annotated[int, Field(ge=1, le=5)]
TEMPLATES = Literal["arcface", "arcface_96", "dlib", "dlib_yunet"]
QUESTION = "Do these two photographs show the same person? Answer with one word, yes or no."


class Corrupt(Section):
    """What `corrupt` writes.

    Parquet shards hold the encoded images; with `folders` they name files below SCENARIO/SEVERITY, as face benchmarks
    lay them out. png and webp are lossless.
    """

    template: TEMPLATES = "arcface"
    output: Literal["parquet", "folders"] = "parquet"
    format: Literal["png", "webp", "jpeg"] = "png"
    quality: int = Field(default=95, ge=1, le=100)


class Evaluate(Section):
    """Which models are asked which pairs, behind which defences."""

    models: list[FaceEntry] = Field(default=["sface", "dlib_resnet"], min_length=1)
    protocol: Literal["csv", "lfw", "ytf", "cfp_fp"] = "csv"
    pairs: str = ""
    pairs_per_fold: int | None = Field(default=None, ge=1, le=1_000_000)
    missing: Literal["refuse", "drop"] = "refuse"
    defences: list[Literal["jpeg", "bit_depth", "resize_pad"]] = Field(default_factory=list)
    resamples: int = Field(default=2000, ge=100, le=1_000_000)


class Ask(Section):
    """Which vision-language models are asked about the pairs of `Evaluate`, and how."""

    endpoints: list[ChatSettings] = Field(default_factory=list)
    question: str = Field(default=QUESTION, min_length=1)
    template: TEMPLATES = "arcface"


class Oodface(Section):
    """Images, scenarios and how the work is cut."""

    images: str = ""
    layout: Literal["folder", "lfw", "cfp", "ytf", "parquet", "hub"] = "lfw"
    near_duplicates: int = Field(default=4, ge=0, le=8)
    scenarios: list[str] = Field(default=["corruptions", "variations"], min_length=1)
    severities: list[Severity] = Field(default=[1, 2, 3, 4, 5], min_length=1)
    clean: bool = True
    seed: int = Field(default=0, ge=0, lt=2**32)
    truncate: bool = True
    frost: str | None = None
    longest_side: int = Field(default=2048, ge=128, le=8192)
    detector: Detection = Detection()
    faces_per_shard: int = Field(default=32, ge=1, le=100_000)
    batch_size: int = Field(default=128, ge=1, le=1_000_000)
    num_workers: int = Field(default=1, ge=1, le=100_000)
    cpus_per_worker: int = Field(default=1, ge=1, le=10_000)
    gpus_per_worker: float = Field(default=0, ge=0, le=1)
    corrupt: Corrupt = Corrupt()
    evaluate: Evaluate = Evaluate()
    ask: Ask = Ask()


class OodfaceConfig(Config):
    """The whole configuration of `python -m jobs.oodface`."""

    oodface: Oodface = Oodface()

    @property
    def workers(self) -> Workers:
        """What the cluster must have room for."""
        own = self.oodface
        return Workers("oodface", own.num_workers, own.cpus_per_worker, own.gpus_per_worker)
