"""From the embeddings of all conditions to the robustness of each model, behind each defence."""

import math
from collections.abc import Collection, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.compute as pc
import pyarrow.parquet as pq

from cluster.errors import UserError
from jobs.oodface import robustness
from jobs.oodface.config import Oodface
from jobs.oodface.metrics import Scores, pair_scores
from jobs.oodface.protocols import Pairs
from jobs.oodface.scenario import CLEAN
from jobs.oodface.scenarios import SCENARIOS
from jobs.oodface.work import NONE

Condition = tuple[str, int]
IN_MEMORY = 2 << 30  # bytes of one model's embeddings
FLOAT32 = 4  # bytes


def score(files: Sequence[Path], pairs: Pairs, conditions: Sequence[Condition], dials: Oodface) -> dict[str, Any]:
    """metrics and thresholds by model, or MODEL+DEFENCE; the number of pairs, and what was left out."""
    categories = {name: one.category for name, one in SCENARIOS.items()}
    planned = [condition for condition in conditions if condition != CLEAN]
    content: dict[str, Any] = {"metrics": {}, "thresholds": {}, "pairs": {}, "pairs_left_out": {}}
    for name, by_condition in _scores(files, pairs, [CLEAN, *planned], [NONE, *dials.evaluate.defences]):
        clean = by_condition.pop(CLEAN)
        scored = robustness.Scored(pairs.same, pairs.fold, clean, by_condition)
        found = robustness.evaluate(scored, planned, categories, dials.seed, dials.evaluate.resamples)
        content["metrics"][name] = {key: metric.to_json() for key, metric in found.metrics.items()}
        content["thresholds"][name] = found.thresholds
        content["pairs"][name], content["pairs_left_out"][name] = found.pairs, found.left_out
    return content


def _scores(
    files: Sequence[Path], pairs: Pairs, conditions: Sequence[Condition], defences: Sequence[str]
) -> Iterator[tuple[str, dict[Condition, Scores]]]:
    """Scores of each model behind each defence; of its embeddings about `IN_MEMORY` bytes are held at a time."""
    names = sorted(
        {name for file in files for name in pq.read_table(file, columns=["model"])["model"].unique().to_pylist()}
    )
    wanted = pairs.images()
    rows = sum(pq.read_metadata(file).num_rows for file in files)
    if not names:
        raise UserError("not one image could be read when its turn came; check oodface.images and run it with --fresh")
    for model in names:
        size = _size(files, model)
        for defence in defences:
            scores: dict[Condition, Scores] = {}
            # conditions are many and alike, so that few of them are read in one pass over the files, or all
            passes = max(1, math.ceil(rows / len(names) / len(defences) * size * FLOAT32 / IN_MEMORY))
            each = math.ceil(len(conditions) / passes)
            for start in range(0, len(conditions), each):  # neighbours, which share groups of rows in the files
                now = set(conditions[start : start + each])
                scores |= _of_conditions(files, pairs, wanted, model, defence, now)
            yield model if defence == NONE else f"{model}+{defence}", scores


def _size(files: Sequence[Path], model: str) -> int:
    """Numbers of one of the model's embeddings."""
    for file in files:
        for batch in pq.ParquetFile(file).iter_batches(1024, columns=["model", "embedding"]):
            if len(found := batch.filter(pc.equal(batch["model"], model))):
                return len(found["embedding"][0])
    raise AssertionError(model)


def _of_conditions(
    files: Sequence[Path], pairs: Pairs, wanted: Collection[str], model: str, defence: str, now: Collection[Condition]
) -> dict[Condition, Scores]:
    collected: dict[Condition, tuple[list[str], list[np.ndarray]]] = {}
    known = {name: name for name in wanted}  # one object an image, not one a row
    chosen = [("model", "=", model), ("defence", "=", defence)]
    chosen += [("scenario", "in", {scenario for scenario, _ in now}), ("severity", "in", {level for _, level in now})]
    for file in files:
        table = pq.read_table(file, columns=["image_id", "scenario", "severity", "embedding"], filters=chosen)
        for condition, image_ids, embeddings in _by_condition(table):
            if condition not in now:
                continue
            ids, parts = collected.setdefault(condition, ([], []))
            compared = [index for index, name in enumerate(image_ids) if name in known]
            ids += [known[image_ids[index]] for index in compared]
            parts.append(embeddings[compared])
    behind = "" if defence == NONE else f" behind {defence}"
    return {
        (name, level): pair_scores(
            pairs,
            ids,
            np.concatenate(parts),
            f"{model}{behind} under {name}" + (f" at severity {level}" if level else ""),
        )
        for (name, level), (ids, parts) in collected.items()
    }


def _by_condition(table: Any) -> Iterator[tuple[Condition, list[str], np.ndarray]]:
    """A shard's table holds the rows of a condition together; one whose images were all lost has none."""
    if not table.num_rows:
        return
    scenarios, severities = table["scenario"].to_numpy(), table["severity"].to_numpy()
    embeddings = table["embedding"].combine_chunks()
    flat = embeddings.flatten().to_numpy().reshape(len(embeddings), -1)
    image_ids = table["image_id"].to_pylist()
    changes = np.flatnonzero((scenarios[1:] != scenarios[:-1]) | (severities[1:] != severities[:-1])) + 1
    for part in np.split(np.arange(len(image_ids)), changes):
        first = part[0]
        span = slice(first, part[-1] + 1)
        yield (str(scenarios[first]), int(severities[first])), image_ids[span], flat[span]
