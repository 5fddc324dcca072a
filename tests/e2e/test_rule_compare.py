"""`python -m jobs.rule compare` among made-up people: a killed driver, a method that diverges, what is shared."""

from __future__ import annotations

import json
from pathlib import Path

import psutil
import pytest

from cluster.models import load_tokenizer, save_directory
from jobs.rule.world_facts import TARGET
from tests.e2e import commands
from tests.e2e.commands import alive, wait

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1800)]
METHODS = "ICU,RS,RT@1e-3,RULE,RMU@1e-2,GA@1e30"
FINISHED = {"ICU": "ICU", "RS": "RS", "RT@0.001": "RT-at-0.001", "RULE": "RULE", "RMU@0.01": "RMU-at-0.01"}
FAST = {
    "rule.rebo.steps": 6,
    "rule.baseline.warmup_steps": 0,
    "rule.baseline.schedule": "constant",
    "rule.baseline.batch_size": 4,
    "rule.baseline.epochs": 4,
    "rule.baseline.rmu_alpha": 1,
    "train.max_failures": 1,
}
VARIANT = {  # RULE without its first stage and with fewer boundary questions
    "rule.rebo.start": "original",
    "rule.rebo.reference": "original",
    "rule.rebo.advantage": "reinforce_plus_plus",
    "rule.rebo.steps": 3,
    "rule.boundary.ratio": 0.5,
    "rule.boundary.fill_in": False,
}


@pytest.fixture(scope="module")
def compared(world, tmp_path_factory):
    """The folder of a comparison whose driver was killed once, and how the second one ended."""
    storage = tmp_path_factory.mktemp("compare")
    gold = ("--gold", str(world.gold))
    arguments = ("compare", "--methods", METHODS, *gold, *commands.settings(world, FAST), "--out", str(storage / "all"))
    first = commands.start_rule(storage, *arguments)
    try:
        report = storage / "all" / "runs" / "ICU" / "report.json"
        wait(lambda: report.exists() or first.process.poll() is not None, "the first method", 500)
        assert report.exists(), first.errors.read_text()
        below = first.descendants()
        psutil.Process(first.process.pid).kill()
        first.process.wait(30)
        wait(lambda: not alive(below), "the runs of a killed driver to end", 90)
    finally:
        first.kill()
    second = commands.start_rule(storage, *arguments)
    try:
        process = second.finish(1200)
    finally:
        second.kill()
    return storage / "all", process


@pytest.fixture(scope="module")
def reports(compared) -> dict[str, dict]:
    folder, _ = compared
    return {name: json.loads((folder / "runs" / slug / "report.json").read_text()) for name, slug in FINISHED.items()}


def test_what_was_finished_stays_and_the_rest_is_done(compared):
    folder, process = compared
    assert process.returncode == 0, process.stdout[-4000:] + process.stderr[-4000:]
    assert "[ICU] is finished" in process.stdout
    assert process.stdout.splitlines()[-1] == str(folder / "report.json")
    report = json.loads((folder / "report.json").read_text())
    assert list(report["metrics"]) == [*FINISHED, "gold"]
    assert list(report["best"].values()) == list(FINISHED)
    gold = report["metrics"]["gold"]
    assert gold["forgotten"]["value"] > 0.6
    assert gold["retained"]["value"] > 0.95
    forgotten = report["differences"]["RULE - RS"]["forgotten"]
    assert (forgotten["facts"], forgotten["verdict"]) == (12, "better")
    assert "nothing is decided of forgotten" not in process.stdout
    # a model of this size has never followed an instruction, and loses its way behind one
    assert report["differences"]["RULE - ICU"]["retained"]["verdict"] == "better"
    assert "RULE" in report["front"]
    assert (folder / "plots" / "tradeoff.png").stat().st_size > 10_000
    ranked = report["against_gold"]
    assert set(ranked) == {"original", "gold", *FINISHED}
    assert "tofu/forget_quality" not in ranked["gold"]
    # a model that knows everything is told from one that was never told of the target
    assert ranked["original"]["tofu/forget_quality"]["value"] < 0.01
    assert ranked["original"]["tofu/model_utility"]["value"] > 0.5


def test_every_method_is_measured_as_rule_is(compared, reports):
    folder, _ = compared
    for name, report in reports.items():
        method = name.partition("@")[0]
        assert report["method"] == method
        assert report["metrics"]["original"]["known/forget/rouge_l_recall"]["value"] > 0.95
        card = (folder / "runs" / FINISHED[name] / "model" / "README.md").read_text()
        assert f"made by {method} to forget **{TARGET}**" in card
    assert set(reports["RS"]["metrics"]) == set(reports["RT@0.001"]["metrics"]) == {"original", "unlearned"}
    for name in ("RS", "RT@0.001"):
        metrics = reports[name]["metrics"]["unlearned"]
        assert metrics["known/forget/refusal"]["value"] > 0.2
        assert metrics["known/forget/rouge_l_recall"]["value"] < 0.8
    known = {
        stage: one["known/forget/rouge_l_recall"]["value"] for stage, one in reports["RMU@0.01"]["metrics"].items()
    }
    assert known["unlearned"] < known["original"] - 0.2
    assert "unlearning" not in reports["ICU"]["seconds"]


def test_a_method_that_diverges_is_recorded_tried_once_and_leaves_no_model(compared):
    folder, process = compared
    report = json.loads((folder / "report.json").read_text())
    assert list(report["failures"]) == ["GA@1e+30"]
    told = report["failures"]["GA@1e+30"]
    assert told.startswith("GA diverged at step")
    assert "rule.baseline.learning_rate" in told
    assert "exit status 1" in told
    assert "GA@1e+30 failed: " in process.stdout
    log = Path(told.rpartition("; ")[2].removesuffix(")"))
    assert log.read_text().count("unlearning step 1/") == 1
    folder = log.with_name(log.name.removesuffix(".log"))
    assert (folder / "state.json").exists()
    assert not (folder / "model").exists()


def test_stage_one_and_the_original_are_asked_once(compared, reports):
    folder, _ = compared
    shared = [path.name for path in (folder / "shared").iterdir() if not path.name.endswith(".lock")]
    assert len(shared) == 2, shared
    assert reports["RS"]["seconds"]["steering"] == reports["RULE"]["seconds"]["steering"]
    same = (folder / "runs" / "RS" / "model" / "model.safetensors").read_bytes()
    assert (folder / "runs" / "RULE" / "steered" / "model.safetensors").read_bytes() == same
    asked = [name for name, report in reports.items() if "evaluation of original" in report["seconds"]]
    assert not asked


def another_architecture(world, folder: Path) -> Path:
    """A random GPT-2 with the world's tokenizer."""
    from transformers import GPT2Config, GPT2LMHeadModel

    tokenizer = load_tokenizer(Path(world.model))
    ends = {"eos_token_id": tokenizer.eos_token_id, "bos_token_id": tokenizer.bos_token_id}
    config = GPT2Config(vocab_size=len(tokenizer), n_positions=512, n_embd=32, n_layer=1, n_head=2, **ends)
    return save_directory(GPT2LMHeadModel(config), tokenizer, folder)


def test_other_entries_and_models_find_what_is_trained(compared, world):
    folder, _ = compared
    designs = folder.parent / "designs.yaml"
    designs.write_text(json.dumps({"prompted": {"rule.method": "ICU"}, "variant": VARIANT}))
    other = another_architecture(world, folder.parent / "gpt2")
    arguments = ["compare", "--methods", "RS,ICU", "--entries", str(designs)]
    arguments += ["--model", f"theirs={world.gold}", "--model", f"other={other}"]
    arguments += ["--gold", str(world.gold), *commands.settings(world, FAST), "--out", str(folder)]
    process = commands.start_rule(folder.parent, *arguments).finish(500)
    assert process.returncode == 0, process.stdout[-4000:] + process.stderr[-4000:]
    assert all(f"[{name}] is finished" in process.stdout for name in ("RS", "ICU"))
    report = json.loads((folder / "report.json").read_text())
    assert report["methods"] == ["RS", "ICU", "prompted", "variant"]
    assert list(report["best"]) == ["RS", "ICU", "prompted", "variant", "theirs", "other"]
    assert not report["failures"]
    assert report["metrics"]["other"]["forgotten"]["value"] > 0.95  # it knows nothing
    assert report["metrics"]["other"]["retained"]["value"] < 0.05
    assert report["models"]["theirs"] == str(world.gold)
    for axis in ("forgotten", "retained"):
        assert report["metrics"]["theirs"][axis] == report["metrics"]["gold"][axis]
        assert report["metrics"]["prompted"][axis] == report["metrics"]["ICU"][axis]
    assert report["against_gold"]["theirs"]["tofu/forget_quality"]["value"] == pytest.approx(1)
    assert "Area under the front" in process.stdout
    variant = json.loads((folder / "runs" / "variant" / "report.json").read_text())
    assert set(variant["metrics"]) == {"original", "unlearned"}
    assert "steering" not in variant["seconds"]
    rows = [json.loads(line) for line in (folder / "runs" / "variant" / "history.jsonl").read_text().splitlines()]
    assert [row["stage"] for row in rows] == ["rebo"] * 3
    assert [row["zero_advantage_groups"] for row in rows] == [0, 0, 0]
