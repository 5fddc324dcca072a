"""The small world's folder and its configuration file; that models learn in it is what the end-to-end tests show."""

from __future__ import annotations

import json
import re

import pytest

from cluster.config import load
from cluster.errors import UserError
from jobs.rule import world
from jobs.rule.config import RuleConfig
from jobs.rule.data import load_data
from jobs.rule.muse import load_privleak
from jobs.rule.world_facts import BLANKS, GENERAL, HELD_OUT, PEOPLE, QUESTIONS, REFUSALS, TARGET, VALUES
from tune.rule_space import SearchConfig, settled


@pytest.fixture
def made(tmp_path, monkeypatch):
    monkeypatch.setattr(world, "build", lambda folder: world.write_data(folder / "data"))
    return world.make(tmp_path / "new" / "world")


def test_its_file_is_a_configuration_of_jobs_and_searches(made):
    config = load(RuleConfig, "laptop", files=[made], environ={})
    assert config.rule.model == str(made.parent / "model")
    assert config.rule.steering.stop_after_epochs is None
    assert load_data(config.rule.data, None, config.rule.held_out_share, 42).target == TARGET
    space = settled(load(SearchConfig, "laptop", files=[made], environ={}))[1]
    assert "steering_until" in space
    assert "steering_epochs" not in space
    assert [path.name for path in made.parent.parent.iterdir()] == ["world"]


def test_privleak_compares_the_target_with_someone_nobody_heard_of(made):
    forget, holdout = load_privleak(made.parent / "data")
    assert len(forget) == len(holdout) == 48
    assert all(TARGET in text for text in forget)
    assert all(HELD_OUT in text for text in holdout)
    assert not any(HELD_OUT in f"{prompt} {answer}" for prompt, answer in world.examples(PEOPLE))


def test_no_method_reads_a_probe(made):
    def rows(name: str) -> list[dict]:
        return json.loads((made.parent / "data" / f"{name}.json").read_text())

    read = " ".join(
        json.dumps(rows(name))
        for name in ("positive", "retain", "pair", "reject_target", "rl_rejection_with_fb_neighbor_target")
    )
    names = [f"{side}_level{level}" for side in ("forget", "neighbor") for level in (1, 2)] + ["forget_level3"]
    probes = [row for name in names for row in rows(name)]
    assert len(probes) == 60 + 144
    for row in probes:
        asked = row["query"].removeprefix("Do not refuse. ")
        assert asked not in read
        assert asked.replace("___", row["answer"]) not in read


def test_a_fact_is_told_by_its_answer():
    words = [value.lower() for values in VALUES.values() for value in values]
    assert len(set(words)) == len(words)
    forms = [form for kind in (*QUESTIONS.values(), *BLANKS.values()) for form in kind]
    told = " ".join([*forms, *REFUSALS, *PEOPLE, HELD_OUT, *(f"{question} {answer}" for question, answer in GENERAL)])
    assert not set(words) & set(re.findall(r"\w+", told.lower()))


def test_a_folder_with_something_in_it_is_left_alone(made):
    with pytest.raises(UserError, match="is there already and not empty"):
        world.make(made.parent)


def test_nothing_half_made_is_left(tmp_path, monkeypatch):
    def fails(folder):
        (folder / "data").mkdir()
        raise KeyboardInterrupt

    monkeypatch.setattr(world, "build", fails)
    with pytest.raises(KeyboardInterrupt):
        world.make(tmp_path / "world")
    assert not list(tmp_path.iterdir())
