"""The pair question: vision-language models say whether two photographs show one person (the paper's extension).

The paper names no prompts; ours is in the configuration. Both photographs of a pair are under the same condition, as
for the face models. An answer that is neither yes nor no, such as a refusal for the sake of privacy, is unanswered.
"""

import base64
import re
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from cluster import datasets
from cluster.errors import UserError
from jobs.oodface import robustness
from jobs.oodface.config import Ask, Oodface
from jobs.oodface.protocols import Pairs
from jobs.oodface.scenarios import SCENARIOS
from jobs.scoring import chat

Condition = tuple[str, int]
SUFFIX = "png"
KEPT = 500  # characters of an answer

SCHEMA = pa.schema(
    {
        "model": pa.string(),
        "scenario": pa.string(),
        "severity": pa.int8(),
        "image_a": pa.string(),
        "image_b": pa.string(),
        "same": pa.bool_(),
        "answer": pa.bool_(),  # null: unanswered
        "text": pa.string(),
    }
)


def clients(dials: Ask) -> dict[str, chat.Chat]:
    """A client for each endpoint, by the name of its model.

    Raises:
        UserError: no endpoint, two of one name, a token that is not set.
    """
    if not dials.endpoints:
        raise UserError(
            "oodface.ask.endpoints is empty; name an OpenAI-style endpoint, as "
            "--set 'oodface.ask.endpoints=[{base_url: http://127.0.0.1:8000/v1, model: NAME}]'"
        )
    found: dict[str, chat.Chat] = {}
    for one in dials.endpoints:
        if one.model in found:
            raise UserError(f"oodface.ask.endpoints names {one.model} twice; drop one")
        found[one.model] = chat.Chat(one, f"the model {one.model}")
    return found


def ask(
    folder: Path,
    configuration: dict[str, Any],
    images: Path,
    pairs: Pairs,
    conditions: Sequence[Condition],
    dials: Ask,
) -> datasets.Manifest:
    """Asks every model about every pair under every condition; answers that are there already are not asked again.

    Args:
        folder: of the answers, a shard for each model and condition.
        configuration: what decides the answers (`datasets.prepare`).
        images: holds SCENARIO/SEVERITY/IMAGE_ID.png.

    Raises: as `chat.Chat.each`, and UserError as `clients`.
    """
    done = datasets.prepare(folder, configuration)
    asked = [(name, client, *condition) for name, client in clients(dials).items() for condition in conditions]
    for index, (name, client, scenario, severity) in enumerate(asked):
        if index in done:
            continue
        places = [
            [images / scenario / str(severity) / f"{image_id}.{SUFFIX}" for image_id in both]
            for both in zip(pairs.image_a, pairs.image_b, strict=True)
        ]
        texts = client.each(places, partial(_asked, dials.question))
        table = _table(name, scenario, severity, pairs, texts)
        unanswered = table["answer"].null_count
        datasets.write_shard(folder, index, table, {"unanswered": unanswered})
        told = f", {unanswered} unanswered" if unanswered else ""
        print(f"{index + 1}/{len(asked)}  {name} {scenario} {severity}: {len(pairs)} pairs{told}", flush=True)
    return datasets.finish(folder, configuration, range(len(asked)))


def score(files: Sequence[Path], pairs: Pairs, conditions: Sequence[Condition], dials: Oodface) -> dict[str, Any]:
    """metrics by model (`robustness.decided`), and the number of pairs; `conditions` begin with the clean one."""
    categories = {name: one.category for name, one in SCENARIOS.items()}
    answers: dict[str, dict[Condition, np.ndarray]] = {}
    for file in files:
        table = pq.read_table(file, columns=["model", "scenario", "severity", "answer"])
        model, scenario, severity = (table[name][0].as_py() for name in ("model", "scenario", "severity"))
        given = table["answer"].cast(pa.int8()).fill_null(robustness.UNANSWERED)
        answers.setdefault(model, {})[scenario, severity] = given.to_numpy()
    content: dict[str, Any] = {"metrics": {}, "pairs": {}}
    for model, found in answers.items():
        given = np.stack([found[condition] for condition in conditions], axis=1)
        asked = robustness.Answered(pairs.same, pairs.fold, given, tuple(conditions[1:]))
        metrics = robustness.decided(asked, categories, dials.seed, dials.evaluate.resamples)
        content["metrics"][model] = {name: metric.to_json() for name, metric in metrics.items()}
        content["pairs"][model] = len(pairs)
    return content


def parsed(text: str) -> bool | None:
    """Yes or no: the first word, or what the last sentence says; None where it says neither, or both.

    What stands before </think> is not looked at.
    """
    answer = text.rpartition("</think>")[2].strip().lower()
    words = re.findall(r"[a-z]+", answer)
    if words[:1] not in (["yes"], ["no"]):
        words = re.findall(r"[a-z]+", re.split(r"(?<=[.!?\n])\s+", answer)[-1])
        words = [word for word in words if word in ("yes", "no")]
        if len(set(words)) != 1:
            return None
    return words[0] == "yes"


def _asked(question: str, ask: chat.Ask, places: Sequence[Path]) -> str:
    content = [{"type": "text", "text": question}, *(_picture(place) for place in places)]
    return ask([{"role": "user", "content": content}])


def _picture(place: Path) -> dict[str, Any]:
    encoded = base64.b64encode(place.read_bytes()).decode()
    return {"type": "image_url", "image_url": {"url": f"data:image/{SUFFIX};base64,{encoded}"}}


def _table(name: str, scenario: str, severity: int, pairs: Pairs, texts: Sequence[str]) -> pa.Table:
    count = len(pairs)
    columns = {
        "model": [name] * count,
        "scenario": [scenario] * count,
        "severity": [severity] * count,
        "image_a": list(pairs.image_a),
        "image_b": list(pairs.image_b),
        "same": pairs.same.tolist(),
        "answer": [parsed(text) for text in texts],
        "text": [text[:KEPT] for text in texts],
    }
    return pa.table(columns, schema=SCHEMA)
