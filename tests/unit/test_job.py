"""Before a run: what is another's is never touched, and what is wrong is told before anything starts."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from cluster.config import load
from cluster.errors import UserError
from cluster.models import ModelSource
from cluster.report import write_json
from cluster.runs import is_finished
from cluster.tracking import masked
from jobs.rule.config import RuleConfig
from jobs.rule.data import DEMO, load_data
from jobs.rule.job import Run, claim, main, prepare


@pytest.mark.parametrize("content", ['{"_data_files": []}', "[1]", "{}"])
@pytest.mark.parametrize("fresh", [True, False])
def test_a_folder_of_something_else_is_never_cleared(content, fresh, tmp_path):
    (tmp_path / "state.json").write_text(content)
    data = load_data("demo", None, 0.0, 42)
    run = Run(RuleConfig(), data, ModelSource("m", Path(), "1"), tmp_path, "", state={"identity": "mine"})
    with pytest.raises(UserError, match="holds other things than a run"):
        claim(run, fresh)
    assert (tmp_path / "state.json").read_text() == content


def test_fresh_clears_a_run_of_ones_own(tmp_path):
    folder = tmp_path / "run"
    folder.mkdir()
    (folder / "state.json").write_text('{"identity": "older"}')
    data = load_data("demo", None, 0.0, 42)
    run = Run(RuleConfig(), data, ModelSource("m", Path(), "1"), folder, "", state={"identity": "mine"})
    with pytest.raises(UserError, match="another configuration"):
        claim(run, False)
    claim(run, True)
    assert not folder.exists()


def test_a_clearing_that_was_broken_off_locks_nothing(tmp_path, monkeypatch):
    folder = tmp_path / "run"
    (folder / "runs").mkdir(parents=True)
    (folder / "state.json").write_text('{"identity": "mine"}')
    data = load_data("demo", None, 0.0, 42)
    run = Run(RuleConfig(), data, ModelSource("m", Path(), "1"), folder, "", state={"identity": "mine"})

    def killed(path, **_):
        (path / "state.json").unlink()
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(shutil, "rmtree", killed)
        with pytest.raises(KeyboardInterrupt):
            claim(run, True)
    assert not folder.exists()
    assert len([path for path in tmp_path.iterdir() if path.is_dir()]) == 1
    claim(run, True)
    assert [path.name for path in tmp_path.iterdir()] == [".run.lock"]
    folder.mkdir()
    (folder / "state.json").write_text('{"identity": "older"}')
    (folder / "runs").mkdir()
    with monkeypatch.context() as patched:
        patched.setattr(Path, "rename", lambda *_: (_ for _ in ()).throw(OSError("busy")))  # a mount point
        claim(run, True)
    assert folder.exists()
    assert not any(folder.iterdir())
    (folder / ".state.json.half").write_text("{")  # of a driver that was killed as it wrote its first state
    claim(run, False)


def test_a_run_is_finished_where_its_own_report_is(tmp_path):
    data = load_data("demo", None, 0.0, 42)
    run = Run(RuleConfig(), data, ModelSource("m", Path(), "1"), tmp_path, "", state={"identity": "mine"})
    assert not is_finished(run)
    (tmp_path / "report.json").write_text("{}")
    (tmp_path / "state.json").write_text('{"identity": "other"}')
    assert not is_finished(run)
    (tmp_path / "state.json").write_text('{"identity": "mine"}')
    assert is_finished(run)


@pytest.fixture
def folder_of_data(tmp_path):
    """The demo's data with one benchmark file."""
    folder = tmp_path / "data"
    shutil.copytree(DEMO, folder)
    (folder / "fluency.json").write_text(json.dumps([{"instruction": "Tell a story."}]))
    return folder


def laptop(folder: Path, *sets: str) -> RuleConfig:
    return load(RuleConfig, "laptop", sets=[f"rule.data={folder}", *sets], environ={})


def identity(config: RuleConfig) -> str:
    return prepare(config, None, "", what="evaluate-0", benchmarked=True).state["identity"]


def test_evaluation_is_done_anew_when_a_benchmark_file_changes(folder_of_data):
    before = identity(laptop(folder_of_data))
    assert identity(laptop(folder_of_data)) == before
    (folder_of_data / "fluency.json").write_text(json.dumps([{"instruction": "Tell another story."}]))
    assert identity(laptop(folder_of_data)) != before


def test_a_wrong_benchmark_row_is_told_before_anything_runs(folder_of_data):
    (folder_of_data / "fluency.json").write_text(json.dumps([{"prompt": "Tell a story."}]))
    with pytest.raises(UserError, match=r"fluency\.json, row 0: instruction is missing"):
        prepare(laptop(folder_of_data), None, "", what="evaluate-0", benchmarked=True)


def test_a_judge_without_its_token_is_told_before_anything_runs(folder_of_data, monkeypatch):
    monkeypatch.delenv("NO_SUCH_TOKEN", raising=False)
    judge = "rule.evaluation.judge={base_url: http://127.0.0.1:9/v1, model: m, token_env: NO_SUCH_TOKEN}"
    with pytest.raises(UserError, match="NO_SUCH_TOKEN"):
        prepare(laptop(folder_of_data, judge), None, "")


def test_another_judge_judges_a_finished_run_and_the_same_one_does_not(folder_of_data, tmp_path, monkeypatch):
    monkeypatch.setenv("A_TOKEN", "secret")

    def judged(model: str):
        judge = f"rule.evaluation.judge={{base_url: http://127.0.0.1:9/v1, model: {model}, token_env: A_TOKEN}}"
        return laptop(folder_of_data, judge)

    def working(*_):
        raise InterruptedError("it works")

    identities = {prepare(config, None, "").state["identity"] for config in (judged("a"), judged("b"))}
    assert len(identities) == 1
    out = tmp_path / "run"
    write_json({"identity": identities.pop()}, out / "state.json")
    write_json({"configuration": masked(judged("a").model_dump(mode="json"))}, out / "report.json")
    monkeypatch.setattr("jobs.rule.job.show", lambda content: None)
    monkeypatch.setattr("jobs.rule.job.exclusively", working)
    assert main(judged("a"), out) == out / "report.json"
    with pytest.raises(InterruptedError):
        main(judged("b"), out)


def test_a_probe_longer_than_the_context_is_told(folder_of_data):
    probes = json.loads((folder_of_data / "forget_level2.json").read_text())
    probes[0]["query"] = "Who? " * 9000
    (folder_of_data / "forget_level2.json").write_text(json.dumps(probes))
    with pytest.raises(UserError, match=r"the forget_qa probe 'Who\? .* more than the model's context of 8192"):
        prepare(laptop(folder_of_data), None, "")


@pytest.mark.parametrize(
    ("sets", "told"),
    [
        (["cluster.num_cpus=1"], "cluster.num_cpus = 1, but .* takes 2"),
        (["cluster.address=127.0.0.1:9"], "no Ray cluster answers at 127.0.0.1:9"),
        (["cluster.address=ray://127.0.0.1:9"], "no Ray cluster answers at ray://127.0.0.1:9"),
    ],
)
def test_a_cluster_that_cannot_be_is_told_at_once(folder_of_data, sets, told, monkeypatch):
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    with pytest.raises(UserError, match=told):
        prepare(laptop(folder_of_data, *sets), None, "")


@pytest.mark.parametrize("out", ["file", "file/below", "x" * 5000])
def test_an_out_that_is_no_folder_is_told(tmp_path, out):
    (tmp_path / "file").write_text("mine")
    with pytest.raises(UserError, match="check the path and its permissions"):
        main(load(RuleConfig, "laptop", environ={}), out=tmp_path / out)
    assert (tmp_path / "file").read_text() == "mine"
    assert [path.name for path in tmp_path.iterdir()] == ["file"]
