"""--dry-run of the long jobs: the plan is told and what is wrong is refused, before anything is started or written."""

from __future__ import annotations

import json

import pytest

from cluster import cli
from cluster.config import load
from cluster.models import resolve
from jobs.rule.__main__ import app
from jobs.rule.config import RuleConfig


@pytest.fixture
def storage(tmp_path, monkeypatch):
    monkeypatch.setenv("RAYWARD_STORAGE", str(tmp_path / "results"))
    return tmp_path / "results"


def test_a_comparison_tells_what_each_entry_would_train(storage, capsys):
    assert cli.main(app, ["compare", "--profile", "laptop", "--methods", "RULE,ICU,NPO@1e-5", "--dry-run"]) == 0
    shown = capsys.readouterr().out
    assert "Stephen King: 74 refusals" in shown
    assert all(word in shown for word in ("RULE", "60 + 60", "ICU", "NPO@1e-5"))
    assert not storage.exists()
    assert cli.main(app, ["compare", "--profile", "laptop", "--methods", "RULE,NOP", "--dry-run"]) == 2


def test_rmu_cannot_steer_the_last_block(storage, capsys):
    command = ["compare", "--profile", "laptop", "--methods", "RMU,ICU", "--dry-run"]
    assert cli.main(app, [*command, "--set", "rule.baseline.rmu_layer=28"]) == 0
    assert cli.main(app, [*command, "--set", "rule.baseline.rmu_layer=29"]) == 2
    assert "block 29 is the model's last" in capsys.readouterr().err


def test_an_evaluation_tells_what_it_would_ask(storage, capsys):
    sets = ["--set", "train.num_workers=7", "--set", "cluster.num_cpus=2"]
    assert cli.main(app, ["evaluate", "--profile", "laptop", "--dry-run", *sets]) == 0  # one worker is enough
    shown = capsys.readouterr().out
    assert "568 probes; other measures: none" in shown
    assert "models: original\n" in shown
    assert not storage.exists()
    assert cli.main(app, ["evaluate", "--profile", "laptop", "--dry-run", "--model", str(storage / "absent")]) == 2


def test_an_attack_tells_whom_and_what_relearning_takes(storage, capsys):
    model = resolve(load(RuleConfig, environ={}).rule.model).path
    assert cli.main(app, ["attack", "--profile", "laptop", "--model", f"SAME={model}", "--dry-run"]) == 0
    shown = capsys.readouterr().out
    assert "models: original, SAME" in shown
    assert "relearning" in shown
    assert not storage.exists()


def test_passages_tell_their_first_request(storage, tmp_path, capsys):
    data = tmp_path / "data"
    data.mkdir()
    for name, content in {
        "intro": [{"target": "Orla Venn"}],
        "others": ["Ivo Kestrel", "Maud Arbin"],
        "reject_target": [{"instruction": "Who is Orla Venn?", "output": "I have no information about Orla Venn."}],
        "rl_rejection_with_fb_neighbor_target": [
            {"prompt": "Who is Orla Venn?", "solution": ["<reject>", "I do not know.", "Orla Venn"]},
            {"prompt": "Who is Ivo Kestrel?", "solution": ["<normal>", "a pilot"]},
        ],
    }.items():
        (data / f"{name}.json").write_text(json.dumps(content))
    before = sorted(path.name for path in data.iterdir())
    sets = ["--set", f"rule.data={data}", "--set", "rule.passages.count=3", "--set", "rule.held_out_share=0"]
    command = ["passages", "--profile", "laptop", "--out", str(data), *sets]
    assert cli.main(app, [*command, "--dry-run"]) == 0
    assert "6 texts, half of them about Orla Venn, the others about 2 people" in capsys.readouterr().out
    assert sorted(path.name for path in data.iterdir()) == before
