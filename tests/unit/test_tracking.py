import http.server
import json
import logging
import os
import shlex
import shutil
import stat
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from cluster import tracking_store
from cluster.errors import JobFailure, UserError
from cluster.processes import birth
from cluster.tracking import Tracker, commit, default_uri, flattened, git_commit, masked, masked_command, submission_id

CONFIG = {
    "rule": {
        "rebo": {"learning_rate": 1e-6, "max_new_tokens": 16, "lora": None},
        "targets": ["1_Stephen_King", "2_Confucius"],
        "judge": {"api_token": "hunter2", "uri": "https://me:hunter2@judge.example/v1"},
    },
    "tokenizer": "smollm2",
    "note": "x" * 7000,
}


@pytest.fixture(scope="session")
def empty_store(tmp_path_factory):
    """A store with its tables, copied for each test because creating them takes seconds."""
    folder = tmp_path_factory.mktemp("store")
    with open_tracker(folder, {}):
        pass
    return folder / "mlflow.db"


@pytest.fixture
def storage(empty_store, tmp_path):
    shutil.copy(empty_store, tmp_path / "mlflow.db")
    return tmp_path


def open_tracker(storage: Path, config=CONFIG, run_id=None, experiment="jobs"):
    uri = f"sqlite:///{storage / 'mlflow.db'}"
    return Tracker.open(uri, experiment + storage.name, "first run", config, {"data.rule": "sha256:ab"}, run_id)


def client_of(tracker):
    from mlflow import MlflowClient

    return MlflowClient(tracker.uri, registry_uri=tracker.uri)


def history(tracker, key):
    return [(metric.step, metric.value) for metric in client_of(tracker).get_metric_history(tracker.run_id, key)]


def model_folder(parent: Path) -> Path:
    folder = parent / "result" / "model"
    folder.mkdir(parents=True)
    (folder / "config.json").write_text("{}")
    (folder / "model.safetensors").write_bytes(b"weights")
    (folder / "training_args.bin").write_bytes(b"pickle")
    return folder


def test_secrets_are_masked_and_numbers_are_not():
    hidden = masked({"hf_token": "a", "API-KEY": "b", "clientSecret": "c", "keys": ["d", {"e": "f"}], "empty_key": ""})
    assert hidden == {
        "hf_token": "***",
        "API-KEY": "***",
        "clientSecret": "***",
        "keys": ["***", {"e": "***"}],
        "empty_key": "",
    }
    assert masked({"max_new_tokens": 16, "tokenizer": "smollm2"}) == {"max_new_tokens": 16, "tokenizer": "smollm2"}
    assert masked({"uri": "http://me:pw@host/a"}) == {"uri": "http://***@host/a"}


def test_a_command_line_tells_no_secret():
    models = "oodface.evaluate.models=[{name: m, options: {hf_token: abc, since: 2026-01-02}}]"
    given = ["run", "--set", models, "--set=tracking.uri=http://me:p@ss@host/a", "--set", "a.b=1"]
    told = masked_command(shlex.join(given))
    assert "abc" not in told
    assert "ss@host" not in told
    parts = shlex.split(told)
    assert parts[2] == 'oodface.evaluate.models=[{"name": "m", "options": {"hf_token": "***", "since": "2026-01-02"}}]'
    assert parts[3:] == ["--set=tracking.uri=http://***@host/a", "--set", "a.b=1"]


def test_flattened_names_values_by_dotted_keys():
    flat = flattened({"a": {"b": 1e-6, "c": {}}, "d": [1, "x"], "e": None, "f": True, "min_k++": "text"})
    assert flat == {"a.b": "1e-06", "a.c": "{}", "d": '[1, "x"]', "e": "null", "f": "true", "min_k__": "text"}


def test_run_holds_configuration_tags_and_no_secret(storage, monkeypatch):
    handed = {"runtime_env": {}, "metadata": {"job_submission_id": "raysubmit_7"}}
    monkeypatch.setenv("RAY_JOB_CONFIG_JSON_ENV_VAR", json.dumps(handed))
    wide = {f"k{i}": i for i in range(250)}
    with open_tracker(storage, {**CONFIG, "wide": wide}) as tracker:
        assert client_of(tracker).get_run(tracker.run_id).info.status == "RUNNING"
    run = client_of(tracker).get_run(tracker.run_id)
    assert run.info.status == "FINISHED"
    assert run.info.run_name == "first run"
    assert run.data.params["rule.rebo.learning_rate"] == "1e-06"
    assert run.data.params["rule.judge.api_token"] == "***"
    assert run.data.params["wide.k249"] == "249"
    assert len(run.data.params["note"]) == 6000
    assert run.data.tags["data.rule"] == "sha256:ab"
    assert run.data.tags["ray.submission_id"] == "raysubmit_7"
    artifacts = Path(client_of(tracker).download_artifacts(run.info.run_id, ""))
    assert artifacts.is_relative_to(storage / "mlartifacts")
    assert "smollm2" in (artifacts / "config.yaml").read_text()
    assert b"hunter2" not in (storage / "mlflow.db").read_bytes()
    assert "hunter2" not in (artifacts / "config.yaml").read_text()


@pytest.mark.parametrize(
    ("error", "status"),
    [(ValueError, "FAILED"), (KeyboardInterrupt, "KILLED"), (SystemExit, "KILLED"), (UserError, "FAILED")],
)
def test_end_of_the_run_tells_how_the_job_ended(storage, error, status):
    with pytest.raises(error), open_tracker(storage) as tracker:
        raise error
    assert client_of(tracker).get_run(tracker.run_id).info.status == status


def test_resumed_run_repeats_no_step(storage):
    with open_tracker(storage) as tracker:
        for step in range(4):
            tracker.metrics({"reward": step / 10, "kl": 0.0}, step, stage="rebo")
    with open_tracker(storage, run_id=tracker.run_id) as resumed:
        assert resumed.run_id == tracker.run_id
        assert client_of(resumed).get_run(resumed.run_id).info.status == "RUNNING"
        for step in range(2, 6):
            resumed.metrics({"reward": 9.0, "loss": 1.0}, step, stage="rebo")
    assert history(resumed, "rebo/reward") == [(0, 0.0), (1, 0.1), (2, 0.2), (3, 0.3), (4, 9.0), (5, 9.0)]
    assert history(resumed, "rebo/loss") == [(step, 1.0) for step in range(2, 6)]
    assert client_of(resumed).get_run(resumed.run_id).info.status == "FINISHED"


def test_attached_writer_continues_the_steps_and_leaves_the_run_open(storage):
    with open_tracker(storage) as driver:
        driver.metrics({"loss": 1.0}, 0)
        with Tracker.attach(driver.uri, driver.run_id) as rank_zero:
            rank_zero.metrics({"loss": 7.0}, 0)
            rank_zero.metrics({"loss": 0.5}, 1)
        assert client_of(driver).get_run(driver.run_id).info.status == "RUNNING"
    assert history(driver, "loss") == [(0, 1.0), (1, 0.5)]


def test_resuming_with_another_configuration_names_the_value(storage):
    with open_tracker(storage) as tracker:
        pass
    changed = {**CONFIG, "tokenizer": "other"}
    with pytest.raises(UserError, match="tokenizer='smollm2' and cannot be continued with 'other'"):
        open_tracker(storage, changed, run_id=tracker.run_id)
    assert client_of(tracker).get_run(tracker.run_id).info.status == "FINISHED"


def test_lost_run_is_replaced_by_a_new_one(storage, caplog):
    with caplog.at_level(logging.WARNING), open_tracker(storage, run_id="0" * 32) as tracker:
        pass
    assert tracker.run_id != "0" * 32
    assert "no longer in the tracking store" in caplog.text


def test_artifacts_samples_and_tables(storage):
    plot = storage / "curve.png"
    plot.write_bytes(b"png")
    with open_tracker(storage) as tracker:
        tracker.artifact(plot, "plots")
        tracker.samples([{"prompt": "Who?", "completion": "Na\u00efve"}, {"prompt": "B"}], "unlearned")
        tracker.table([{"kind": "forget_qa", "n": 3}], "scores")
    artifacts = Path(client_of(tracker).download_artifacts(tracker.run_id, ""))
    assert (artifacts / "plots" / "curve.png").read_bytes() == b"png"
    lines = (artifacts / "samples" / "unlearned.jsonl").read_text(encoding="utf-8").splitlines()
    assert [json.loads(line)["prompt"] for line in lines] == ["Who?", "B"]
    assert json.loads((artifacts / "tables" / "scores.jsonl").read_text()) == {"kind": "forget_qa", "n": 3}


def test_model_is_registered_once_with_an_alias_and_without_pickles(storage, monkeypatch):
    import mlflow

    folder = model_folder(storage)
    with open_tracker(storage) as tracker:
        assert tracker.model(folder, "rule/smol", "unlearned") == "1"
    with open_tracker(storage, run_id=tracker.run_id) as resumed:
        (folder / "renewed").write_bytes(b"renewed")
        (folder / "renewed").replace(folder / "model.safetensors")
        assert resumed.model(folder, "rule/smol", "unlearned") == "1"
        assert resumed.model(folder, "rule/smol", "steered") == "2"
    version = client_of(tracker).get_model_version_by_alias("rule-smol", "unlearned")
    assert (version.version, version.run_id) in {("1", tracker.run_id), (1, tracker.run_id)}
    shutil.rmtree(folder)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", tracker.uri)
    kept = Path(mlflow.artifacts.download_artifacts("models:/rule-smol@unlearned"))
    assert sorted(path.name for path in kept.iterdir()) == ["config.json", "model.safetensors"]
    assert (kept / "model.safetensors").read_bytes() == b"renewed"


def test_model_files_are_links_where_links_are_possible_and_copies_elsewhere(storage, monkeypatch):
    folder = model_folder(storage)
    weights = folder / "model.safetensors"
    with open_tracker(storage) as tracker:
        tracker.model(folder, "rule", "linked")
        assert weights.stat()[stat.ST_NLINK] == 2
        monkeypatch.setattr(os, "link", lambda *_: (_ for _ in ()).throw(OSError(18, "Invalid cross-device link")))
        tracker.model(folder, "rule", "copied")
        assert weights.stat()[stat.ST_NLINK] == 2
    copied = Path(client_of(tracker).download_artifacts(tracker.run_id, "models/copied"))
    assert (copied / "model.safetensors").read_bytes() == b"weights"


def test_folder_without_safetensors_is_refused(storage):
    with open_tracker(storage) as tracker, pytest.raises(ValueError, match="no safetensors"):
        tracker.model(storage, "rule", "unlearned")


def test_full_disk_is_one_sentence(storage, monkeypatch):
    folder = model_folder(storage)

    def full(*_):
        raise OSError(28, "No space left on device")

    with open_tracker(storage) as tracker:
        monkeypatch.setattr(os, "link", full)
        monkeypatch.setattr(shutil, "copy2", full)
        with pytest.raises(JobFailure, match=r"did not take the model .*No space left on device.*disk has room"):
            tracker.model(folder, "rule", "unlearned")


def test_unreachable_server_is_named_with_its_remedy():
    with pytest.raises(UserError, match=r"http://127.0.0.1:9 does not answer .*make up"):
        Tracker.open("http://127.0.0.1:9", "rule", "run", {}, {})


def test_unusable_folder_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot be opened"):
        Tracker.open(f"sqlite:///{tmp_path / 'file' / 'mlflow.db'}", "rule", "run", {}, {})


def test_experiment_behind_a_server_is_refused_without_it(storage):
    with open_tracker(storage) as tracker:
        client_of(tracker).create_experiment("theirs", artifact_location="mlflow-artifacts:/5")
    with pytest.raises(UserError, match=r"'theirs' .* behind an MLflow server"):
        Tracker.open(tracker.uri, "theirs", "run", {}, {})


def test_default_uri_takes_the_server_only_while_it_answers(tmp_path):
    direct = f"sqlite:///{tmp_path / 'mlflow.db'}"
    assert default_uri(tmp_path) == direct

    class Health(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            self.send_response(200 if self.path == "/health" else 404)
            self.end_headers()

        def log_message(self, *_):
            pass

    server = http.server.HTTPServer(("127.0.0.1", 0), Health)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    uri = f"http://127.0.0.1:{server.server_port}"
    mine = birth(os.getpid())
    for born, found in (("another boot:1", direct), (mine, uri)):
        (tmp_path / "cluster.json").write_text(json.dumps({"mlflow": {"uri": uri, "pid": os.getpid(), "born": born}}))
        assert default_uri(tmp_path) == found
    server.shutdown()
    server.server_close()
    assert default_uri(tmp_path) == direct


def test_git_commit_comes_from_the_work_tree_alone(tmp_path, monkeypatch):
    programs = tmp_path / "bin"
    programs.mkdir()
    (programs / "git").write_text("#!/bin/sh\necho 0123abc-dirty\n")
    (programs / "git").chmod(0o755)
    monkeypatch.setenv("PATH", f"{programs}:/usr/bin:/bin")
    assert git_commit(tmp_path) is None
    (tmp_path / ".git").mkdir()
    assert git_commit(tmp_path) == "0123abc-dirty"
    monkeypatch.setenv("PATH", str(tmp_path))
    assert git_commit(tmp_path) is None


def test_submission_id_is_absent_in_a_local_run(monkeypatch):
    monkeypatch.delenv("RAY_JOB_CONFIG_JSON_ENV_VAR", raising=False)
    assert submission_id() is None


def test_a_submitted_job_knows_what_its_submitter_said(monkeypatch):
    metadata = {"job_submission_id": "raysubmit_1", "commit": "0123abc"}
    monkeypatch.setenv("RAY_JOB_CONFIG_JSON_ENV_VAR", json.dumps({"runtime_env": {}, "metadata": metadata}))
    monkeypatch.setattr("cluster.tracking.git_commit", lambda root: None)
    assert (submission_id(), commit()) == ("raysubmit_1", "0123abc")


def test_first_use_by_two_processes_is_safe_and_silent(tmp_path):
    script = (
        "import sys\nfrom cluster.tracking import Tracker\n"
        "with Tracker.open(sys.argv[1], 'rule', 'run', {'a': 1}, {}) as tracker:\n    tracker.metrics({'x': 1.0}, 0)\n"
    )
    command = [sys.executable, "-c", script, f"sqlite:///{tmp_path / 'new' / 'mlflow.db'}"]
    root = Path(__file__).resolve().parents[2]
    both = [
        subprocess.Popen(command, cwd=root, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        for _ in range(2)
    ]
    assert [(process.communicate(timeout=120)[0], process.returncode) for process in both] == [("", 0), ("", 0)]


def test_a_password_in_an_address_is_in_no_message(tmp_path):
    uri = "http://me:hunter2@127.0.0.1:9"
    with pytest.raises(UserError, match=r"http://\*\*\*@127\.0\.0\.1:9 does not answer") as error:
        Tracker.open(uri, "rayward", "run", {}, {})
    assert "hunter2" not in str(error.value)
    with pytest.raises(UserError, match=r"http://\*\*\*@127\.0\.0\.1\S* does not answer") as error:
        tracking_store._require_server("http://me:hunter2@127.0.0.1:9x")
    assert "hunter2" not in str(error.value)
    assert error.value.__cause__ is None
    with pytest.raises(UserError, match=r"http://\[::1 does not answer \(Invalid IPv6 URL\)"):
        tracking_store._require_server("http://[::1")


def test_a_server_that_wants_a_password_is_reached_with_it():
    asked = []

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            asked.append((self.path, self.headers["Authorization"]))
            self.send_response(200)
            self.send_header("Content-Length", "0")
            self.end_headers()

        def log_message(self, *_):
            pass

    with http.server.HTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.handle_request, daemon=True).start()
        tracking_store._require_server(f"http://me:hunter2@127.0.0.1:{server.server_port}")
    assert asked == [("/health", "Basic bWU6aHVudGVyMg==")]


@pytest.mark.parametrize("record", ["[]", '{"mlflow": 3}', '{"mlflow": {"uri": null}}'])
def test_a_record_of_something_else_names_no_server(tmp_path, record):
    (tmp_path / "cluster.json").write_text(record)
    assert default_uri(tmp_path).startswith("sqlite:///")
