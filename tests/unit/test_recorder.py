"""The recorder of training: a row a step, and what a resumed stage forgets."""

from __future__ import annotations

import resource
from multiprocessing.shared_memory import SharedMemory
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import ray.train
from safetensors import SafetensorError
from transformers import TrainerControl, TrainerState

from cluster import recorder as recorder_module
from cluster import training
from cluster.errors import Diverged, JobFailure, TryAgain, UserError
from cluster.recorder import HISTORY, SAMPLES, Recorder, peak_memory_gib
from cluster.report import read_lines
from cluster.tracking import Tracker


def test_figures_of_one_step_share_a_row(tmp_path):
    recorder = Recorder("rebo", tmp_path, 3)
    recorder.record(1, {"reward": 0.5})
    recorder.record(1, {"seconds/rollout": 2.0})
    assert read_lines(tmp_path / HISTORY) == [{"stage": "rebo", "step": 1, "reward": 0.5, "seconds": {"rollout": 2.0}}]


def test_a_resumed_stage_forgets_its_later_steps_and_no_other_stage(tmp_path):
    Recorder("steering", tmp_path, 3).record(3, {"loss": 1.0})
    recorder = Recorder("rebo", tmp_path, 3)
    for step in (1, 2, 3):
        recorder.record(step, {"reward": 0.5}, [{"step": step, "completion": "a"}])
    recorder.rewind(1)
    assert [(row["stage"], row["step"]) for row in read_lines(tmp_path / HISTORY)] == [("steering", 3), ("rebo", 1)]
    assert [row["step"] for row in read_lines(tmp_path / SAMPLES)] == [1]


def test_a_store_that_falls_silent_holds_up_no_training(tmp_path, monkeypatch, caplog):
    taken, silent = [], {2, 3}

    class Store:
        def metrics(self, numbers, step, stage):
            if step in silent:
                raise TryAgain("the store is silent")
            if all(step > known for _, known, _ in taken):
                taken.append((stage, step, numbers))

    monkeypatch.setattr(Tracker, "attach", lambda uri, run_id: Store())
    monkeypatch.setattr(recorder_module, "SILENCE_S", 0)
    Recorder("steering", tmp_path, 1).record(1, {"loss": 1.0})
    recorder = Recorder("rebo", tmp_path, 5, "http://127.0.0.1:1", "run")
    for step in (1, 2, 3):
        recorder.record(step, {"reward": step / 10, "seconds/rollout": 2.0})
    assert taken == [("rebo", 1, {"reward": 0.1, "seconds/rollout": 2.0})]
    assert "training goes on without it" in caplog.text
    silent.clear()
    recorder._ask_again = 0.0  # ten times as long as the store took to fail have passed
    recorder.record(4, {"reward": 0.4})
    assert [step for _, step, _ in taken] == [1, 2, 3, 4]
    assert taken[2] == ("rebo", 3, {"reward": 0.3, "seconds/rollout": 2.0})
    silent.add(5)
    recorder.record(5, {"reward": 0.5})
    silent.clear()
    recorder.catch_up()
    assert taken[-1] == ("rebo", 5, {"reward": 0.5})


def test_a_completion_may_hold_any_line_separator(tmp_path):
    recorder = Recorder("rebo", tmp_path, 3)
    text = "one\u2028two\u2029three\x85four\nfive"
    recorder.record(1, {"reward": 0.5}, [{"step": 1, "completion": text}])
    recorder.rewind(1)
    assert read_lines(tmp_path / SAMPLES) == [{"stage": "rebo", "step": 1, "completion": text}]


def test_a_training_that_is_ended_early_saves_no_checkpoint_at_its_last_step():
    control = TrainerControl(should_save=True)
    training.stop(control)
    assert (control.should_training_stop, control.should_save) == (True, False)


@pytest.mark.parametrize(("step", "saves"), [(4, True), (5, False)])
def test_no_checkpoint_is_saved_of_the_last_step(tmp_path, step, saves):
    callback = training.CheckpointCallback(Recorder("rebo", tmp_path, 5))
    control = TrainerControl(should_save=True)
    callback.on_step_end(None, TrainerState(global_step=step, max_steps=5), control)
    assert control.should_save == saves


def test_a_checkpoint_holds_the_random_states_of_every_rank(tmp_path, monkeypatch):
    saved = tmp_path / "checkpoint-4"
    saved.mkdir()
    (saved / "rng_state_0.pth").write_bytes(b"mine")
    monkeypatch.setattr(training, "gathered", lambda mine: [mine, {"rng_state_1.pth": b"another's"}])
    reported = []
    monkeypatch.setattr(ray.train, "report", lambda figures, checkpoint: reported.append((figures, checkpoint.path)))
    callback = training.CheckpointCallback(Recorder("rebo", tmp_path, 5))
    callback.on_save(SimpleNamespace(output_dir=str(tmp_path)), TrainerState(global_step=4), TrainerControl())
    assert reported == [({"step": 4}, str(saved))]
    assert {path.name: path.read_bytes() for path in saved.iterdir()} == {
        "rng_state_0.pth": b"mine",
        "rng_state_1.pth": b"another's",
    }


def test_the_trainers_own_files_lie_with_the_results_and_go(tmp_path):
    recorder = Recorder("rebo", tmp_path, 3)
    with recorder.scratch() as folder:
        assert Path(folder).parent == recorder.checkpoints == tmp_path / "train-rebo"
    assert not Path(folder).exists()


def test_a_full_disk_is_told_in_words(tmp_path, monkeypatch):
    recorder = Recorder("rebo", tmp_path, 3)
    told = r"No space left in .*train-rebo for a checkpoint"
    for full in (RuntimeError("unexpected pos 64 vs 0"), SafetensorError("I/O error: No space left on device")):
        with pytest.raises(JobFailure, match=told), recorder.scratch():  # even if there is room again by now
            raise full
    with pytest.raises(RuntimeError, match="mat1 and mat2"), recorder.scratch():
        raise RuntimeError("mat1 and mat2")
    monkeypatch.setattr("cluster.recorder.shutil.disk_usage", lambda _: SimpleNamespace(free=0))
    with pytest.raises(JobFailure, match=told), recorder.scratch():
        raise RuntimeError("mat1 and mat2")
    with pytest.raises(JobFailure, match="another"), recorder.scratch():
        raise JobFailure("another")


def test_shared_memory_is_not_a_process_own():
    before = peak_memory_gib()
    shared = SharedMemory(create=True, size=2**28)
    try:
        np.ndarray(2**28, np.uint8, shared.buf).fill(1)
        whole = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
        assert peak_memory_gib() == pytest.approx(whole - 0.25, abs=0.03)
        assert peak_memory_gib() < before + 0.1
    finally:
        shared.close()
        shared.unlink()


def test_what_comes_again_ends_a_restarted_group_at_once(tmp_path):
    calls = []

    def diverging(task, recorder):
        calls.append(task)
        raise Diverged("diverged; lower the learning rate")

    for _ in range(3):
        with pytest.raises(Diverged, match="diverged; lower"):
            training._told_once(diverging, "task", None, tmp_path / "failure.json")
    assert calls == ["task"]


@pytest.mark.parametrize("error", [RuntimeError("connection closed by peer"), JobFailure("the store did not answer")])
def test_what_may_pass_is_tried_again(tmp_path, error):
    def failing(task, recorder):
        raise error

    with pytest.raises(type(error)):
        training._told_once(failing, None, None, tmp_path / "failure.json")
    assert not (tmp_path / "failure.json").exists()


def test_a_line_that_was_not_finished_does_not_keep_a_run_from_going_on(tmp_path):
    recorder = Recorder("rebo", tmp_path, 9)
    recorder.record(1, {"reward": 0.5}, [{"step": 1, "completion": "whole"}])
    with (tmp_path / SAMPLES).open("a") as file:
        file.write('{"stage": "rebo", "step": 1, "compl')
    recorder.rewind(1)
    assert read_lines(tmp_path / SAMPLES) == [{"stage": "rebo", "step": 1, "completion": "whole"}]
    (tmp_path / SAMPLES).write_text("{\n{}\n")
    with pytest.raises(UserError, match="is damaged"):
        read_lines(tmp_path / SAMPLES)
