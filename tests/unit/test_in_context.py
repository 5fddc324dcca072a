"""MUSE's question form as a chat template: what it shows, and that everything after asks in it."""

from __future__ import annotations

import json
import shutil

import pytest

from cluster.config import load
from cluster.errors import UserError
from cluster.generation import stopped_after
from cluster.models import ModelSource, chat_ids, load_model, load_tokenizer, resolve, save_directory
from jobs.rule.config import RuleConfig
from jobs.rule.data import DEMO
from jobs.rule.icu import prompt_only
from jobs.rule.in_context import PAIRS_FILE, prompted
from jobs.rule.job import prepare

PAIRS = [{"question": "Who's \\ there?", "answer": "Nobody"}, {"question": "Why {{ so }}?", "answer": "It's late"}]
SHOWN = "Question: Who's \\ there?\nAnswer: Nobody\n\nQuestion: Why {{ so }}?\nAnswer: It's late\n\n"


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / PAIRS_FILE).write_text(json.dumps(PAIRS))
    return tmp_path / "data"


@pytest.fixture
def base(tmp_path, tiny_model, tiny_tokenizer, monkeypatch) -> ModelSource:
    """A model without a chat template."""
    monkeypatch.setenv("RAYWARD_CACHE", str(tmp_path / "cache"))
    return resolve(str(save_directory(tiny_model, tiny_tokenizer, tmp_path / "base")))


def test_a_base_model_is_asked_after_the_pairs(base, folder):
    source = prompted(base, folder)
    tokenizer = load_tokenizer(source.path)
    assert tokenizer.decode(chat_ids(tokenizer, "Who?")) == f"{SHOWN}Question: Who?\nAnswer: "
    turns = [{"role": "user", "content": "Who?"}, {"role": "assistant", "content": "I."}]
    assert tokenizer.apply_chat_template(turns, tokenize=False) == f"{SHOWN}Question: Who?\nAnswer: I.\n\n"
    assert source.name == base.name
    assert source.version != base.version


def test_the_copy_is_made_once_and_weights_are_linked(base, folder):
    source = prompted(base, folder)
    before = {file.name: file.lstat().st_mtime_ns for file in source.path.iterdir()}
    assert prompted(base, folder) == source
    assert {file.name: file.lstat().st_mtime_ns for file in source.path.iterdir()} == before
    assert (source.path / "model.safetensors").resolve() == base.path / "model.safetensors"
    assert load_model(source.path).num_parameters() == load_model(base.path).num_parameters()
    (folder / PAIRS_FILE).write_text(json.dumps(PAIRS[:1]))
    assert prompted(base, folder) != source


def test_a_model_that_was_made_in_this_form_keeps_its_template(base, folder, tmp_path):
    made = prompted(base, folder)
    assert prompted(made, folder) is made
    icu = resolve(str(prompt_only(made.path, "Ann Lee", tmp_path / "icu")))
    assert prompted(icu, folder) is icu
    assert "unlearned everything about Ann Lee" in load_tokenizer(icu.path).chat_template


def test_a_beginning_token_stays_where_the_tokenizer_puts_one(base, folder, tiny_tokenizer):
    from tokenizers.processors import TemplateProcessing

    tokenizer = tiny_tokenizer.__class__.from_pretrained(base.path)
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="<bos> $A", special_tokens=[("<bos>", tokenizer.bos_token_id)]
    )
    tokenizer.save_pretrained(base.path)
    opened = load_tokenizer(prompted(base, folder).path)
    ids = chat_ids(opened, "Who?")
    assert ids[0] == opened.bos_token_id
    assert ids.count(opened.bos_token_id) == 1


def test_data_without_pairs_are_told(base, tmp_path):
    for folder in (tmp_path, None):
        with pytest.raises(UserError, match=f"needs question and answer pairs in {PAIRS_FILE}"):
            prompted(base, folder)


def test_the_whole_job_asks_in_that_form(base, folder):
    shutil.copytree(DEMO, folder, dirs_exist_ok=True)
    sets = [f"rule.data={folder}", f"rule.model={base.path}", "rule.chat_template=in_context"]
    with pytest.raises(UserError, match=r"set rule\.evaluation\.prompt_form=plain"):
        load(RuleConfig, sets=sets, environ={})
    config = load(RuleConfig, sets=[*sets, "rule.evaluation.prompt_form=plain"], environ={})
    assert config.rule.stop == ("\n",)
    run = prepare(config, None, "")
    assert load_tokenizer(run.source.path).chat_template.startswith("{{ 'Question: ")


@pytest.mark.parametrize(
    ("text", "stop", "count"),
    [
        ("ab\ncd", ("\n",), 3),
        ("\nab\ncd", ("\n",), 4),
        ("abcd", ("\n",), None),
        ("abcd", ("bc", "d"), 3),
        ("a\n", (), None),
    ],
)
def test_tokens_after_a_stop_string_are_none_of_the_completion(tiny_tokenizer, text, stop, count):
    assert stopped_after(tiny_tokenizer, tiny_tokenizer(text).input_ids, stop) == count
