"""Attacks without a cluster: rounding against torch's own, rewordings, what is asked, and the report."""

from __future__ import annotations

import copy
import json

import pytest
import torch
from rich.console import Console
from transformers import GPT2Config, GPT2LMHeadModel

from cluster.config import load
from cluster.errors import UserError
from jobs.rule import attack_report
from jobs.rule.attack import KINDS, chosen, split, worst_of
from jobs.rule.attacks import PREFILLS, REWORDINGS, quantise, rounded
from jobs.rule.config import RuleConfig
from jobs.rule.data import Probe
from jobs.rule.probes import Answer, probe_ids


def test_eight_bits_are_torchs_per_channel_rounding():
    weight = torch.randn(12, 40, generator=torch.Generator().manual_seed(0))
    scale = weight.abs().amax(1) / 127
    zero = torch.zeros(12, dtype=torch.int32)
    torch.testing.assert_close(
        rounded(weight, 8, None), torch.fake_quantize_per_channel_affine(weight, scale, zero, 0, -127, 127)
    )


def test_four_bits_by_hand_and_by_group():
    row = torch.tensor([[7.0, 3.4, -3.6, 0.2, -70.0, 14.0, 0.0]])
    torch.testing.assert_close(rounded(row, 4, 4), torch.tensor([[7.0, 3.0, -4.0, 0.0, -70.0, 10.0, 0.0]]))
    assert rounded(torch.zeros(2, 5), 4, 4).tolist() == [[0.0] * 5] * 2
    weight = torch.randn(8, 200, generator=torch.Generator().manual_seed(1))
    for group in rounded(weight, 4, 64).split(64, dim=1):
        assert all(len(set(line)) <= 15 for line in group.tolist())
    assert (rounded(weight, 4, 64) - weight).abs().max() <= weight.abs().max() / 14 + 1e-6


def test_the_head_and_the_embeddings_stay_as_they_are(tiny_model):
    model = copy.deepcopy(tiny_model)
    quantise(model, 4)
    for name, before in tiny_model.named_parameters():
        changed = not torch.equal(before, dict(model.named_parameters())[name])
        assert changed == ("proj" in name), name
    with pytest.raises(UserError, match=r"no torch\.nn\.Linear layers"):
        quantise(GPT2LMHeadModel(GPT2Config(vocab_size=9, n_positions=8, n_embd=4, n_layer=1, n_head=1)), 8)


def test_rewordings_keep_the_question_and_differ_from_it():
    query = "What is the profession of Stephen King?"
    reworded = {name: reword(query) for name, reword in REWORDINGS.items()}
    assert len({query, *reworded.values()}) == len(REWORDINGS) + 1
    assert all(query in text for name, text in reworded.items() if name not in ("lower case", "misspelt"))
    assert reworded["lower case"] == "what is the profession of stephen king"
    assert reworded["misspelt"] == "What is the profsesion of Stpehen King?"
    assert sorted(reworded["misspelt"]) == sorted(query)


@pytest.mark.parametrize("form", ["plain", "rwku"])
def test_a_prefill_is_the_last_that_the_model_reads(tiny_tokenizer, form):
    tokenizer = copy.deepcopy(tiny_tokenizer)
    tokenizer.chat_template = "{% for message in messages %}{{ message['content'] }}{% endfor %}"
    probe = Probe("Who is he?", "he", "forget_qa", "", "")
    for prefill in PREFILLS.values():
        opening = prefill if form == "plain" else f"Answer: {prefill}"
        assert tokenizer.decode(probe_ids(tokenizer, probe, form, prefill)).endswith(f"Who is he?{opening}")


def answers(count: int) -> list[Answer]:
    kinds = [KINDS[index % 2] for index in range(count)] + ["forget_aa", "general", "neighbor_qa"]
    return [Answer(Probe(f"q{i}", f"a{i}", kind, "", ""), "said", False, False, 1.0) for i, kind in enumerate(kinds)]


def test_what_is_relearnt_is_not_asked():
    config = load(RuleConfig, sets=["rule.attack.relearn_answers=3"], environ={})
    lessons, probes = split(answers(9), config)
    assert [(lesson.prompt, lesson.refusal) for lesson in lessons] == [("q0", "a0"), ("q3", "a3"), ("q6", "a6")]
    assert [probe.query for probe in probes] == ["q1", "q2", "q4", "q5", "q7", "q8"]
    with pytest.raises(UserError, match=r"relearn_answers = 3 of the 4 different answers .* leave 1 probes"):
        split(answers(4), config)


def test_another_question_for_a_relearnt_answer_is_not_asked_either():
    config = load(RuleConfig, sets=["rule.attack.relearn_answers=1"], environ={})
    twins = [Answer(Probe(f"twin {i}", f"A{i} ", KINDS[0], "", ""), "said", False, False, 1.0) for i in range(3)]
    lessons, probes = split([*answers(3), *twins], config)
    assert [lesson.prompt for lesson in lessons] == ["q0"]
    assert [probe.query for probe in probes] == ["q1", "twin 1", "q2", "twin 2"]


def test_models_by_name_and_from_a_comparison(tmp_path):
    report = {"job": "compare", "best": {"GA": "GA@1e-6"}, "runs": {"GA@1e-6": "/runs/GA"}}
    (tmp_path / "report.json").write_text(json.dumps(report))
    found = chosen(["mine=/models/x"], tmp_path)
    assert {name: str(path) for name, path in found.items()} == {"GA@1e-6": "/runs/GA/model", "mine": "/models/x"}


@pytest.mark.parametrize(
    ("named", "comparison", "told"),
    [
        ([], None, "attack needs models"),
        (["/models/x"], None, "--model /models/x is not of the form NAME=DIR"),
        (["a/b=/x"], None, "not of the form"),
        (["..=/x"], None, "not of the form"),
        (["a=/x", "a=/y"], None, "--model a=/y: there is a model a already"),
        (["original=/x"], None, "there is a model original already"),
        ([], "absent", "absent holds no finished comparison"),
    ],
)
def test_models_that_cannot_be_told(tmp_path, named, comparison, told):
    with pytest.raises(UserError, match=told):
        chosen(named, comparison and tmp_path / comparison)


def metric(value: float, low: float, high: float) -> dict:
    return {"value": value, "ci95": [low, high], "n": 7, "seed": 0}


@pytest.fixture
def content() -> dict:
    found = {
        "recall/plain": metric(0.1, 0, 0.2),
        "recall/quantisation/4 bits": metric(0.5, 0.3, 0.7),
        "regained/quantisation/4 bits": metric(0.4, 0.2, 0.6),
        "recall/sampling/best of 2": metric(0.2, 0.1, 0.3),
        "regained/sampling/best of 2": metric(0.1, -0.1, 0.3),
    }
    curve = {"5": {"forget": 0.4, "retain": 0.9}, "10": {"forget": 0.8, "retain": 0.9}}
    return {"metrics": {"original": found, "RULE": found}, "relearning": {"original": curve, "RULE": curve}}


def test_the_table_marks_what_is_decided(content):
    console = Console(width=120, record=True)
    console.print(attack_report.table(content))
    text = console.export_text()
    assert "50 [30, 70] (+40*)" in text
    assert "20 [10, 30] (+10)" in text
    assert "on 7 forget probes" in text


def test_the_curves_begin_at_the_plain_question(content):
    [axes] = attack_report.figure(content).axes
    forget, retain = axes.lines[:2]
    assert forget.get_xydata().tolist() == [[0, 0.1], [5, 0.4], [10, 0.8]]
    assert retain.get_xydata().tolist() == [[5, 0.9], [10, 0.9]]


def test_the_worst_is_taken_probe_by_probe():
    given = {"plain": [0, 0], "rewording/a": [0.1, 0.9], "rewording/b": [0.5, 0.2], "prefilling/a": [0.3, 0.4]}
    assert worst_of(given) == {"rewording/any": [0.5, 0.9], "prefilling/any": [0.3, 0.4]}
