"""The pair question: vision-language models say whether two photographs show one person (the paper's extension).

The paper names no prompts; ours is in the configuration. Both photographs of a pair are under the same condition, as
for the face models. An answer that is neither yes nor no, such as a refusal for the sake of privacy, is unanswered.
"""

import base64
import re
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from cluster import datasets
from cluster.errors import JobFailure, UserError
from cluster.report import digest
from jobs.oodface import robustness
from jobs.oodface.config import Ask, Oodface
from jobs.oodface.protocols import Pairs
from jobs.oodface.scenarios import SCENARIOS
from jobs.scoring import chat

Condition = tuple[str, int]
SUFFIX = "png"
KEPT = 2000  # characters of an answer, of its end
A_SHARD = 100  # pairs that are asked between two looks at the disk, and asked again where a run is stopped among them
ATTEMPTS = 3
_OPENING = re.compile(
    r"\W*(?:answer\W+)?(yes|no)"
    r"(?:\W*(?:[.,;:!)\n\u2013\u2014]|\s-\s|$)|\s+(?:they|these|those|it|both|the|this|that)\b)"
)
_TELLING = r"(?:identify|recogni[sz]e|compare|determine|tell|say|verify|confirm)"
_REFUSAL = re.compile(
    r"\W*(?:(?:sorry|but|unfortunately|however|as an?\s(?:[\w-]+\s){0,3}?(?:ai|model|assistant))\W+)*(?:i(?:"
    r"(?:\W?m| am)?\s+(?:sorry|afraid|unable|not able)|\s+(?:can\W?t|cannot|can not|won\W?t|will not|do not)\s+"
    rf"(?:\w+\s+)?(?:{_TELLING}|help|assist|do|answer))|"
    rf"(?:it|this|that)(?:(?:\W?s| is)\s+(?:impossible|not possible)\s+(?:for me )?to\s+(?:\w+ly\s+)?{_TELLING}|"
    r"\s+(?:can\W?t|cannot|can not) be (?:determined|told|verified|confirmed)))\b"
)
_ENDING = re.compile(r"(?:\b(?:answer|conclusion|verdict)(?:\s+is)?|:)\W+(yes|no)\W*$")

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
            raise UserError(f"oodface.ask.endpoints names {one.model} twice; ask them in two runs")
        found[one.model] = chat.Chat(one, f"the model {one.model}")
    return found


def ask(
    places: Mapping[str, Path],
    images: Path,
    digest_of_images: str,
    pairs: Pairs,
    conditions: Sequence[Condition],
    dials: Ask,
) -> dict[str, list[Path]]:
    """Asks every model about every pair under every condition; answers that are there already are not asked again.

    Args:
        places: of the answers, a data set a model (`folders`).
        images: holds SCENARIO/SEVERITY/IMAGE_ID.png.
        digest_of_images: what these are; others want other answers.

    Returns: the answers' shards by model, condition after condition and in each the pairs in order.
    Raises: as `chat.Chat.each`, and UserError as `clients`.
    """
    found = {}
    for (name, client), endpoint in zip(clients(dials).items(), dials.endpoints, strict=True):
        place = places[name]
        configuration = {
            "model": name,
            "images": digest_of_images,
            "pairs": digest([pairs.image_a, pairs.image_b]),
            "conditions": [list(one) for one in conditions],
        }
        place.mkdir(parents=True, exist_ok=True)
        done = datasets.prepare(place, configuration)
        parts = [
            (scenario, severity, start) for scenario, severity in conditions for start in range(0, len(pairs), A_SHARD)
        ]
        print(f"{name}: {len(done)} of {len(parts)} parts answered; photographs go to {endpoint.base_url}", flush=True)
        for index, (scenario, severity, start) in enumerate(parts):
            if index in done:
                continue
            part = _part(pairs, start)
            shown = [
                [images / scenario / str(severity) / f"{image_id}.{SUFFIX}" for image_id in both]
                for both in zip(part.image_a, part.image_b, strict=True)
            ]
            table = _table(name, scenario, severity, part, client.each(shown, partial(_asked, dials.question, name)))
            unanswered = table["answer"].null_count
            datasets.write_shard(place, index, table, {"unanswered": unanswered})
            told = f", {unanswered} unanswered" if unanswered else ""
            print(f"{index + 1}/{len(parts)}  {name} {scenario} {severity}: {len(part)} pairs{told}", flush=True)
        found[name] = datasets.finish(place, configuration, range(len(parts))).files(place)
    return found


def folders(folder: Path, dials: Ask) -> dict[str, Path]:
    """Where each model's answers are kept: they follow from model, endpoint, question and the longest answer."""
    return {
        one.model: folder / digest([one.model, one.base_url, one.max_tokens, dials.question]) for one in dials.endpoints
    }


def score(
    files: Mapping[str, Sequence[Path]], pairs: Pairs, conditions: Sequence[Condition], dials: Oodface
) -> dict[str, Any]:
    """metrics by model (`robustness.decided`), and the number of pairs; `conditions` begin with the clean one."""
    categories = {name: one.category for name, one in SCENARIOS.items()}
    content: dict[str, Any] = {"metrics": {}, "pairs": {}}
    for model, shards in files.items():
        table = pa.concat_tables(pq.read_table(file, columns=["answer"]) for file in shards)
        given = table["answer"].cast(pa.int8()).fill_null(robustness.UNANSWERED).to_numpy()
        answers = given.reshape(len(conditions), len(pairs)).T
        asked = robustness.Answered(pairs.same, pairs.fold, answers, tuple(conditions[1:]))
        metrics = robustness.decided(asked, categories, dials.seed, dials.evaluate.resamples)
        content["metrics"][model] = {name: metric.to_json() for name, metric in metrics.items()}
        content["pairs"][model] = len(pairs)
    return content


def parsed(text: str) -> bool | None:
    """Yes or no, None for neither.

    The answer opens with the word, set apart or about "they", or ends with it after "answer", "is" or a colon: "no" has
    other uses, as in "I have no way to tell". What stands before </think> is not looked at; a thought that was cut off
    has no answer.
    """
    answer = text.lower().rpartition("</think>")[2].strip()
    if "<think>" in answer:
        return None
    found = _OPENING.match(answer)
    if found and _REFUSAL.match(answer, found.end()):  # "No, I can't compare faces."
        return None
    found = found or _ENDING.search(answer)
    return found[1] == "yes" if found else None


def _asked(question: str, model: str, ask_model: chat.Ask, places: Sequence[Path]) -> str:
    content = [{"type": "text", "text": question}, *(_picture(place) for place in places)]
    for _ in range(ATTEMPTS):
        text = ask_model([{"role": "user", "content": content}])
        if text is not None:
            return text
    raise JobFailure(f"the endpoint of {model} answered {ATTEMPTS} times with no chat completion; check its base_url")


def _picture(place: Path) -> dict[str, Any]:
    encoded = base64.b64encode(place.read_bytes()).decode()
    return {"type": "image_url", "image_url": {"url": f"data:image/{SUFFIX};base64,{encoded}"}}


def _part(pairs: Pairs, start: int) -> Pairs:
    chosen = np.zeros(len(pairs), dtype=bool)
    chosen[start : start + A_SHARD] = True
    return pairs.take(chosen, 0)


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
        "text": [text[-KEPT:] for text in texts],
    }
    return pa.table(columns, schema=SCHEMA)
