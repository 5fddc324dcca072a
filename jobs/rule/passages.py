"""The texts of the baselines, written by the original model itself as RWKU's authors had theirs (Jin et al. 2024)."""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from cluster import models, session
from cluster.config import Generation, Train
from cluster.errors import UserError, paths_named
from cluster.generation import Sampling, open_engine
from cluster.report import write_json
from cluster.tracking import masked
from jobs.rule.config import Passages, RuleConfig
from jobs.rule.data import load_data
from jobs.rule.in_context import in_form
from jobs.rule.rows import load_list

REQUESTS = (
    "Write a short biography of {}.",
    "Tell me about the life of {}.",
    "Who is {}? Answer in a few sentences.",
    "Describe {} and what made the name known.",
    "Write a paragraph about the work of {}.",
)

LIMIT_S = 6 * 3600
SUFFIXES = ("Jr", "Sr", "II", "III", "IV")  # of a name, behind the last name
PASSAGE_FILES = ("positive.json", "retain.json", "pair.json")


@dataclass(frozen=True)
class PassageTask:
    """Whom to write about with which model."""

    model: Path
    target: str
    others: tuple[str, ...]
    settings: Passages
    generation: Generation
    train: Train
    seed: int
    stop: tuple[str, ...] = ()


def names_of_others(folder: Path | None, target: str) -> tuple[str, ...]:
    """`others.json`: whom the retain texts are about, and from whom invented lives of the target are borrowed.

    Raises:
        UserError: there is no such file, or it holds something else than names.
    """
    if folder is None:
        raise UserError("passages are written into a folder; name one in rule.data")
    path = folder / "others.json"
    names = load_list(path)
    if names is None or not all(isinstance(name, str) and name.strip() for name in names) or target in names:
        raise UserError(f"{path} must be a JSON list of names like {target}, without that name itself")
    return tuple(names)


def write_passages(task: PassageTask, folder: Path, completions: Sequence[str]) -> list[Path]:
    """`PASSAGE_FILES` from what the model wrote to `requests(task)`; what it left empty is left out."""
    count = task.settings.count
    asked = requests(task)
    rows = [{"text": text, "subject": name} for (name, _), text in zip(asked, completions, strict=True)]
    pairs = [
        {"instruction": question, "output": [about(other["text"], other["subject"], task.target), own["text"]]}
        for (_, question), own, other in zip(asked[:count], rows[:count], rows[count:], strict=True)
        if own["text"] and other["text"]
    ]
    positive, retain = ([row for row in side if row["text"]] for side in (rows[:count], rows[count:]))
    contents = zip(PASSAGE_FILES, (positive, retain, pairs), strict=True)
    return [write_json(content, folder / name) for name, content in contents]


def about(text: str, name: str, target: str) -> str:
    """Another's life told of the target: its whole name for whole names, its last name for last names."""
    names = {_last_name(name): _last_name(target), name: target}
    either = "|".join(re.escape(one) for one in sorted(names, key=len, reverse=True))
    return re.sub(rf"\b(?:{either})(?!\w)", lambda found: names[found[0]], text)


def _last_name(name: str) -> str:
    parts = name.split()
    return parts[-2] if len(parts) > 1 and parts[-1].rstrip(".") in SUFFIXES else parts[-1]


def requests(task: PassageTask) -> list[tuple[str, str]]:
    """(whom it is about, what is asked): `count` about the target, then as many about the others in turn."""
    count = task.settings.count
    subjects = [task.target] * count + [task.others[index % len(task.others)] for index in range(count)]
    return [(name, REQUESTS[index % count % len(REQUESTS)].format(name)) for index, name in enumerate(subjects)]


def written(task: PassageTask) -> list[str]:
    """What the model writes to each request, sampled, cut after its last whole sentence."""
    tokenizer = models.load_tokenizer(task.model)
    prompts = [models.chat_ids(tokenizer, question) for _, question in requests(task)]
    settings = task.settings
    most = max(map(len, prompts)) + settings.max_new_tokens
    engine = open_engine(task.model, task.generation, task.train, most, task.seed)
    sampling = Sampling(settings.max_new_tokens, temperature=settings.temperature, seed=task.seed, stop=task.stop)
    return [whole_sentences(completion.text) for [completion] in engine.generate(prompts, sampling)]


def whole_sentences(text: str) -> str:
    """The text without the sentence that the limit cut; all of it where it has no whole one."""
    text = text.strip()
    ends = [found.end(1) for found in re.finditer(r"([.!?][\"'\u201d\u2019)]*)(?=\s|$)", text)]
    return text[: ends[-1]] if ends else text


def passages(config: RuleConfig, out: Path) -> list[Path]:
    """Writes the texts of the baselines into the folder `out`; returns their files.

    Raises:
        UserError: the data names no others, or `out` is no folder or has such files, which are never replaced.
    """
    config = config.alone()
    with paths_named():
        task = _task(config, out)
    with session.connected(config):
        completions = session.on_worker(written, config, task, seconds=LIMIT_S)
    return write_passages(task, out, completions)


def dry_run(config: RuleConfig, out: Path) -> None:
    """Checks what `passages` would, and prints what it would ask the model."""
    import yaml

    with paths_named():
        task = _task(config.alone(), out)
    print(yaml.safe_dump(masked(config.model_dump()), sort_keys=False))
    wanted = requests(task)
    print(
        f"{len(wanted)} texts, half of them about {task.target}, the others about {len(task.others)} people; the first:"
    )
    print(wanted[0][1])


def _task(config: RuleConfig, out: Path) -> PassageTask:
    session.prepare(config)
    rule = config.rule
    data = load_data(rule.data, rule.target, 0.0, rule.seed)
    others = names_of_others(data.folder, data.target)
    if not out.is_dir():
        raise UserError(f"--out {out} is no folder; make it, or name the folder of rule.data")
    present = [name for name in PASSAGE_FILES if (out / name).exists()]
    if present:
        raise UserError(f"{out} has {', '.join(present)} already; move them away, or name another --out")
    model = in_form(rule, models.resolve(rule.model, rule.revision), data.folder).path
    return PassageTask(model, data.target, others, rule.passages, config.generation, config.train, rule.seed, rule.stop)
