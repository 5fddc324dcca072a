"""What a run asks of its machine: shards, crops, processors, GPUs, memory; printed by --dry-run, checked before work.

Sizes of processes are measured (docs/experiments.md, 2026-11-27), those on a GPU are estimated: none was at hand. Only
photographs whose sizes the catalogue has told are held against the machine; before that they are bounded from above.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import joblib

from cluster import session
from cluster.errors import UserError
from cluster.memory import GIB, RESERVE, USABLE, Node, gib, this_node
from jobs.oodface import pipeline
from jobs.oodface.config import OodfaceConfig
from jobs.oodface.faces import models
from jobs.oodface.faces.align import TEMPLATES, Template
from jobs.oodface.work import PIXELS_AT_ONCE

if TYPE_CHECKING:
    import pyarrow as pa

WORKER, DECODER = round(0.9 * GIB), round(0.15 * GIB)  # processes that hold no photographs yet
FLOAT = 4  # bytes
HELD = 4  # tensors of a batch's size that a scenario has at a time
CONTEXT = round(1.5 * GIB)  # CUDA, the networks, and what the detector computes in one pass
EMBEDDING = 10 << 20  # bytes a crop in an embedding network on a GPU, which takes a batch at once
STORE = 0.15  # of a node's memory: Ray's object store has .3, and Ray Data fills half of it


@dataclass(frozen=True)
class Demand:
    """What a run asks for.

    images: photographs, None where neither catalogue nor pairs say; shards: that they are cut into, None likewise.
    workers: processes at work, no more than there are shards. shard: bytes of the largest decoded shard; exact: whether
    the photographs' sizes are known, else it is the most that it can be. crops: of one face, all that are made or
    embedded. rows: (use, bytes, note) of one worker's memory. gpu_rows: of the GPU's, empty without one.
    """

    config: OodfaceConfig
    images: int | None
    shards: int | None
    workers: int
    shard: int
    exact: bool
    crops: str
    rows: tuple[tuple[str, int, str], ...]
    gpu_rows: tuple[tuple[str, int, str], ...]

    def store(self, node: Node) -> int:
        """Bytes of the machine's object store that decoded shards may take."""
        return min(pipeline.store_limit(self.shard, self.workers), round(STORE * node.memory))

    def memory(self, node: Node) -> int:
        """Bytes that all workers and the object store of the machine take."""
        return self.workers * sum(size for _, size, _ in self.rows) + self.store(node)

    def refusal(self, node: Node) -> str | None:
        """Why the run cannot fit into this machine, with a remedy; None where it fits, or lies on another cluster."""
        dials = self.config.oodface
        if _cluster(self.config):
            return None
        # the session wants room for all that are asked for, however few shards there are
        if node.gpus and dials.num_workers * dials.gpus_per_worker > len(node.gpus):
            return (
                f"oodface.num_workers = {dials.num_workers} x oodface.gpus_per_worker = {dials.gpus_per_worker:g} "
                f"needs more than the {len(node.gpus)} GPUs of this machine; lower one of them"
            )
        needed, usable = self.memory(node), USABLE * node.memory - RESERVE
        if self.exact and needed > usable:
            fewer = self.workers > 1  # a remedy only then
            return (
                f"{f'oodface.num_workers = {self.workers}' if fewer else 'one worker'} needs about {gib(needed)} of "
                f"memory, and {gib(usable)} are usable; lower {'it, ' if fewer else ''}oodface.faces_per_shard or "
                "oodface.longest_side"
            )
        here = math.floor(1 / dials.gpus_per_worker + 1e-9) if dials.gpus_per_worker else 0
        on_gpu = min(here, self.workers) * sum(size for _, size, _ in self.gpu_rows)
        if node.gpus and on_gpu > USABLE * min(node.gpus):
            return (
                f"a GPU's workers need about {gib(on_gpu)}, and {gib(USABLE * min(node.gpus))} are usable; lower "
                "oodface.faces_per_shard or oodface.batch_size, or raise oodface.gpus_per_worker"
            )
        return None

    def require_fit(self) -> None:
        """Raises UserError where the run cannot fit into this machine."""
        if (told := self.refusal(this_node(session.storage(self.config)))) is not None:
            raise UserError(told)

    def show(self) -> None:
        """Prints shards, crops, processors and memory, against what this machine has."""
        from rich.console import Console
        from rich.table import Table

        dials, node = self.config.oodface, this_node(session.storage(self.config))
        known = "shards" if self.shards is None else f"{self.images} photographs in {self.shards} shards"
        sizes = (
            "as catalogued" if self.exact else f"if each photograph has {dials.longest_side} x {dials.longest_side} px"
        )
        print(f"{known} of {dials.faces_per_shard}; the largest decoded: {gib(self.shard)} ({sizes})")
        print(f"a face: {self.crops}; a batch: {min(dials.batch_size, dials.faces_per_shard)} of a shard's faces")
        demanded, present = self.workers * dials.cpus_per_worker, joblib.cpu_count()
        print(
            f"workers: {self.workers} x {dials.cpus_per_worker} processors = {demanded}, here are {present}; "
            f"{self.workers} x {dials.gpus_per_worker:g} GPUs = {self.workers * dials.gpus_per_worker:g}, "
            f"here are {len(node.gpus)}"
        )
        table = Table(title="Memory plan, about: one worker")
        for column, justify in (("", "left"), ("GiB", "right"), ("", "left")):
            table.add_column(column, justify=justify)
        for place, rows in (("memory", self.rows), ("GPU memory", self.gpu_rows)):
            for name, size, note in rows:
                table.add_row(name, f"{size / GIB:.2f}", note)
            if rows:
                table.add_row(f"= {place}", f"{sum(size for _, size, _ in rows) / GIB:.2f}", end_section=True)
        table.add_row("object store, of all workers", f"{self.store(node) / GIB:.2f}", "decoded shards, which wait")
        Console().print(table)
        print(self._verdict(node))

    def _verdict(self, node: Node) -> str:
        if _cluster(self.config):
            return "The run goes to a cluster: this machine's memory is not what counts."
        if (told := self.refusal(node)) is not None:
            return f"Does not fit: {told}."
        usable = gib(USABLE * node.memory - RESERVE)
        kept = f"{USABLE:.0%} of {gib(node.memory)} less {gib(RESERVE)} for Ray and the driver"
        on_gpu = "; no GPU on this machine: not checked" if self.gpu_rows and not node.gpus else ""
        told = "Fits:" if self.exact else "Checked when the photographs are catalogued: at most"
        return f"{told} {gib(self.memory(node))} of {usable} usable ({kept}){on_gpu}."


def demand(
    config: OodfaceConfig, what: str, conditions: int, rows: pa.Table | None = None, images: int | None = None
) -> Demand:
    """What `corrupt`, `evaluate` or `ask` will take.

    Args:
        what: one of these three.
        conditions: of a crop, the clean one among them.
        rows: of the catalogue, with width and height in pixels; None before it is made.
        images: how many photographs there are, where `rows` is not known.
    """
    dials = config.oodface
    shard = dials.faces_per_shard * dials.longest_side**2 * 3
    if rows is not None:
        images = rows.num_rows
        shard = pipeline.largest_shard(pipeline.tasks(rows, dials.faces_per_shard), dials.longest_side)
    elif images is not None:
        shard = min(images, dials.faces_per_shard) * dials.longest_side**2 * 3
    shards = None if images is None else math.ceil(images / dials.faces_per_shard)
    workers = dials.num_workers if shards is None else max(1, min(dials.num_workers, shards))
    # as many as the pipeline starts, of each worker its part
    ahead = pipeline.AHEAD if shards is None else min(pipeline.AHEAD, shards / workers)
    decoding = "1 task that decodes beside it" if ahead == 1 else f"{ahead:.2g} tasks that decode beside it"
    templates = _templates(config, what)
    faces = dials.faces_per_shard if images is None else min(images, dials.faces_per_shard)
    pixels = sum(one.height * one.width * 3 for one in templates)
    batch = min(faces, dials.batch_size)
    floats = min(shard, PIXELS_AT_ONCE * 3) * FLOAT
    memory = [
        ("process", WORKER, "Python, torch, networks"),
        ("photographs of a shard", shard, "8 bits a value"),
        (decoding, round(ahead * (DECODER + 2 * shard)), "a shard each"),
    ]
    on_gpu = []
    own = [("own networks", size, "weights; what they compute is not known")] if (size := _own(config, what)) else []
    working = [
        *own,
        ("photographs as numbers", floats, "in parts"),
        ("crops of a shard", 2 * faces * pixels * FLOAT, "clean, and under a condition"),
        ("a batch", HELD * batch * pixels * FLOAT, ""),
    ]
    if dials.gpus_per_worker:
        embedded = [("embedding", batch * EMBEDDING, "")] if what == "evaluate" else []
        on_gpu = [("CUDA, networks, detection", CONTEXT, "estimated, as all of it"), *working, *embedded]
    else:
        memory += working
    if what == "corrupt" and dials.corrupt.output == "parquet":
        memory.append(("encoded images of a shard", 2 * faces * conditions * pixels, "at most"))
    crops = _crops(config, what, conditions)
    exact = rows is not None
    return Demand(config, images, shards, workers, shard, exact, crops, tuple(memory), tuple(on_gpu))


def _crops(config: OodfaceConfig, what: str, conditions: int) -> str:
    if what != "evaluate":
        return f"{conditions} crops"
    dials = config.oodface.evaluate
    factors = [f"{conditions} versions", f"{len(dials.models)} models"]
    factors += [f"{1 + len(dials.defences)} without and behind defences"] if dials.defences else []
    count = conditions * len(dials.models) * (1 + len(dials.defences))
    return f"{count} crops ({' x '.join(factors)})"


def _templates(config: OodfaceConfig, what: str) -> Sequence[Template]:
    """What is cropped of a face."""
    dials = config.oodface
    if what == "evaluate":
        found: Iterable[Template] = (models.template_of(entry) for entry in dials.evaluate.models)
        return list({one.name: one for one in found}.values())
    return [TEMPLATES[dials.corrupt.template if what == "corrupt" else dials.ask.template]]


def _own(config: OodfaceConfig, what: str) -> int:
    """Bytes of the files that hold networks of the user's own."""
    dials = config.oodface
    entries = [one.path for one in dials.evaluate.models if not isinstance(one, str)] if what == "evaluate" else []
    paths = [Path(path) for path in (*entries, dials.detector.path) if path is not None]
    return sum(path.stat().st_size for path in paths if path.exists())


def _cluster(config: OodfaceConfig) -> bool:
    """Whether Ray runs elsewhere already, on machines that are not known here."""
    return bool(config.cluster.address or os.environ.get("RAY_ADDRESS"))
