"""The looks of a training: which probes, when, and what is left of them."""

from __future__ import annotations

import copy
import json
import sys
from types import SimpleNamespace

import pytest
from transformers import TrainerControl, TrainerState

from cluster.config import load
from cluster.errors import UserError
from cluster.generation import Completion
from jobs.rule.config import Evaluation, RuleConfig
from jobs.rule.data import Probe
from jobs.rule.looks import Looks
from jobs.rule.probes import Answer
from jobs.rule.trace import Trace, known_probes, scores, trace_of


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
    assert trace_of(load(RuleConfig, environ={}).rule, ORIGINAL) is None
    rule = load(RuleConfig, sets=["rule.trace.every=3", "rule.trace.probes=2"], environ={}).rule
    trace = trace_of(rule, ORIGINAL)
    assert (trace.every, len(trace.probes), trace.settings) == (3, 4, rule.evaluation)


def test_scores_by_axis():
    probes = [answer(kind, 0).probe for kind in ("forget_aa", "general", "neighbor_fb")]
    assert scores(probes, [0.25, 0.5, 1.0]) == {"forgotten": [0.75], "retained": [0.5, 1.0]}


class Half:
    """Says half of each answer."""

    def generate(self, prompts, sampling):
        return [[Completion([1], "a b", "stop")] for _ in prompts]


@pytest.fixture
def looked(tmp_path, tiny_tokenizer, monkeypatch):
    reported, recorded = [], []
    monkeypatch.setitem(sys.modules, "ray.train", SimpleNamespace(report=reported.append))
    monkeypatch.setattr(sys.modules["ray"], "train", sys.modules["ray.train"], raising=False)
    tokenizer = copy.deepcopy(tiny_tokenizer)
    tokenizer.chat_template = "{% for message in messages %}{{ message['content'] }}{% endfor %}"
    recorder = SimpleNamespace(folder=tmp_path, record=lambda step, figures: recorded.append((step, figures)))
    trace = Trace(2, known_probes(ORIGINAL, 0.5, 2), Evaluation(prompt_form="plain"))
    freed = []
    looks = Looks(trace, tokenizer, recorder, Half, lambda: freed.append(1))
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


def test_ranks_share_the_probes_and_their_scores_keep_the_order(looked, monkeypatch):
    class ByRank:
        def generate(self, prompts, sampling):
            said = {0: "a b c d", 1: "a"}[rank]
            return [[Completion([1], said, "stop")] for _ in prompts]

    gathered = []
    looked.looks.engine = ByRank
    monkeypatch.setattr("cluster.training.world_size", lambda: 2)
    monkeypatch.setattr("cluster.training.rank", lambda: rank)
    for rank in (1, 0):
        monkeypatch.setattr("cluster.training.gathered", lambda part: (gathered.append(part), gathered[::-1])[1])
        if rank == 1:
            monkeypatch.setattr("cluster.training.gathered", lambda part: (gathered.append(part), [[0, 0], part])[1])
        looked.looks._look(2)
    kept = json.loads((looked.folder / "looks" / "000002.json").read_text())
    assert kept == {"forgotten": [0.0, 0.75], "retained": [1.0, 0.25]}
