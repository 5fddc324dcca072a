"""The space of a search: what may stand in it, what a trial sets, and what is refused before anything starts."""

from __future__ import annotations

import pytest
from pydantic import ValidationError

from cluster.config import load
from cluster.errors import UserError
from tune.config import Dimension, Search
from tune.rule import SearchConfig, settled, usable
from tune.space import corners, distributions, keys_of, present, require_usable

SPACE = {
    "rule.rebo.learning_rate": Dimension(log_uniform=(1e-6, 1e-4)),
    "rule.rebo.reward.target_bonus": Dimension(uniform=(0, 0.5)),
    "rule.rebo.advantage": Dimension(choice=["grpo", "rloo"]),
    "start": Dimension(settings={"no": {"rule.rebo.start": "original", "rule.rebo.reference": "original"}, "yes": {}}),
}
VALUES = {"rule.rebo.learning_rate": 1e-5, "rule.rebo.advantage": "rloo", "start": "no"}


def configured(space: str) -> SearchConfig:
    return load(SearchConfig, "laptop", sets=[f"tune.rule.space={space}"], environ={})


def test_what_optuna_draws_from():
    found = distributions(SPACE)
    assert (found["rule.rebo.learning_rate"].low, found["rule.rebo.learning_rate"].log) == (1e-6, True)
    assert (found["rule.rebo.reward.target_bonus"].high, found["rule.rebo.reward.target_bonus"].log) == (0.5, False)
    assert found["rule.rebo.advantage"].choices == ("grpo", "rloo")
    assert found["start"].choices == ("no", "yes")


def test_what_a_trial_sets():
    assert keys_of(SPACE, VALUES) == {
        "rule.rebo.learning_rate": 1e-5,
        "rule.rebo.advantage": "rloo",
        "rule.rebo.start": "original",
        "rule.rebo.reference": "original",
    }
    assert keys_of(SPACE, {}) == keys_of(SPACE, {"start": "yes"}) == {}


def test_every_choice_and_both_ends_are_looked_at():
    assert [words for words, _ in corners(SPACE)] == [
        *("rule.rebo.learning_rate = 1e-06", "rule.rebo.learning_rate = 0.0001"),
        *("rule.rebo.reward.target_bonus = 0.0", "rule.rebo.reward.target_bonus = 0.5"),
        *("rule.rebo.advantage = grpo", "rule.rebo.advantage = rloo", "start = no", "start = yes"),
    ]


@pytest.mark.parametrize(
    ("given", "told"),
    [
        ({}, "give one of choice, uniform, log_uniform, settings, not none"),
        ({"choice": [1], "uniform": (0, 1)}, "not choice and uniform"),
        ({"choice": []}, "at least 1 item"),
        ({"uniform": (1, 1)}, "is empty"),
        ({"log_uniform": (0, 1)}, "must start above 0"),
        ({"choice": [{"a": 1}]}, "valid"),
        ({"between": (0, 1)}, "Extra inputs"),
    ],
)
def test_a_dimension_that_is_none(given, told):
    with pytest.raises(ValidationError, match=told):
        Dimension(**given)


def test_null_takes_a_name_out():
    assert list(present({"a": None, "b": Dimension(choice=[1])}, "here")) == ["b"]
    with pytest.raises(UserError, match="here is empty"):
        present({"a": None}, "here")


def test_two_names_for_one_key():
    space = {"rule.seed": Dimension(choice=[1, 2]), "both": Dimension(settings={"x": {"rule.seed": 3}})}
    with pytest.raises(UserError, match=r"here: rule\.seed and both both set rule\.seed"):
        require_usable(space, "here", lambda keys, origin: None)


@pytest.mark.parametrize(
    ("space", "told"),
    [
        (
            "{rule.rebo.stepz: {choice: [1]}}",
            r"space: rule\.rebo\.stepz = 1: unknown key.*rule\.rebo\.steps",
        ),
        ("{rule.rebo.kl_coefficient: {uniform: [-1, 1]}}", r"kl_coefficient = -1\.0.*greater than or equal to 0"),
        ("{rule.rebo.advantage: {choice: [grpo, ppo]}}", r"rule\.rebo\.advantage = ppo.*'grpo', 'rloo'"),
        (
            "{boundary: {settings: {all: {rule.boundary.kind: far}}}}",
            r"boundary = all: rule\.boundary\.kind = far",
        ),
        ("{rule.rebo.reward.design: {choice: [none]}}", r"rule\.rebo\.reward\.design = none: "),
    ],
)
def test_what_no_run_would_take_is_refused_with_its_name(space, told):
    config = configured(space)
    [name] = [name for name in config.tune.rule.space if space.startswith(f"{{{name}:")]
    with pytest.raises(UserError, match=told):
        usable(settled(config)[0], {name: config.tune.rule.space[name]})


@pytest.mark.parametrize("key", ["rule.rebo.steps", "rule.data", "train.num_workers", "generation.engine"])
def test_what_makes_trials_incomparable_is_refused(key):
    with pytest.raises(UserError, match="cannot be searched"):
        settled(configured(f"{{{key}: {{choice: [1]}}}}"))


def test_a_trial_is_looked_at_about_a_dozen_times():
    config = load(SearchConfig, "laptop", environ={})
    assert settled(config)[0].rule.trace.every == 5
    config = load(SearchConfig, "laptop", sets=["rule.trace.every=2"], environ={})
    assert settled(config)[0].rule.trace.every == 2
    assert Search().trials == 24
