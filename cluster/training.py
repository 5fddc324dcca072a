"""Ray Train: one function on every worker, one checkpoint contract, one recorder of what happens.

A checkpoint is a Hugging Face trainer checkpoint (model, optimiser, scheduler, random states, step) with the history
of the run in it. Rank 0 writes it once; Ray Train keeps the newest and hands it back after a failure.
"""

import json
import shutil
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any

from transformers import TrainerCallback

from cluster.cli import root_cause
from cluster.config import Lora, Train
from cluster.errors import Diverged, JobFailure, TryAgain, UserError
from cluster.recorder import SCRATCH, Recorder, rank
from cluster.report import read_json, write_json

if TYPE_CHECKING:
    import torch
    from accelerate import Accelerator
    from ray.train import UserCallback
    from transformers import PreTrainedModel, PreTrainedTokenizerBase, Trainer, TrainerControl, TrainingArguments


SNAPSHOT = "checkpoint_manager_snapshot.json"  # of Ray Train
RANDOM_STATES = "rng_state*.pth"  # of transformers, one a rank
WAITS_FOR_ROOM = 29  # times that Ray Train tries again to start the workers, after a minute each
COLLECTIVE_LIMIT_S = 2 * 3600  # ranks wait while rank 0 copies a checkpoint, of an 8B model 128 GB


class CheckpointCallback(TrainerCallback):
    """Tells the recorder of each logged step, and Ray Train of each saved checkpoint (rank 0 attaches it)."""

    def __init__(self, recorder: Recorder, samples: Callable[[], list[dict]] = list) -> None:
        self.recorder = recorder
        self.samples = samples
        self.started = time.perf_counter()
        self.seconds = 0.0

    def on_step_begin(self, args, state, control, **_) -> None:
        """Told by the trainer."""
        self.started = time.perf_counter()

    def on_step_end(self, args, state, control, **_) -> None:
        """Told by the trainer, before callbacks that look at the model in their own time."""
        self.seconds = time.perf_counter() - self.started
        if state.global_step >= state.max_steps:
            stop(control)

    def on_log(self, args, state, control, logs=None, **_) -> None:
        """Told by the trainer."""
        figures = {key: value for key, value in (logs or {}).items() if value is not None and key != "epoch"}
        if "train_runtime" not in figures and figures:
            figures["seconds/step"] = self.seconds
            self.recorder.record(state.global_step, figures, self.samples())

    def on_save(self, args, state, control, **_) -> None:
        """Told by the trainer."""
        import ray.train

        checkpoint = None
        folder = Path(args.output_dir) / f"checkpoint-{state.global_step}"
        states = gathered({path.name: path.read_bytes() for path in folder.glob(RANDOM_STATES)})
        if rank() == 0:
            for one in states[1:]:  # each rank writes its own on a disk of its own
                for name, content in one.items():
                    (folder / name).write_bytes(content)
            checkpoint = ray.train.Checkpoint.from_directory(folder)
        ray.train.report({"step": state.global_step}, checkpoint=checkpoint)


def world_size() -> int:
    """Number of training workers, 1 outside a process group."""
    import torch.distributed as dist

    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def gathered(value: Any) -> list[Any]:
    """The `value` of every rank, by rank, on every rank."""
    import torch.distributed as dist

    found = [value] * world_size()
    if len(found) > 1:
        dist.all_gather_object(found, value)
    return found


def stop(control: "TrainerControl") -> None:
    """Ends a training at this step, without a checkpoint there: resumed from it transformers would make one more."""
    control.should_training_stop, control.should_save = True, False


def prepare_worker(train: Train) -> None:
    """Threads of this worker; deterministic kernels are the CPU's default."""
    import torch
    import transformers

    transformers.utils.logging.disable_progress_bar()
    if not train.gpus_per_worker:
        torch.set_num_threads(train.cpus_per_worker)


def leave_vllm_out() -> None:
    """Keeps TRL from importing vLLM, which it does wherever that is installed: seconds and .2 GiB of every worker.

    For workers that generate with transformers, before anything of TRL's trainers is imported.
    """
    from trl import import_utils

    import_utils.is_vllm_available = lambda min_version=None: False


def trainable(model: "PreTrainedModel", train: Train) -> "PreTrainedModel":
    """The model as it is trained: whole, or with LoRA adapters."""
    return model if train.lora is None else with_lora(model, train.lora)


def with_lora(model: "PreTrainedModel", lora: Lora) -> "PreTrainedModel":
    """The model with low-rank adapters on its linear layers; the head stays as it is."""
    from peft import LoraConfig, get_peft_model

    settings = LoraConfig(
        r=lora.rank,
        lora_alpha=lora.alpha,
        lora_dropout=lora.dropout,
        target_modules=lora.target_modules,
        task_type="CAUSAL_LM",
    )
    return get_peft_model(model, settings)


def arguments(
    folder: str, train: Train, seed: int, config_class: "type[TrainingArguments] | None" = None, **settings: Any
) -> "TrainingArguments":
    """Trainer arguments common to all stages; weights stay float32, bfloat16 is mixed precision."""
    import torch
    from torch.distributed.fsdp import MixedPrecisionPolicy
    from transformers import TrainingArguments

    sharded = {}
    if train.strategy == "fsdp":
        sharded = {
            "fsdp": True,
            "fsdp_config": {"version": 2, "activation_checkpointing": train.activation_checkpointing},
        }
    chosen = (config_class or TrainingArguments)(
        output_dir=folder,
        use_cpu=not train.gpus_per_worker,
        bf16=train.precision == "bfloat16",
        gradient_checkpointing=train.activation_checkpointing and train.strategy != "fsdp",
        optim="adamw_torch_fused",
        seed=seed,
        logging_steps=1,
        logging_nan_inf_filter=False,
        save_strategy="steps",
        save_steps=train.checkpoint_every,
        save_total_limit=1,
        report_to="none",
        disable_tqdm=True,
        ddp_find_unused_parameters=False,
        **sharded,
        **settings,
    )
    if chosen.fsdp_plugin_args is not None and chosen.bf16:
        half = torch.bfloat16
        # accelerate's own would add up the workers' gradients in bfloat16
        policy = MixedPrecisionPolicy(param_dtype=half, reduce_dtype=torch.float32, output_dtype=half)
        chosen.fsdp_plugin_args["mixed_precision_policy"] = policy
    return chosen


def run(trainer: "Trainer", recorder: Recorder) -> None:
    """Trains, from the newest checkpoint that Ray Train holds if there is one."""
    import ray.train
    from transformers.trainer_callback import PrinterCallback

    trainer.remove_callback(PrinterCallback)
    checkpoint = ray.train.get_checkpoint()
    if checkpoint is None:
        recorder.rewind(0)
        trainer.train()
        return
    with checkpoint.as_directory() as folder:
        state = json.loads((Path(folder) / "trainer_state.json").read_text())
        recorder.rewind(state["global_step"])
        trainer.train(resume_from_checkpoint=str(folder))


def exchanging(accelerator: "Accelerator", model: "torch.nn.Module", last: bool) -> AbstractContextManager:
    """Gradients are exchanged between ranks in the last backward pass of a step only.

    With FSDP in each: without the exchange every rank would keep the gradients of the whole model.
    """
    return nullcontext() if last or accelerator.is_fsdp2 else accelerator.no_sync(model)


def save_final(
    trainer: "Trainer",
    tokenizer: "PreTrainedTokenizerBase",
    base: Path,
    train: Train,
    output: Path,
    recorder: Recorder,
) -> None:
    """Writes the trained model as a plain Hugging Face directory in float32, adapters merged.

    In bfloat16 a change below a four-hundredth of a weight is rounded away, and a learning rate of 4e-7 makes no other.
    All ranks take part (FSDP gathers); rank 0 writes, whole or not at all.

    Raises:
        Diverged: a weight is no number; the last step's loss, of before that step, does not tell.
    """
    import torch

    from cluster.models import load_model, save_directory

    gathered = Path(trainer.args.output_dir) / "final"
    trainer.save_model(str(gathered))
    if rank() != 0:
        return
    recorder.note_peak()
    if train.lora is not None:
        from peft import PeftModel

        model = PeftModel.from_pretrained(load_model(base), gathered).merge_and_unload()
    else:
        model = load_model(gathered)
    if not all(torch.isfinite(weight).all() for weight in model.parameters()):
        raise Diverged(f"stage {recorder.stage} diverged at its end: weights are no numbers; lower the learning rate")
    save_directory(model, tokenizer, output)


def fit(
    worker: Callable[[Any, Recorder], None],
    task: Any,
    recorder: Recorder,
    train: Train,
    callbacks: Sequence["UserCallback"] = (),
) -> None:
    """Runs `worker(task, recorder)` on every worker of a Ray Train group.

    `recorder.checkpoints` keeps Ray Train's own state: the same folder again continues from the newest checkpoint. It
    is removed when the stage is done. `callbacks` hear what the workers report.

    Raises:
        UserError, JobFailure: a worker raised it.
        TryAgain: the cluster did not have the workers free within half an hour.
        JobFailure: a worker failed more often than `train.max_failures`; the sentence is the first root cause.
    """
    from ray.train import CheckpointConfig, FailureConfig, RunConfig, ScalingConfig
    from ray.train.torch import TorchConfig, TorchTrainer
    from ray.train.v2.api.exceptions import TrainingFailedError

    folder = recorder.checkpoints
    if not _sound(folder / SNAPSHOT):
        print(f"what Ray Train kept in {folder} is damaged; stage {recorder.stage} begins anew", flush=True)
        shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True, exist_ok=True)
    for leftover in folder.glob(f"{SCRATCH}*"):
        shutil.rmtree(leftover, ignore_errors=True)
    final = folder / "failure.json"
    final.unlink(missing_ok=True)  # of an earlier run of the same command, which may have been mended since
    resources = {"CPU": train.cpus_per_worker}

    class InterruptibleTrainer(TorchTrainer):
        # Ray's own handler ends the driver on Ctrl-C with status 1 and without a word, and outlives the training.
        def _register_sigint_handler(self, controller: object) -> None:
            pass

    trainer = InterruptibleTrainer(
        lambda _: _told_once(worker, task, recorder, final),
        train_loop_config={},
        torch_config=TorchConfig(backend="nccl" if train.gpus_per_worker else "gloo", timeout_s=COLLECTIVE_LIMIT_S),
        scaling_config=ScalingConfig(
            num_workers=train.num_workers, use_gpu=bool(train.gpus_per_worker), resources_per_worker=resources
        ),
        run_config=RunConfig(
            name=folder.name,
            storage_path=str(folder.parent.resolve()),
            failure_config=FailureConfig(max_failures=train.max_failures, controller_failure_limit=WAITS_FOR_ROOM),
            checkpoint_config=CheckpointConfig(num_to_keep=1),
            callbacks=list(callbacks),
        ),
    )
    try:
        trainer.fit()
    except TrainingFailedError as error:
        cause = root_cause(error)
        if isinstance(cause, UserError | JobFailure):
            raise cause from error
        if type(cause).__name__ == "WorkerGroupStartupTimeoutError":
            waited = (
                f"stage {recorder.stage} waited {WAITS_FOR_ROOM + 1} minutes for room for {train.num_workers} workers"
            )
            raise TryAgain(f"{waited}; see with `ray status` who holds it, and run the command again") from error
        lines = str(cause).strip().splitlines() or [type(cause).__name__]
        raise JobFailure(f"training stage {recorder.stage} failed: {type(cause).__name__}: {lines[-1]}") from error
    shutil.rmtree(folder, ignore_errors=True)


def _sound(snapshot: Path) -> bool:
    """Whether Ray Train could go on from its record, which it writes in place: a damaged one it refuses for good."""
    if not snapshot.exists():
        return True
    try:
        results = json.loads(snapshot.read_text(encoding="utf-8"))["checkpoint_results"]
        return all((snapshot.parent / result["checkpoint_dir_name"]).is_dir() for result in results)
    except (ValueError, KeyError, TypeError):
        return False


def _told_once(worker: Callable[[Any, Recorder], None], task: Any, recorder: Recorder, final: Path) -> None:
    """A group that is restarted after its training diverged would diverge again: it ends at once."""
    earlier = read_json(final)
    if earlier is not None:
        raise Diverged(earlier["message"])
    try:
        worker(task, recorder)
    except Diverged as error:
        write_json({"message": str(error)}, final)
        raise
