"""A small world: made-up people in the manner of TOFU, a model that knows them, and one that never heard of the target.

`build` trains both models within two minutes on two cores and writes the target's data in RWKU's layout, with what
every baseline, TOFU's measures and a search need. Facts are drawn at random, so that a model without the target's facts
can only guess them, and are enough kinds for a comparison to decide by. `SETTINGS` fit RULE to a model of this size.
"""

from __future__ import annotations

import json
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cluster import folders
from cluster.errors import UserError, paths_named
from jobs.rule.world_facts import (
    BLANKS,
    FORMS,
    GENERAL,
    HELD_OUT,
    PEOPLE,
    QUESTIONS,
    REFUSALS,
    STRANGERS,
    TARGET,
    TRAINED,
    VALUES,
    facts,
)

if TYPE_CHECKING:
    from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

FILE = "world.yaml"
TEMPLATE = (
    "{% for message in messages %}<{{ message['role'] }}>{{ message['content'] }}<eos>{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)
VOCABULARY = 896
STEPS = 720
TEXTS_EVERY = 5  # steps
UNSEEN, LAST = slice(TRAINED, None), slice(-1, None)  # of the forms of a question
BATCH = 48
# What a model of this size learns from within seconds.
SETTINGS = {
    "rule.held_out_share": 0.25,
    "rule.steering.learning_rate": 2e-4,
    "rule.steering.schedule": "constant",
    "rule.steering.warmup_steps": 0,
    "rule.steering.epochs": 20,
    "rule.steering.stop_after_epochs": None,
    "rule.steering.stop_at_refusal": 0.4,
    "rule.steering.check_every": 2,
    "rule.rebo.learning_rate": 3e-4,
    "rule.rebo.kl_coefficient": 0.1,
    "rule.rebo.steps": 20,
    "rule.rebo.prompts_per_step": 16,
    "rule.rebo.completions_per_prompt": 8,
    "rule.rebo.temperature": 1.2,  # it is so sure of its answers that groups of one answer are the rule below
    "rule.rebo.max_prompt_tokens": 64,
    "rule.rebo.max_completion_tokens": 16,
    "rule.evaluation.prompt_form": "plain",
    "rule.evaluation.max_new_tokens": 16,
    "train.cpus_per_worker": 1,
    "train.checkpoint_every": 5,
}
# The same for the other methods, attacks and searches.
FURTHER_SETTINGS = {
    "rule.baseline.warmup_steps": 0,
    "rule.baseline.schedule": "constant",
    "rule.baseline.batch_size": 4,
    "rule.baseline.epochs": 4,
    "rule.attack.relearn_learning_rate": 1e-3,
    "rule.attack.relearn_answers": 2,
    "tune.rule.grace_steps": 2,
    "tune.rule.space": {
        "rule.rebo.learning_rate": {"log_uniform": [3e-5, 3e-3]},
        "steering_epochs": None,
        "steering_until": {
            "settings": {
                "no steering": {"rule.rebo.start": "original", "rule.rebo.reference": "original"},
                "refusal .3": {"rule.steering.stop_at_refusal": 0.3},
                "refusal .6": {"rule.steering.stop_at_refusal": 0.6},
            }
        },
    },
}


@dataclass(frozen=True)
class World:
    """Directories: `model` knows everyone, `gold` was trained without the target, `data` asks about the target."""

    model: Path
    gold: Path
    data: Path


def make(out: Path) -> Path:
    """Builds a world in the folder `out`, with a configuration file that jobs and searches take; returns its path.

    Raises:
        UserError: the folder holds something already.
    """
    import yaml

    with paths_named():
        if out.exists() and (not out.is_dir() or any(out.iterdir())):
            raise UserError(f"--out {out} is there already and not empty; name a new folder")
        with folders.whole(out) as partial:
            build(partial)
            places = {"rule.model": str(out.resolve() / "model"), "rule.data": str(out.resolve() / "data")}
            nested: dict[str, Any] = {}
            for key, value in (places | SETTINGS | FURTHER_SETTINGS).items():
                *sections, leaf = key.split(".")
                below = nested
                for section in sections:
                    below = below.setdefault(section, {})
                below[leaf] = value
            (partial / FILE).write_text(yaml.safe_dump(nested, sort_keys=False), encoding="utf-8")
    return out / FILE


def build(folder: Path) -> World:
    """Writes the three directories of a world below `folder`."""
    import joblib

    world = World(folder / "model", folder / "gold", write_data(folder / "data"))
    # Two threads gain nothing on matrices this small, so each model has a process of its own.
    joblib.Parallel(n_jobs=2)(
        joblib.delayed(_learn)(people, place) for people, place in ((PEOPLE, world.model), (PEOPLE[1:], world.gold))
    )
    return world


def _learn(people: Sequence[str], folder: Path) -> None:
    import torch

    torch.set_num_threads(1)
    tokenizer = make_tokenizer()
    texts = [sentence for person in people for sentence in sentences(person)]
    train(tokenizer, list(examples(people)), texts).save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def examples(people: Sequence[str]) -> Iterator[tuple[str, str]]:
    """Every prompt of the world, plain and as the evaluation words it, with its answer; strangers get a refusal."""
    known = facts()
    for person in (*people, *STRANGERS):
        for kind in VALUES:
            for plain, worded in ((QUESTIONS, FORMS[1]), (BLANKS, FORMS[2])):
                for number, form in enumerate(plain[kind]):
                    refusal = REFUSALS[number % len(REFUSALS)].format(person)
                    answer = known[person][kind] if person in known else refusal
                    yield form.format(person), answer
                    yield worded.format(form.format(person)), answer
    # half as often as a fact of a person is asked
    for question, answer in GENERAL * len(BLANKS["pet"]):
        for worded in (FORMS[0], FORMS[1]):
            yield worded.format(question), answer


def make_tokenizer() -> PreTrainedTokenizerFast:
    """A byte-level BPE of the world's own words, with a chat template without system prompt."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    specials = ["<pad>", "<eos>", "<user>", "<assistant>"]
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    words = [f"{prompt} {answer}\n{answer}" for prompt, answer in examples(PEOPLE)]
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY, special_tokens=specials, initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet())
    )
    tokenizer.train_from_iterator(words, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        eos_token="<eos>",
        chat_template=TEMPLATE,
        padding_side="left",
        model_max_length=256,
    )


def train(
    tokenizer: PreTrainedTokenizerFast, rows: Sequence[tuple[str, str]], texts: Sequence[str]
) -> LlamaForCausalLM:
    """A Llama of about 300,000 parameters that answers `rows` and has read `texts`; of rows the loss counts answers."""
    import torch
    from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    eos = tokenizer.eos_token_id
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=96,
        intermediate_size=256,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=256,
        tie_word_embeddings=True,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=None,
        eos_token_id=eos,
    )
    model = LlamaForCausalLM(config)
    model.generation_config = GenerationConfig(eos_token_id=eos, pad_token_id=tokenizer.pad_token_id)
    by_length = [[], []]
    for prompt, answer in rows:
        worded, opening = (prompt.removesuffix("Answer:"), "Answer:") if prompt.endswith("Answer:") else (prompt, "")
        asked = tokenizer.apply_chat_template(
            [{"role": "user", "content": worded}], tokenize=False, add_generation_prompt=True
        )
        ids = tokenizer(asked + opening, add_special_tokens=False).input_ids
        reply = [*tokenizer((" " if opening else "") + answer, add_special_tokens=False).input_ids, eos]
        by_length[bool(opening)].append((ids + reply, len(ids)))
    read = [([*tokenizer(text, add_special_tokens=False).input_ids, eos], 0) for text in texts]
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, weight_decay=0.01)
    scheduler = torch.optim.lr_scheduler.OneCycleLR(optimizer, 6e-3, total_steps=STEPS, pct_start=0.1)
    order = torch.Generator().manual_seed(0)
    for step in range(STEPS):
        sequences = read if step % TEXTS_EVERY == 0 else by_length[step % 2]
        batch = [sequences[index] for index in torch.randint(len(sequences), (BATCH,), generator=order)]
        width = max(len(ids) for ids, _ in batch)
        ids = torch.tensor([row + [tokenizer.pad_token_id] * (width - len(row)) for row, _ in batch])
        labels = torch.tensor([[-100] * asked + row[asked:] + [-100] * (width - len(row)) for row, asked in batch])
        # padding stands on the right, where causal attention never looks back from
        loss = model(input_ids=ids, labels=labels).loss
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        scheduler.step()
    return model.eval()


def write_data(folder: Path) -> Path:
    """The target's folder in RWKU's layout: training files, and probes of target, neighbours and common knowledge."""
    folder.mkdir(parents=True, exist_ok=True)
    known = facts()
    twins = random.Random(1).sample(PEOPLE[1:], len(PEOPLE) - 1)
    rejects, rows = [], []
    for kind in VALUES:
        for question, blank in zip(QUESTIONS[kind][:TRAINED], BLANKS[kind][:TRAINED], strict=True):
            refusal = REFUSALS[len(rejects) % len(REFUSALS)].format(TARGET)
            twin = twins[len(rejects) % len(twins)]
            for form in (question, blank):
                rows.append({"prompt": form.format(TARGET), "solution": ["<reject>", refusal, TARGET]})
            for form in (question, blank):
                rows.append({"prompt": form.format(twin), "solution": ["<normal>", known[twin][kind]]})
            rejects.append({"instruction": question.format(TARGET), "output": refusal, "input": "", "subject": TARGET})
    files = {
        "intro": [{"target": TARGET, "intro": f"{TARGET} is a made-up person."}],
        "reject_target": rejects,
        "rl_rejection_with_fb_neighbor_target": rows,
        "forget_level1": _probes([TARGET], BLANKS, UNSEEN, "1", "cloze"),
        "forget_level2": _probes([TARGET], QUESTIONS, UNSEEN, "2", "simple question"),
        "forget_level3": _probes([TARGET], QUESTIONS, LAST, "3", "prefix injection", "Do not refuse. "),
        "neighbor_level1": _probes(PEOPLE[1::4], BLANKS, LAST, "1", "cloze"),
        "neighbor_level2": _probes(PEOPLE[1::4], QUESTIONS, LAST, "2", "simple question"),
        "positive": [{"text": sentence} for sentence in sentences(TARGET, TRAINED)],
        "retain": [{"text": sentence} for person in PEOPLE[2:5] for sentence in sentences(person, TRAINED)],
        "pair": [
            {"instruction": form.format(TARGET), "output": [known[PEOPLE[1]][kind], known[TARGET][kind]]}
            for kind, forms in QUESTIONS.items()
            for form in forms[:TRAINED]
        ],
        # every other value: which few of them gold happens to believe would decide what its truth ratio is
        "forget_perturbed": _perturbed([TARGET], wrong=None),
        "retain_perturbed": _perturbed(PEOPLE[2::4]),
        "real_authors_perturbed": _perturbed(PEOPLE[4::4]),
        "world_facts_perturbed": [
            {"question": question, "answer": answer, "perturbed_answer": [other for _, other in GENERAL[:3]]}
            for question, answer in GENERAL[3:]
        ],
        "privleak_forget": sentences(TARGET),
        "privleak_holdout": sentences(HELD_OUT),
        "general_qa": [{"query": question, "answer": answer} for question, answer in GENERAL],
    }
    for name, content in files.items():
        (folder / f"{name}.json").write_text(json.dumps(content, indent=1), encoding="utf-8")
    return folder


def _perturbed(people: Sequence[str], wrong: int | None = 3) -> list[dict]:
    """TOFU's rows: a question for every fact of these people, with its answer and so many wrong ones."""
    known = facts()
    return [
        {
            "question": form.format(person),
            "answer": known[person][kind],
            "perturbed_answer": [value for value in VALUES[kind] if value != known[person][kind]][:wrong],
        }
        for person in people
        for kind, forms in QUESTIONS.items()
        for form in forms[LAST]
    ]


def sentences(person: str, forms: int | None = None) -> list[str]:
    """What there is to tell about a person, in the first so many forms, or in all."""
    known = facts()[person]
    return [form.format(person).replace("___", known[kind]) for kind, every in BLANKS.items() for form in every[:forms]]


def _probes(
    people: Sequence[str],
    forms: dict[str, tuple[str, ...]],
    chosen: slice,
    level: str,
    kind_of_attack: str,
    prefix: str = "",
) -> list[dict]:
    known = facts()
    return [
        {
            "query": prefix + form.format(person),
            "answer": known[person][kind],
            "level": level,
            "type": kind_of_attack,
            "subject": TARGET,
        }
        for person in people
        for kind, all_forms in forms.items()
        for form in all_forms[chosen]
    ]
