"""Configuration: which source wins, what a mistake says, and that `ray_config.yaml` shows every dial."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from cluster.config import DEFAULT_FILE, fast_precision, leaves, load, overlaid
from cluster.errors import UserError
from jobs.oodface.config import OodfaceConfig
from jobs.rule.config import RuleConfig
from tune.config import Dimension, Search
from tune.rule_space import SearchConfig

ROOT = Path(__file__).parents[2]
SHOWN_IN_COMMENTS = {"train.lora": "train", "rule.evaluation.judge": "rule", "rule.evaluation.entailment": "rule"}


@pytest.fixture
def sources(tmp_path):
    """A base file with one profile, a file over it, and an environment, each with its own number of steps."""
    base = tmp_path / "base.yaml"
    base.write_text("rule: {rebo: {steps: 1}}\nprofiles: {small: {rule: {rebo: {steps: 2}}}}\n")
    over = tmp_path / "over.yaml"
    over.write_text("rule: {rebo: {steps: 3}}\n")
    later = tmp_path / "later.yaml"
    later.write_text("rule: {rebo: {steps: 4}}\n")
    return {
        "base": base,
        "profile": "small",
        "files": [over, later],
        "environ": {"RAYWARD__RULE__REBO__STEPS": "5", "RAYWARD_CACHE": "elsewhere"},
        "sets": ["rule.rebo.steps=6", "rule.rebo.steps=7"],
    }


@pytest.mark.parametrize(
    ("given", "steps"),
    [
        ([], 1),
        (["profile"], 2),
        (["profile", "files"], 4),
        (["profile", "files", "environ"], 5),
        (["profile", "files", "environ", "sets"], 7),
        (["sets"], 7),
    ],
)
def test_later_sources_win(sources, given, steps):
    chosen = {"environ": {}} | {name: sources[name] for name in given}
    assert load(RuleConfig, base=sources["base"], **chosen).rule.rebo.steps == steps


def test_values_laid_over_a_configuration_are_checked_as_those_of_a_file():
    config = load(RuleConfig, "laptop", environ={})
    changed = overlaid(config, {"rule.rebo.steps": 7, "train.lora": {"rank": 8, "alpha": 16}}, "a trial")
    assert (changed.rule.rebo.steps, changed.train.lora.rank) == (7, 8)
    assert overlaid(config, {}, "a trial") == config
    for keys, told in (
        ({"rule.rebo.stepz": 7}, r"a trial: unknown key rule\.rebo\.stepz.*rule\.rebo\.steps"),
        ({"rule.rebo.steps": 0}, r"a trial: rule\.rebo\.steps = 0 is wrong"),
        ({"rule.rebo": 3}, r"a trial: rule\.rebo = 3 is wrong: it is a section"),
    ):
        with pytest.raises(UserError, match=told):
            overlaid(config, keys, "a trial")


def test_what_a_source_leaves_out_stays():
    config = load(RuleConfig, "laptop", sets=["rule.rebo.reward.target_bonus=0.1"], environ={})
    assert config.rule.rebo.reward.target_bonus == 0.1
    assert config.rule.rebo.reward.behave_weight == 0.7
    assert config.rule.rebo.learning_rate == 1.5e-5


def test_a_name_of_the_users_own_is_replaced_whole():
    key = "rule.rebo.kl_coefficient"
    space = load(SearchConfig, sets=[f"tune.rule.space={{{key}: {{uniform: [0, 1]}}}}"], environ={}).tune.rule.space
    assert space[key] == Dimension(uniform=(0, 1))
    assert "rule.rebo.learning_rate" in space


def test_null_sections_are_filled_by_dotted_keys():
    config = load(RuleConfig, sets=["train.lora.rank=8", "train.lora.alpha=16"], environ={})
    assert (config.train.lora.rank, config.train.lora.alpha) == (8, 16)
    assert load(RuleConfig, sets=["rule.steering.stop_after_epochs=null"], environ={}).rule.steering.epochs == 3


@pytest.mark.parametrize(
    ("sets", "words"),
    [
        (["rule.rebo.learningrate=1e-6"], ["--set rule.rebo.learningrate", "unknown", "rule.rebo.learning_rate"]),
        (["trian.num_workers=2"], ["unknown", "train"]),
        (["rule.rebo.steps=many"], ["--set rule.rebo.steps=many", "rule.rebo.steps", "'many'"]),
        (["train.precision=float16"], ["--set train.precision=float16", "float32", "bfloat16"]),
        (["rule.rebo.completions_per_prompt=1"], ["completions_per_prompt", "at least 2", "got 1"]),
        (["rule.rebo.steps"], ["rule.rebo.steps", "section.key=value"]),
        (["rule.data=[a"], ["rule.data", "quote"]),
        (["oodface.num_workers=4"], ["--set oodface.num_workers=4", "does not read", "oodface", "rule"]),
        (
            [
                "train.lora={rank: 8, alpha: 16, dropout: 0.1}",
                "train.strategy=fsdp",
                "train.activation_checkpointing=true",
            ],
            ["dropout = 0.1", "take dropout 0"],
        ),
        (["tune.rule.trials=4"], ["does not read the section tune"]),
    ],
)
def test_a_wrong_setting_names_value_place_and_remedy(sets, words):
    with pytest.raises(UserError) as error:
        load(RuleConfig, sets=sets, environ={})
    assert all(word in str(error.value) for word in words), error.value
    assert "\n" not in str(error.value)


def test_a_wrong_environment_variable_is_named():
    with pytest.raises(UserError, match="RAYWARD__TRAIN__NUM_WORKERS"):
        load(RuleConfig, environ={"RAYWARD__TRAIN__NUM_WORKERS": "none of them"})


def test_a_wrong_file_is_named(tmp_path):
    with pytest.raises(UserError, match=r"absent\.yaml does not exist"):
        load(RuleConfig, files=[tmp_path / "absent.yaml"], environ={})
    broken = tmp_path / "broken.yaml"
    broken.write_text("rule:\n  rebo: {steps: 1\n  seed: 3\n")
    with pytest.raises(UserError, match=r"broken\.yaml line \d+ is not valid YAML"):
        load(RuleConfig, files=[broken], environ={})
    broken.write_text("- rule\n")
    with pytest.raises(UserError, match="mapping"):
        load(RuleConfig, files=[broken], environ={})
    broken.write_text("rule: {rebo: {stepz: 1}}\n")
    with pytest.raises(UserError, match=r"broken\.yaml: unknown key rule\.rebo\.stepz.*rule\.rebo\.steps"):
        load(RuleConfig, files=[broken], environ={})


@pytest.mark.parametrize(
    ("flags", "gpus", "precision"),
    [("avx512f amx_bf16 amx_tile", 0, "bfloat16"), ("avx2 avx512_bf16", 0, "float32"), ("avx2", 1, "bfloat16")],
)
def test_auto_takes_the_precision_that_the_machine_is_fast_in(tmp_path, flags, gpus, precision):
    (tmp_path / "cpuinfo").write_text(f"processor : 0\nflags : fpu {flags}\n")
    config = load(RuleConfig, sets=[f"train.gpus_per_worker={gpus}"], environ={})
    assert fast_precision(config, tmp_path / "cpuinfo") == precision
    assert fast_precision(load(RuleConfig, environ={}), tmp_path / "none") == "float32"


@pytest.mark.parametrize("value", ["", "5", "[a]", "null"])
def test_a_section_is_no_value(value, tmp_path):
    (tmp_path / "mine.yaml").write_text(f"rule: {value}\n")
    with pytest.raises(UserError, match=r"mine\.yaml: rule = .* is a section; set the keys in it"):
        load(RuleConfig, "laptop", files=[tmp_path / "mine.yaml"], sets=["rule.seed=1"], environ={})
    assert load(RuleConfig, sets=["train.lora.rank=8", "train.lora=null"], environ={}).train.lora is None


def test_auto_is_settled_when_it_is_read():
    assert load(RuleConfig, sets=["train.precision=auto"], environ={}).train.precision in ("float32", "bfloat16")


def test_an_unknown_profile_names_the_known_ones():
    with pytest.raises(UserError, match="gpu, laptop"):
        load(RuleConfig, "lap", environ={})


def test_the_base_values_are_the_defaults_of_the_classes():
    assert load(RuleConfig, environ={}) == RuleConfig()
    search = load(SearchConfig, environ={}).tune.rule
    assert search.space
    assert search.model_copy(update={"space": {}}) == Search()


@pytest.mark.parametrize("profile", ["laptop", "gpu"])
def test_each_profile_is_valid(profile):
    load(RuleConfig, profile, environ={})
    load(SearchConfig, profile, environ={})
    load(OodfaceConfig, profile, environ={})


@pytest.mark.parametrize("schema", [RuleConfig, SearchConfig, OodfaceConfig])
def test_every_key_is_in_the_file_with_a_comment(schema):
    text = DEFAULT_FILE.read_text(encoding="utf-8")
    base = yaml.safe_load(text)
    sections = text.partition("\nprofiles:")[0]
    for key in leaves(schema):
        parent = next((name for name in SHOWN_IN_COMMENTS if key.startswith(f"{name}.")), None)
        leaf = key.rpartition(".")[2]
        if parent is not None:
            name = parent.rpartition(".")[2]
            example = re.search(rf"^ *{name}: null .*\n((?: *# .*\n)+)", sections, flags=re.MULTILINE)
            assert example, parent
            assert re.search(rf"# +{leaf}: ", example[1]), key
            continue
        value = base
        for part in key.split("."):
            assert part in value, key
            value = value[part]
    for line in sections.splitlines():
        assert "#" in line or not line or line.endswith(":"), line


def test_configuration_loads_neither_torch_nor_ray():
    code = (
        "import sys, cluster.config, cluster.cli, jobs.rule.config, tune.rule;"
        "print(sorted({'torch', 'ray'} & set(sys.modules)))"
    )
    shown = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert shown.stdout == "[]\n"


@pytest.mark.parametrize(
    ("assignment", "told"),
    [
        ("rule.rebo.learning_rate=.inf", "finite number"),
        ("rule.rebo.temperature=.nan", "is wrong"),
        ("rule.seed=4294967296", "less than 4294967296"),
        ("rule.rebo.steps=100000000000", "less than or equal to 1000000"),
        ("train.num_workers=1e9", "is wrong"),
        ("tracking.experiment=" + "x" * 5000, "at most 250 characters"),
        ("rule={null: 1}", "the key None is no name"),
    ],
)
def test_absurd_values_are_told_in_short(assignment, told):
    with pytest.raises(UserError, match=told) as error:
        load(RuleConfig, sets=[assignment], environ={})
    assert len(str(error.value)) < 400


@pytest.mark.parametrize("key", ["null", "1", "on", "[1, 2]"])
def test_a_key_that_is_no_name_is_told(tmp_path, key):
    path = tmp_path / "mine.yaml"
    path.write_text(f"rule:\n  ? {key}\n  : 1\n")
    with pytest.raises(UserError, match=r"mine\.yaml"):
        load(RuleConfig, files=[path], environ={})
