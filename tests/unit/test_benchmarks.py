"""What would end an evaluation after its questions is found before them."""

from __future__ import annotations

import copy
import json

import pytest

from cluster.errors import UserError
from cluster.models import save_directory
from jobs.rule.benchmarks import check_benchmarks, load_benchmarks


@pytest.fixture
def model(tiny_model, tiny_tokenizer, tmp_path):
    """The directory of a model with the context that `shorten` gives it, 1,024 tokens before."""
    folder = tmp_path / "model"
    tokenizer = copy.deepcopy(tiny_tokenizer)
    tokenizer.chat_template = "{{ messages[0]['content'] }}"
    save_directory(tiny_model, tokenizer, folder)

    def shorten(context: int) -> None:
        path = folder / "config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | {"max_position_embeddings": context}))

    return folder, shorten


def test_answers_that_fill_the_context_are_told(model, tmp_path):
    folder, shorten = model
    row = {"task": "t", "question": "q", "answer": "a", "cot": "c\n\nQ: one\n\nQ: two\n\nQ: three"}
    (tmp_path / "retain_bbh.json").write_text(json.dumps([row]))
    data = load_benchmarks(tmp_path)
    check_benchmarks(data, folder, tmp_path)
    shorten(512)
    with pytest.raises(UserError, match=r"bbh\.json cannot be asked: its answers of 512 tokens .*longer context"):
        check_benchmarks(data, folder, tmp_path)


def test_a_passage_of_one_token_is_named(model, tmp_path):
    folder, _ = model
    for split, texts in (("forget", ["long enough", "x"]), ("holdout", ["fine"])):
        (tmp_path / f"privleak_{split}.json").write_text(json.dumps(texts))
    with pytest.raises(UserError, match=r"privleak_forget\.json: passage 1 \('x'\) is one token"):
        check_benchmarks(load_benchmarks(tmp_path), folder, tmp_path)
