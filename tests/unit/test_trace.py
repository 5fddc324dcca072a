"""The looks of a training: which probes, when, and what is left of them."""

from __future__ import annotations

import copy
import json
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import ray.train
from transformers import TrainerControl, TrainerState

from cluster.config import Train, load
from cluster.errors import UserError
from cluster.generation import Completion
from jobs.rule.config import Evaluation, RuleConfig
from jobs.rule.data import Probe
from jobs.rule.looks import Looks
from jobs.rule.naturalness import Answered, dictionary_of, naturalness, perplexities
from jobs.rule.probes import Answer, probe_ids
from jobs.rule.trace import Trace, known_probes, require_probes, scores, trace_of


def answer(kind: str, recall: float, refusal: bool = False, query: str = "q") -> Answer:
    return Answer(Probe(query, "a b c d", kind, "", ""), "said", refusal, refusal, recall)


ORIGINAL = [
    *(answer("forget_qa", 1.0, query=f"f{index}") for index in range(6)),
    answer("forget_qa", 0.2),
    answer("forget_fb", 1.0, refusal=True),
    *(answer("neighbor_qa", 0.9, query=f"n{index}") for index in range(4)),
    answer("general", 1.0, query="g"),
    answer("heldout_boundary_qa", 1.0),
]


def test_data_without_a_side_are_refused_before_anything_is_asked():
    probes = [answer.probe for answer in ORIGINAL]
    require_probes(probes)
    for name in ("forgotten", "retained"):
        with pytest.raises(UserError, match=f"no probe that could be {name} "):
            require_probes([probe for probe in probes if ("forget" in probe.kind) == (name == "retained")])


def test_only_known_probes_of_the_two_sides_are_asked_and_thinned_out_evenly():
    everything = known_probes(ORIGINAL, 0.5, None)
    assert [probe.query for probe in everything] == [*(f"f{i}" for i in range(6)), "n0", "n1", "n2", "n3", "g"]
    assert [probe.query for probe in known_probes(ORIGINAL, 0.5, 3)] == ["f0", "f2", "f4", "n0", "n1", "n3"]
    assert known_probes(ORIGINAL, 0.5, 100) == everything


def test_a_side_that_nothing_is_known_of():
    with pytest.raises(UserError, match="could be retained"):
        known_probes(ORIGINAL[:8], 0.5, None)
    with pytest.raises(UserError, match="could be forgotten"):
        known_probes(ORIGINAL[6:], 0.5, None)


def test_nobody_looks_unless_asked_to():
    assert trace_of(load(RuleConfig, environ={}).rule, ORIGINAL, Path("original"), "Ann Lee") is None
    rule = load(RuleConfig, sets=["rule.trace.every=3", "rule.trace.probes=2"], environ={}).rule
    trace = trace_of(rule, ORIGINAL, Path("original"), "Ann Lee")
    assert (trace.every, len(trace.probes), trace.settings, trace.original) == (3, 4, rule.evaluation, None)
    rule = load(RuleConfig, sets=["rule.trace.every=3", "rule.trace.naturalness=true"], environ={}).rule
    assert trace_of(rule, ORIGINAL, Path("original"), "Ann Lee").original == Path("original")


def test_scores_by_axis():
    probes = [answer(kind, 0).probe for kind in ("forget_aa", "general", "neighbor_fb")]
    assert scores(probes, [0.25, 0.5, 1.0]) == {"forgotten": [0.75], "retained": [0.5, 1.0]}
    assert scores(probes, [0.25, 0.5, 1.0], [0.4, 0, 0])["naturalness"] == [0.4]


class Half:
    """Says half of each answer."""

    def generate(self, prompts, sampling):
        return [[Completion([1], "a b", "stop")] for _ in prompts]


@pytest.fixture
def looked(tmp_path, tiny_tokenizer, monkeypatch):
    reported, recorded = [], []
    monkeypatch.setattr(ray.train, "report", reported.append)
    tokenizer = copy.deepcopy(tiny_tokenizer)
    tokenizer.chat_template = "{% for message in messages %}{{ message['content'] }}{% endfor %}"
    recorder = SimpleNamespace(folder=tmp_path, record=lambda step, figures: recorded.append((step, figures)))
    trace = Trace(2, known_probes(ORIGINAL, 0.5, 2), Evaluation(prompt_form="plain"))
    freed = []
    looks = Looks(trace, Train(), tokenizer, recorder, Half, lambda: freed.append(1))
    return SimpleNamespace(looks=looks, reported=reported, recorded=recorded, freed=freed, folder=tmp_path)


@pytest.mark.parametrize(("last", "steps"), [(4, [2, 4]), (5, [2, 4, 5])])
def test_every_few_steps_and_after_the_last(looked, last, steps):
    state, control = TrainerState(), TrainerControl()
    for step in range(1, last + 1):
        state.global_step = step
        looked.looks.on_step_end(None, state, control)
    looked.looks.on_train_end(None, state, control)
    half = {"forgotten": 0.5, "retained": 0.5}
    assert looked.recorded == [(step, half) for step in steps]
    assert looked.reported == [{"step": step} | half for step in steps]
    assert len(looked.freed) == len(steps)
    assert sorted(path.name for path in (looked.folder / "looks").iterdir()) == [f"{step:06d}.json" for step in steps]
    kept = json.loads((looked.folder / "looks" / f"{last:06d}.json").read_text())
    assert kept == {"forgotten": [0.5, 0.5], "retained": [0.5, 0.5]}


def test_attacks_are_scored_by_what_is_told_in_whatever_form(looked, tmp_path):
    probes = (answer("forget_qa", 0).probe, answer("general", 0).probe)
    probes = tuple(replace(probe, answer="B!") for probe in probes)
    for attacks, told in ((False, 0.0), (True, 1.0)):
        looked.looks.trace = replace(looked.looks.trace, probes=probes, attacks=attacks)
        looked.looks._look(2)
        assert looked.recorded[-1][1]["retained"] == told


def test_naturalness_is_that_of_the_evaluation(looked, tiny_model, tmp_path):
    tiny_model.save_pretrained(tmp_path / "original")
    looked.looks.tokenizer.save_pretrained(tmp_path / "original")
    looked.looks.trace = replace(looked.looks.trace, original=tmp_path / "original", target="Ann Lee")
    looked.looks._look(2)
    kept = json.loads((looked.folder / "looks" / "000002.json").read_text())
    tokenizer = looked.looks.tokenizer
    [first, _] = [probe for probe in looked.looks.trace.probes if probe.kind == "forget_qa"]
    [perplexity] = perplexities(tiny_model, tokenizer, [probe_ids(tokenizer, first, "plain")], ["a b"], [""], 512)
    asked = Answered(first.query, "a b", "Ann Lee", first.answer)
    [wanted] = naturalness([asked], [perplexity], dictionary_of(tokenizer))
    assert kept["naturalness"][0] == pytest.approx(wanted.all / 100)
    assert len(kept["naturalness"]) == 2
    assert set(looked.reported[-1]) == {"step", "forgotten", "retained", "naturalness"}


def test_ranks_share_the_probes_and_their_scores_keep_the_order(looked, monkeypatch):
    def gathered(part):
        parts[here.rank] = part
        return [parts.get(0, part), parts[1]]

    class ByRank:
        def generate(self, prompts, sampling):
            said = {0: "a b c d", 1: "a"}[here.rank]
            return [[Completion([1], said, "stop")] for _ in prompts]

    here, parts = SimpleNamespace(rank=0), {}
    looked.looks.engine = ByRank
    monkeypatch.setattr("cluster.training.world_size", lambda: 2)
    monkeypatch.setattr("jobs.rule.looks.rank", lambda: here.rank)
    monkeypatch.setattr("cluster.training.gathered", gathered)
    for here.rank in (1, 0):
        looked.looks._look(2)
    kept = json.loads((looked.folder / "looks" / "000002.json").read_text())
    assert kept == {"forgotten": [0.0, 0.75], "retained": [1.0, 0.25]}


def test_intervals_of_a_look_are_over_the_facts_asked_for(tmp_path):
    from jobs.rule import trial

    values = {"forgotten": [1.0, 1.0, 0.0, 0.0, 1.0, 1.0], "retained": [1.0, 0.5]}
    (tmp_path / "looks").mkdir()
    (tmp_path / "looks" / "000004.json").write_text(json.dumps(values))
    by_probe = trial.intervals(tmp_path, 4, 0)["forgotten"]
    (tmp_path / trial.FACTS).write_text(
        json.dumps({"forgotten": ["a", "a", "b", "b", "c", "c"], "retained": ["d", "e"]})
    )
    by_fact = trial.intervals(tmp_path, 4, 0)["forgotten"]
    assert by_fact.value == by_probe.value
    assert by_fact.n == by_probe.n == 6
    assert by_fact.ci95[1] - by_fact.ci95[0] > by_probe.ci95[1] - by_probe.ci95[0]
    assert trial.intervals(tmp_path, 5, 0) == {}
