"""The space of a search: what may stand in it, what a trial sets, and what is refused before anything starts."""

from __future__ import annotations

import math

import pytest
import ray
from pydantic import ValidationError

from cluster import cli
from cluster.config import load
from cluster.errors import UserError
from jobs.rule import job
from tune.config import Dimension, Search
from tune.rule import app, search
from tune.rule_search import planned
from tune.rule_space import SearchConfig, settled, usable, without_halving
from tune.space import configurations, corners, distributions, keys_of, present, require_usable

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
        f"rule.rebo.learning_rate = {1e-6 + (1e-4 - 1e-6) / math.pi}",
        *("rule.rebo.reward.target_bonus = 0.0", "rule.rebo.reward.target_bonus = 0.5"),
        f"rule.rebo.reward.target_bonus = {0.5 / math.pi}",
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


def test_numbers_that_yaml_reads_as_text_are_numbers():
    space = configured(
        "{rule.rebo.learning_rate: {choice: [1e-6, 2.e-5, 3.0e-4, 1e+1]}, x: {choice: [e1, 1e]}}"
    ).tune.rule.space
    assert space["rule.rebo.learning_rate"].choice == [1e-6, 2e-5, 3e-4, 10.0]
    assert space["x"].choice == ["e1", "1e"]


def test_how_many_configurations_there_are_to_try():
    def count(space, **as_it_is):
        return configurations(space, lambda values: repr(as_it_is | keys_of(space, values)))

    finite = {"a": Dimension(choice=[1, 2, 3]), "b": Dimension(settings={"x": {"c": 1}, "y": {"c": 2}})}
    assert count(finite, a=0, c=1) == 7
    assert count(finite, a=1, c=1) == 6  # the one as it is stands in the space
    assert count(finite | {"b": Dimension(settings={"x": {"c": 1}, "y": {}})}, a=1, c=1) == 3  # x and y are the same
    assert count(finite | {"d": Dimension(uniform=(0, 1))}, a=1, c=1) == math.inf


def test_null_takes_a_name_out():
    assert list(present({"a": None, "b": Dimension(choice=[1])}, "here")) == ["b"]
    with pytest.raises(UserError, match="here is empty"):
        present({"a": None}, "here")


def test_two_names_for_one_key():
    space = {"rule.seed": Dimension(choice=[1, 2]), "both": Dimension(settings={"x": {"rule.seed": 3}})}
    with pytest.raises(UserError, match=r"here: rule\.seed and both both set rule\.seed"):
        require_usable(space, "here", lambda keys, origin: None)


def test_a_space_is_read_before_model_and_data(monkeypatch):
    monkeypatch.setattr(job, "prepare", lambda *_, **__: pytest.fail("model and data were read"))
    monkeypatch.setattr("tune.rule.load", lambda *_: configured("{rule.rebo.stepz: {choice: [1]}}"))
    with pytest.raises(UserError, match=r"rule\.rebo\.stepz = 1: unknown key"):
        search()


@pytest.mark.parametrize(
    ("space", "told"),
    [
        (
            "{rule.rebo.stepz: {choice: [1]}}",
            r"space: rule\.rebo\.stepz = 1: unknown key.*rule\.rebo\.steps",
        ),
        ("{rule.rebo.kl_coefficient: {uniform: [-1, 1]}}", r"kl_coefficient = -1\.0.*greater than or equal to 0"),
        ("{rule.rebo.completions_per_prompt: {uniform: [4, 16]}}", r"completions_per_prompt = 7\.8.*valid integer"),
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


@pytest.mark.parametrize(
    "key",
    [
        *("rule.rebo.steps", "rule.data", "train.num_workers", "generation.engine", "rule.trace.every", "rule.method"),
        *("rule.evaluation.known_threshold", "rule.rebo", "rule.rebo.reward"),
    ],
)
def test_what_makes_trials_incomparable_is_refused(key):
    with pytest.raises(UserError, match="cannot be searched"):
        settled(configured(f"{{{key}: {{choice: [1]}}}}"))


def test_a_trial_is_looked_at_about_a_dozen_times():
    config = load(SearchConfig, "laptop", environ={})
    assert settled(config)[0].rule.trace.every == 5
    config = load(SearchConfig, "laptop", sets=["rule.trace.every=2"], environ={})
    assert settled(config)[0].rule.trace.every == 2
    config = load(SearchConfig, "laptop", sets=["tune.rule.naturalness=true"], environ={})
    assert settled(config)[0].rule.trace.naturalness
    assert Search().trials == 24
    config = load(SearchConfig, "laptop", sets=["rule.trace.naturalness=true"], environ={})
    with pytest.raises(UserError, match=r"set tune\.rule\.naturalness=true instead"):
        settled(config)


@pytest.mark.parametrize(
    ("steps", "every", "grace", "ends"), [(60, 5, 4, True), (12, 5, 11, False), (12, 12, 4, False), (12, 5, 12, False)]
)
def test_where_no_trial_can_end_early_it_is_told(steps, every, grace, ends):
    sets = [f"rule.rebo.steps={steps}", f"rule.trace.every={every}", f"tune.rule.grace_steps={grace}"]
    config = load(SearchConfig, "laptop", sets=sets, environ={})
    told = without_halving(settled(config)[0], config)
    assert told == "" if ends else told.startswith(f"no trial is ended early: of its {steps} updates")


def test_only_rule_has_a_stage_to_search():
    with pytest.raises(UserError, match=r"rule\.method = NPO has no stage 2 to search"):
        settled(load(SearchConfig, "laptop", sets=["rule.method=NPO"], environ={}))


def test_paths_are_absolute_and_no_tracking_address_is_left_in_a_trial(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine").mkdir()
    config = load(SearchConfig, "laptop", sets=["rule.data=mine", "tracking.uri=http://user:word@host"], environ={})
    base = settled(config)[0]
    assert (base.rule.data, base.rule.model) == (str(tmp_path / "mine"), "embedded:smollm2-135m")
    assert base.cluster.storage == str(tmp_path / "results")
    assert base.tracking.uri is None


def test_a_name_with_a_slash_is_refused():
    with pytest.raises(UserError, match=r"tune\.rule\.space"):
        configured("{a/b: {choice: [1]}}")


def test_more_trials_than_configurations_are_refused():
    def trying(trials: int):
        config = load(SearchConfig, "laptop", sets=[f"tune.rule.trials={trials}"], environ={})
        only = dict.fromkeys(config.tune.rule.space) | {"rule.rebo.advantage": Dimension(choice=["grpo", "rloo"])}
        few = config.tune.rule.model_copy(update={"space": only})
        return settled(config.model_copy(update={"tune": config.tune.model_copy(update={"rule": few})}))

    trying(2)
    with pytest.raises(UserError, match=r"trials = 3 .* makes 2 different configurations; lower it to 2"):
        trying(3)  # grpo is the configuration as it is


def test_what_may_change_on_resume(tmp_path, capsys):
    (tmp_path / "search.yaml").write_text("rule: {seed: 1}\n")
    for assignment in ("tune.rule.space={}", "rule.seed=2"):
        assert cli.main(app, ["--resume", str(tmp_path), "--set", assignment]) == 2
        assert f"--resume with --set {assignment}: a search goes on as it was" in capsys.readouterr().err
    assert cli.main(app, ["--resume", str(tmp_path / "none")]) == 2
    assert "holds no search" in capsys.readouterr().err
    assert cli.main(app, ["--resume", str(tmp_path), "--fresh"]) == 2


def test_more_trials_than_room_are_refused_with_the_arithmetic(monkeypatch):
    config = load(SearchConfig, "laptop", sets=["tune.rule.max_concurrent=999"], environ={})
    base, space = settled(config)
    run = job.prepare(base, None, "")
    monkeypatch.setattr(ray, "nodes", lambda: [{"Alive": True, "Resources": {"CPU": 2.0}}])
    told = r"max_concurrent = 999 .* = 1998 CPUs and the memory of as many runs; the cluster has room for 1 at once"
    with pytest.raises(UserError, match=told):
        planned(config, base, space, run, [run], "parent")
