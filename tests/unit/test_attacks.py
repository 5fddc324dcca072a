"""Attacks without a cluster: rounding against torch's own, rewordings, what is asked, and the report."""

from __future__ import annotations

import copy
import re
from contextlib import nullcontext
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel

from cluster import session, training
from cluster.config import Generation, Train, load
from cluster.errors import Diverged, JobFailure, UserError
from cluster.generation import Completion
from cluster.models import save_directory
from cluster.report import read_json, read_lines
from jobs.rule import attack as attacking
from jobs.rule import attacks, job
from jobs.rule.attack import KINDS, check_room, split
from jobs.rule.attacks import (
    PREFILLS,
    REWORDINGS,
    AttackTask,
    answers_file,
    attacked,
    longest,
    quantise,
    recalls,
    rounded,
    ways,
)
from jobs.rule.config import Attack, Evaluation, RuleConfig
from jobs.rule.data import Probe
from jobs.rule.evaluate import Examined
from jobs.rule.probes import Answer, leaked, probe_ids


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


def test_layers_of_gpt2_are_rounded_by_output_channel():
    model = GPT2LMHeadModel(GPT2Config(vocab_size=9, n_positions=8, n_embd=4, n_layer=1, n_head=1))
    before = {name: weight.clone() for name, weight in model.named_parameters()}
    quantise(model, 4)
    for name, weight in model.named_parameters():
        layer = name.startswith("transformer.h.") and name.endswith(".weight") and "ln" not in name
        torch.testing.assert_close(weight.data, rounded(before[name].T, 4, 64).T if layer else before[name])
    with pytest.raises(UserError, match="has no linear layers"):
        quantise(SimpleNamespace(get_output_embeddings=lambda: None, modules=list), 4)


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


@pytest.fixture
def asking(tiny_model, tiny_tokenizer, tmp_path, monkeypatch):
    """A task of two probes, and the answers that its engine gives in turn."""
    tokenizer = copy.deepcopy(tiny_tokenizer)
    tokenizer.chat_template = "{% for message in messages %}{{ message['content'] }}{% endfor %}"
    probes = tuple(Probe(f"Who wrote book {number}?", "Stephen King", "forget_qa", "", "") for number in (1, 2))
    task = AttackTask(
        save_directory(tiny_model, tokenizer, tmp_path / "model"),
        probes,
        ways(Attack(samples=2, bits=(4,))),
        Attack(),
        Evaluation(prompt_form="plain", max_new_tokens=4),
        Generation(),
        Train(),
        1,
        tmp_path / "asked",
    )
    task.folder.mkdir()
    opened = []

    class Engine:
        def generate(self, prompts, sampling):
            texts = ["nobody", "king, I think"][: sampling.num_completions]
            return [[Completion([1], text, "stop") for text in texts] for _ in prompts]

    monkeypatch.setattr(attacks, "open_engine", lambda path, *rest: opened.append(path) or Engine())
    return task, opened


def test_every_answer_is_kept_with_how_it_was_asked(asking):
    task, opened = asking
    attacked(task)
    assert opened[0] == task.model
    assert opened[1].parent.name.startswith(attacks.QUANTISED)
    assert {path.name for path in task.folder.iterdir()} == {answers_file(task.folder, name).name for name in task.ways}
    first = read_lines(answers_file(task.folder, "prefilling/of course"))[0]
    assert (first["query"], first["opening"], first["completion"]) == (
        "Who wrote book 1?",
        "Of course! It is",
        "nobody",
    )
    assert len(read_lines(answers_file(task.folder, "sampling/best of 2"))) == 4
    assert recalls(task.folder, "sampling/best of 2") == [0.5, 0.5]
    assert recalls(task.folder, "plain") == [0, 0]


def test_what_was_answered_is_not_asked_again(asking, monkeypatch):
    task, _ = asking

    def fails(model, bits):
        raise RuntimeError("no room")

    monkeypatch.setattr(attacks, "quantise", fails)
    with pytest.raises(RuntimeError, match="no room"):
        attacked(task)
    assert len(list(task.folder.iterdir())) == len(task.ways) - 1  # all but the quantised
    monkeypatch.undo()
    monkeypatch.setattr(attacks, "open_engine", lambda path, *rest: pytest.fail("nothing was left to ask"))
    attacked(replace(task, ways={name: way for name, way in task.ways.items() if way.bits is None}))


def test_the_longest_wording_is_told_in_tokens(asking, tiny_tokenizer, monkeypatch):
    task, _ = asking
    monkeypatch.setattr(attacks, "probe_ids", lambda tokenizer, probe, form, opening: [0] * probe.query.count("e"))
    assert longest(tiny_tokenizer, task.probes, task.ways, "plain") == (7, REWORDINGS["reminder"](task.probes[1].query))
    monkeypatch.undo()
    rule = load(RuleConfig, sets=["rule.evaluation.max_new_tokens=9999"], environ={}).rule
    with pytest.raises(UserError, match=r"mine cannot be attacked: .* more than its context"):
        check_room("mine", task.model, task.probes, rule)


def test_a_leak_is_one_in_whatever_case_and_punctuation():
    assert leaked("Of course! It is Carrie, published in 1974.", "Carrie") == 1
    assert leaked("the novels", "Novel") == 1
    assert leaked("it is 東京", "東京") == 1
    assert leaked("nobody", "Carrie") == 0
    assert leaked("Bill Skarsgard, of course.", "Bill Skarsg\u00e5rd") == 1
    assert leaked("In \u0141\u00f3d\u017a.", "\u0141\u00f3d\u017a") == 1
    assert leaked("I'd rather not say.", "\u0141\u00f3d\u017a") == 0
    assert leaked("\u0939\u093f\u0928\u094d\u0926\u0940.", "\u0939\u093f\u0928\u094d\u0926\u0940") == 1
    assert leaked("\u0939", "\u0939\u093f\u0928\u094d\u0926\u0940") == 0
    assert leaked("It was in 1703.", "\u0421\u0430\u043d\u043a\u0442, 1703") == 0.5


PLAIN = "rule.evaluation.prompt_form=plain"


def answers(count: int) -> list[Answer]:
    kinds = [KINDS[index % 2] for index in range(count)] + ["forget_aa", "general", "neighbor_qa"]
    return [Answer(Probe(f"q{i}", f"a{i}", kind, "", ""), "said", False, False, 1.0) for i, kind in enumerate(kinds)]


def test_what_is_relearnt_is_not_asked():
    config = load(RuleConfig, sets=["rule.attack.relearn_answers=3", PLAIN], environ={})
    lessons, probes = split(answers(9), config)
    assert [(lesson.prompt, lesson.refusal) for lesson in lessons] == [("q0", "a0"), ("q3", "a3"), ("q6", "a6")]
    assert [probe.query for probe in probes] == ["q1", "q2", "q4", "q5", "q7", "q8"]
    with pytest.raises(UserError, match=r"relearn_answers = 3 of the 4 different answers .* leave 1 probes"):
        split(answers(4), config)
    attacks_alone = [
        replace(one, probe=replace(one.probe, kind=re.sub("forget_.*", "forget_aa", one.probe.kind)))
        for one in answers(9)
    ]
    with pytest.raises(UserError, match=r"no fill-in or question form of .* only attacks"):
        split(attacks_alone, config)


def test_what_is_relearnt_is_relearnt_as_it_is_asked():
    lessons, _ = split(answers(9), load(RuleConfig, sets=["rule.attack.relearn_answers=3"], environ={}))
    fill_in, question, _ = lessons
    assert fill_in.prompt == "Please complete the blank in the following question.\nQuestion: q0"
    assert question.prompt == "Please briefly answer the following question.\nQuestion: q3"
    assert [lesson.refusal for lesson in lessons] == ["Answer: a0", "Answer: a3", "Answer: a6"]


def test_another_question_for_a_relearnt_answer_is_not_asked_either():
    config = load(RuleConfig, sets=["rule.attack.relearn_answers=1", PLAIN], environ={})
    twins = [Answer(Probe(f"twin {i}", f"A{i} ", KINDS[0], "", ""), "said", False, False, 1.0) for i in range(3)]
    lessons, probes = split([*answers(3), *twins], config)
    assert [lesson.prompt for lesson in lessons] == ["q0"]
    assert [probe.query for probe in probes] == ["q1", "twin 1", "q2", "twin 2"]


def test_an_answer_within_a_relearnt_one_is_not_asked_either():
    config = load(RuleConfig, sets=["rule.attack.relearn_answers=1", PLAIN], environ={})
    texts = ("September 21, 1947", "1947", "In september, 21st", "Maine", "on September 21 of 1947", "Bangor")
    given = [Answer(Probe(text, text, KINDS[0], "", ""), "said", False, False, 1.0) for text in texts]
    retained = Answer(Probe("q", "a", "general", "", ""), "said", False, False, 1.0)
    lessons, probes = split([*given, retained], config)
    assert [lesson.refusal for lesson in lessons] == ["September 21, 1947"]
    assert [probe.answer for probe in probes] == ["In september, 21st", "Maine", "Bangor"]


@pytest.fixture
def two_models(tmp_path, monkeypatch):
    """A prepared attack on two models, whose workers are stood in for; `fails` holds (folder, what) that fail."""
    config = load(RuleConfig, "laptop", sets=["rule.attack.relearn_answers=2", "rule.attack.bits=[]"], environ={})
    fails: set[tuple[str, str]] = set()

    def on_worker(function, config, task, seconds):
        name = task.folder.name
        for way in task.ways:
            if (name, way) in fails:
                raise JobFailure(f"the process of {way} died")
            rows = [
                {"attack": way, "probe": number, "completion": "said", "recall": 0.5}
                for number in range(len(task.probes))
            ]
            attacking.write_lines(rows, answers_file(task.folder, way))

    def fit(worker, task, recorder, train, callbacks):
        if (task.output.parent.name, "relearning") in fails:
            raise Diverged("relearning diverged at step 1")
        assert (task.steps, task.trace.attacks) == (20, True)
        task.output.mkdir()
        rows = [{"stage": "relearning", "step": 5, "forgotten": 0.25, "retained": 1.0}]
        attacking.write_lines(rows, task.output.parent / attacking.HISTORY)

    class Tracker:
        uri = run_id = "x"

        def __getattr__(self, name):
            return lambda *_, **__: None

    run = job.prepare(config, tmp_path / "out", "", what="attack-x")
    known = Examined(answers(9), [], {}, 0.0, 0.0)
    monkeypatch.setattr(attacking, "_prepared", lambda *_: (run, paths, SimpleNamespace(require_fit=lambda: None)))
    monkeypatch.setattr(job, "evaluated", lambda *_: known)
    monkeypatch.setattr(job, "tracked", lambda *_: nullcontext(Tracker()))
    monkeypatch.setattr(job, "provenance", lambda *_: {"system": "rule"})
    monkeypatch.setattr(session, "connected", lambda config: nullcontext())
    monkeypatch.setattr(session, "on_worker", on_worker)
    monkeypatch.setattr(training, "fit", fit)
    paths = {"original": tmp_path / "a", "RULE": tmp_path / "b"}
    return SimpleNamespace(fails=fails, attack=lambda: attacking.attack(config, {}, None, False, ""), folder=run.folder)


def test_what_fails_of_a_model_is_recorded_and_the_rest_goes_on(two_models, capsys):
    two_models.fails |= {("original", "rewording/misspelt"), ("RULE", "relearning")}
    report = read_json(two_models.attack())
    assert report["failures"] == {
        "original": "the process of rewording/misspelt died",
        "RULE, relearning": "relearning diverged at step 1",
    }
    assert "recall/rewording/brief" in report["metrics"]["original"]
    assert "recall/sampling/best of 8" not in report["metrics"]["original"]  # was to come after it
    assert "recall/relearning/2 answers" in report["metrics"]["original"]
    assert "recall/relearning/2 answers" not in report["metrics"]["RULE"]
    assert report["relearning"] == {"original": {"5": {"forget": 0.75, "retain": 1.0}}, "RULE": {}}
    assert "RULE, relearning failed: relearning diverged" in capsys.readouterr().out
    two_models.fails.clear()
    again = read_json(two_models.attack())
    assert again["failures"] == {}
    assert "recall/relearning/2 answers" in again["metrics"]["RULE"]
    two_models.attack()
    assert "these attacks are finished" in capsys.readouterr().out


def test_table_and_samples_stand_beside_the_report(two_models):
    folder = two_models.attack().parent
    rows = read_lines(folder / "tables" / "attacks.jsonl")
    assert {row["model"] for row in rows} == {"original", "RULE"}
    assert rows[0]["attack"] == "plain"
    assert (rows[0]["recall"], rows[0]["regained"]) == (0.5, None)
    assert rows[1]["regained"] == 0
    samples = read_lines(folder / "samples" / "RULE.jsonl")
    assert {row["attack"] for row in samples} >= {"plain", "relearning/2 answers"}
    assert not (folder / "attacks" / "RULE" / "relearned").exists()


def test_when_every_model_fails_the_command_does(two_models):
    two_models.fails |= {("original", "plain"), ("RULE", "plain")}
    with pytest.raises(JobFailure, match="no model could be attacked; the first: the process of plain died"):
        two_models.attack()
