"""From the embeddings of all conditions to the robustness of each model, behind each defence."""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
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


def score(files: Sequence[Path], pairs: Pairs, conditions: Sequence[Condition], dials: Oodface) -> dict[str, Any]:
    """metrics and thresholds by model, or MODEL+DEFENCE; the number of pairs, and what was left out."""
    categories = {name: one.category for name, one in SCENARIOS.items()}
    planned = [condition for condition in conditions if condition != CLEAN]
    content: dict[str, Any] = {"metrics": {}, "thresholds": {}, "pairs": {}, "pairs_left_out": {}}
    for name, by_condition in _scores(files, pairs, [NONE, *dials.evaluate.defences]):
        clean = by_condition.pop(CLEAN)
        scored = robustness.Scored(pairs.same, pairs.fold, clean, by_condition)
        found = robustness.evaluate(scored, planned, categories, dials.seed, dials.evaluate.resamples)
        content["metrics"][name] = {key: metric.to_json() for key, metric in found.metrics.items()}
        content["thresholds"][name] = found.thresholds
        content["pairs"][name], content["pairs_left_out"][name] = found.pairs, found.left_out
    return content


def _scores(
    files: Sequence[Path], pairs: Pairs, defences: Sequence[str]
) -> Iterator[tuple[str, dict[Condition, Scores]]]:
    """One model behind one defence at a time, so that the embeddings of one only are in memory."""
    names = sorted(
        {name for file in files for name in pq.read_table(file, columns=["model"])["model"].unique().to_pylist()}
    )
    if not names:
        raise UserError("not one image could be read when its turn came; check oodface.images and run it with --fresh")
    for model in names:
        for defence in defences:
            collected: dict[Condition, tuple[list[str], list[np.ndarray]]] = {}
            for file in files:
                table = pq.read_table(file, filters=[("model", "=", model), ("defence", "=", defence)])
                for condition, image_ids, embeddings in _by_condition(table):
                    ids, parts = collected.setdefault(condition, ([], []))
                    ids += image_ids
                    parts.append(embeddings)
            scores = {
                condition: pair_scores(pairs, ids, np.concatenate(parts))
                for condition, (ids, parts) in collected.items()
            }
            yield model if defence == NONE else f"{model}+{defence}", scores


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
