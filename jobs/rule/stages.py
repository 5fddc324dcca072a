"""The trainings of a RULE run: its two stages, or one other method; what they need is checked before any starts."""

import os
import shutil
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cluster import folders, session
from cluster.config import Train
from cluster.errors import TryAgain, UserError
from cluster.generation import chosen_engine
from cluster.memory import freed_by, gib, this_node
from cluster.model_shape import ModelShape
from cluster.plan import Plan
from cluster.recorder import Recorder
from cluster.tracking import Tracker
from jobs.rule import methods, shared
from jobs.rule.plan import baseline_plan, baseline_steps, rule_plan, settled, steering_steps
from jobs.rule.reward import make_reward
from jobs.rule.trace import require_probes

if TYPE_CHECKING:
    from jobs.rule.config import RuleConfig
    from jobs.rule.job import Run
    from jobs.rule.methods.base import Method
    from jobs.rule.steering import SteeringTask


def check(run: "Run", cleared: Path | None = None) -> None:
    """What can be wrong with the training itself: unknown reward, models that cannot stand together, no room.

    Args:
        cleared: a folder that is deleted before anything is trained.

    Raises:
        UserError: naming the setting and its remedy.
    """
    method = methods.find(run.config.rule.method)
    if run.config.rule.trace.every is not None:
        require_probes(run.data.probes)
    if method is not None:
        _check_baseline(method, run.config.train)
        _check_trace(run.config)
    elif run.config.rule.method != methods.PROMPT_ONLY:
        _check_rule(run)
    plan(run, cleared).require_fit()


def require_disk(run: "Run") -> None:
    """Raises TryAgain where there is no room on disk now, which a run that was checked before may find later."""
    for memory in plan(run).memory.values():
        if memory.checkpoint > memory.node.disk_free:
            raise TryAgain(
                f"the checkpoints of a training need {gib(memory.checkpoint)}, but {gib(memory.node.disk_free)} are "
                f"free on the disk of {run.folder}; free some, and go on"
            )


def _check_baseline(method: "Method", train: Train) -> None:
    if method.trains is not None and train.lora is not None:
        raise UserError(f"{method.name} changes chosen weights, which adapters would not; take train.lora=null")


def _check_trace(config: "RuleConfig") -> None:
    if config.rule.trace.every is not None and config.train.strategy == "fsdp":
        raise UserError(
            f"rule.trace.every asks the model of {config.rule.method} in training, which transformers cannot do where "
            "train.strategy = fsdp shares out its weights; take ddp, or rule.trace.every=null"
        )


def _check_rule(run: "Run") -> None:
    rule = run.config.rule
    make_reward(**rule.rebo.reward.model_dump())
    if run.config.train.lora is not None and (rule.rebo.start, rule.rebo.reference) == ("steered", "original"):
        raise UserError(
            "rule.rebo.reference = original needs a second model, which LoRA does without; "
            "take steered, or train.lora=null"
        )
    if rule.method == methods.STEERING_ONLY:
        _check_trace(run.config)
    if run.config.train.strategy == "fsdp" and chosen_engine(run.config.generation, run.config.train) != "vllm":
        raise UserError(
            "train.strategy = fsdp needs generation.engine = vllm: transformers cannot generate with sharded weights, "
            "for its ranks take different numbers of forward passes"
        )
    if rule.steering.stop_at_refusal is not None and run.config.train.strategy == "fsdp":
        raise UserError(
            "rule.steering.stop_at_refusal samples from the model in training, which transformers cannot do where "
            "train.strategy = fsdp shares out its weights; take stop_after_epochs instead, and stop_at_refusal=null"
        )


def plan(run: "Run", cleared: Path | None = None) -> Plan:
    """Batches and memory of what `rule.method` trains, against this machine; `cleared` as in `check`.

    Checkpoints that an earlier driver left in the run's folder make room for the next ones.
    """
    node = this_node(run.folder, session.has_other_nodes(run.config))
    leftovers = _checkpoints(run.folder) if cleared is None else [cleared]
    node = replace(node, disk_free=node.disk_free + freed_by(leftovers))
    name = run.config.rule.method
    method = methods.find(name)
    if name == methods.PROMPT_ONLY:
        return Plan(())
    is_looked_at = run.config.rule.trace.every is not None
    if method is None:
        steers = name != methods.RULE or run.config.rule.rebo.start == "steered"
        trained = {"steering": steers, "rebo": name == methods.RULE}
        wanted = tuple(stage for stage, is_trained in trained.items() if is_trained)
        looked_at = {methods.RULE: "rebo"}.get(name, "steering") if is_looked_at else None
        return rule_plan(run.config, run.data, run.source.path, node, wanted, looked_at)
    probes = run.data.probes if is_looked_at else ()
    return baseline_plan(run.config, method, run.corpora, run.source.path, node, probes)


def _checkpoints(folder: Path) -> Iterator[Path]:
    for place, below, _ in os.walk(folder):
        yield from (Path(place, name) for name in below if name.startswith("train-"))
        below[:] = [name for name in below if not name.startswith("train-")]


def slots(runs: Iterable["Run"]) -> int:
    """How many runs the connected cluster's processors, GPUs and, as far as this node tells, memory hold at once."""
    runs = list(runs)
    train = runs[0].config.train
    room = session.places(train.cpus_per_worker, train.gpus_per_worker) // train.num_workers
    for run in runs:
        for memory in plan(run).memory.values():
            if memory.place == "memory" and memory.present is not None:
                room = min(room, memory.present // memory.needed)
    return max(1, int(room))


def unlearning(run: "Run", tracker: Tracker) -> Iterator[tuple[str, Path]]:
    """Stage and model of what `rule.method` makes, each trained when it is asked for; the last one is the result."""
    rule = run.config.rule
    if rule.method != methods.RULE:
        yield "unlearned", other_method(run, tracker)
        return
    start = run.source.path
    if rule.rebo.start == "steered":
        start = steering(run, tracker, run.folder / "steered")
        yield "steered", start
    yield "unlearned", boundary_optimisation(run, tracker, start)


def steering(run: "Run", tracker: Tracker, output: Path) -> Path:
    """Stage 1: the model learns that it may refuse."""
    from jobs.rule.steering import SteeringTask, steer

    rule, config = run.config.rule, run.config
    boundary = tuple(item.prompt for item in run.data.items if item.label == "normal")
    task = SteeringTask(
        run.source.path,
        output,
        run.data.refusals,
        boundary,
        rule.steering,
        config.train,
        config.generation,
        rule.rebo.max_completion_tokens,
        rule.rebo.temperature,
        rule.rebo.top_p,
        rule.seed,
        rule.stop,
        run.trace if rule.method == methods.STEERING_ONLY else None,
    )
    steps = steering_steps(rule.steering, len(run.data.refusals))
    parts = [shared.VERSION, run.source.name, run.source.version, decisive(task)]
    return shared.stage(
        run,
        "steering",
        output,
        parts,
        lambda: trained(run, tracker, "steering", steer, task, steps),
        asked={"refusal_boundary": task.check},
    )


def decisive(task: "SteeringTask") -> dict[str, Any]:
    """What the model of stage 1 depends on, beside the model that it starts from.

    Boundary questions are asked for the record alone, and nothing is sampled where no share of refusals ends the stage.
    """
    left_out = ["model", "output", "check"]
    if task.settings.stop_at_refusal is None:
        left_out += ["max_completion_tokens", "temperature", "top_p", "stop"]
    return {name: value for name, value in vars(task).items() if name not in left_out}


def boundary_optimisation(run: "Run", tracker: Tracker, start: Path) -> Path:
    """Stage 2: reinforcement moves the boundary of what the model in `start` refuses to where the target ends."""
    from jobs.rule.rebo import ReboTask, rebo

    rule, config = run.config.rule, run.config
    reference = start if rule.rebo.reference == "steered" else run.source.path
    task = ReboTask(
        start,
        reference,
        run.folder / "model",
        run.data.items,
        rule.rebo,
        config.train,
        config.generation,
        rule.seed,
        rule.stop,
        run.trace,
    )
    return trained(run, tracker, "rebo", rebo, task, rule.rebo.steps * rule.rebo.updates_per_rollout)


def other_method(run: "Run", tracker: Tracker) -> Path:
    """Whatever else `rule.method` names: stage 1 alone, a prompt alone, or a loss over texts."""
    rule, output = run.config.rule, run.folder / "model"
    if rule.method == methods.STEERING_ONLY:
        return steering(run, tracker, output)
    if rule.method == methods.PROMPT_ONLY:
        from jobs.rule.icu import prompt_only

        return output if output.exists() else prompt_only(run.source.path, run.data.target, output)
    from jobs.rule.baseline import BaselineTask, unlearn

    settings = settled(rule.baseline, methods.find(rule.method), ModelShape.of(run.source.path).layers)
    task = BaselineTask(
        rule.method,
        run.source.path,
        output,
        run.corpora,
        settings,
        run.config.train,
        run.config.generation,
        rule.seed,
        run.trace,
    )
    return trained(run, tracker, "unlearning", unlearn, task, baseline_steps(settings, run.corpora))


def trained(run: "Run", tracker: Tracker, stage: str, worker: Callable, task: Any, steps: int) -> Path:
    """Runs a stage on Ray Train unless its model is there already."""
    recorder = Recorder(stage, run.folder, steps, tracker.uri, tracker.run_id)
    fitted(run, recorder, worker, task, stage)
    return task.output


def fitted(run: "Run", recorder: Recorder, worker: Callable, task: Any, phase: str) -> None:
    """Trains `task.output` in a timed phase of the run, unless it is there already."""
    from cluster import training

    folders.sweep(task.output)
    if not (task.output / "config.json").exists():
        with run.phase(phase):
            training.fit(worker, task, recorder, run.config.train, run.callbacks)
        recorder.catch_up()
    shutil.rmtree(recorder.checkpoints, ignore_errors=True)  # also of a driver that was killed before it did
