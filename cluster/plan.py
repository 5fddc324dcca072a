"""What a job would ask of its workers, printed and checked before anything runs."""

import math
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from cluster.errors import UserError
from cluster.memory import GIB, RESERVE, USABLE, MemoryPlan, gib

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table


@dataclass(frozen=True)
class BatchPlan:
    """What one stage asks of its workers. `passes` is an estimate where rows are packed: completions end early."""

    stage: str
    prompts_per_step: int
    completions_per_prompt: int
    workers: int
    passes: int
    steps: int
    updates_per_batch: int

    @property
    def samples_per_step(self) -> int:
        """Sequences that one batch learns from, all workers together."""
        return self.prompts_per_step * self.completions_per_prompt

    @property
    def optimiser_steps(self) -> int:
        """Optimiser steps of the stage."""
        return self.steps * self.updates_per_batch


def batch_plan(
    stage: str,
    key: str,
    prompts_per_step: int,
    steps: int,
    workers: int,
    completions_per_prompt: int = 1,
    updates_per_batch: int = 1,
    group_tokens: int = 0,
    tokens_per_row: int | None = None,
) -> BatchPlan:
    """The batch arithmetic of a stage; `group_tokens` is the size of a prompt with its completions when packed.

    Raises:
        UserError: the workers cannot share the prompts of a step equally (`key` names the setting).
    """
    if prompts_per_step % workers:
        raise UserError(
            f"{key} = {prompts_per_step} cannot be dealt equally to train.num_workers = {workers}; "
            f"set {key}={workers * math.ceil(prompts_per_step / workers)}"
        )
    passes = 1
    if tokens_per_row is not None:
        passes = math.ceil(prompts_per_step // workers / max(1, tokens_per_row // group_tokens))
    return BatchPlan(stage, prompts_per_step, completions_per_prompt, workers, passes, steps, updates_per_batch)


@dataclass(frozen=True)
class Plan:
    """All stages of a job: its batches, and the memory of each stage by name."""

    batches: tuple[BatchPlan, ...]
    memory: dict[str, MemoryPlan] = field(default_factory=dict)

    @property
    def refusal(self) -> str | None:
        """Why the job cannot run here, for the first stage that does not fit."""
        return next((f"{stage}: {plan.refusal}" for stage, plan in self.memory.items() if plan.refusal), None)

    def require_fit(self) -> None:
        """Raises UserError, with the smallest change that would fit, where a stage does not."""
        if self.refusal is not None:
            raise UserError(self.refusal)

    def show(self, console: "Console | None" = None) -> None:
        """Prints the batch plan and the memory plan of each stage as tables."""
        from rich.console import Console

        console = console or Console()
        console.print(_batch_table(self.batches))
        for stage, memory in self.memory.items():
            console.print(_memory_table(stage, memory))
            console.print(_verdict(memory), soft_wrap=True, highlight=False)


def _batch_table(batches: tuple[BatchPlan, ...]) -> "Table":
    from rich.table import Table

    table = Table(title="Batch plan")
    table.add_column("")
    rows: dict[str, list[str]] = {}
    for batch in batches:
        table.add_column(batch.stage, justify="right")
        samples = batch.samples_per_step
        for name, value in {
            "prompts a step": batch.prompts_per_step,
            "x completions a prompt": batch.completions_per_prompt,
            "= samples a step": samples,
            "/ workers": batch.workers,
            "= samples a worker and step": samples // batch.workers,
            "passes a worker and step, about": batch.passes,
            "steps": batch.steps,
            "x optimiser steps a batch": batch.updates_per_batch,
            "= optimiser steps": batch.optimiser_steps,
            "samples in all": samples * batch.steps,
        }.items():
            rows.setdefault(name, []).append(f"{value:,}")
    for name, values in rows.items():
        table.add_row(name, *values)
    return table


def _memory_table(stage: str, memory: MemoryPlan) -> "Table":
    from rich.table import Table

    table = Table(title=f"Memory plan, {stage}: one worker, {memory.place}")
    for column, justify in (("", "left"), ("GiB", "right"), ("when", "left"), ("", "left")):
        table.add_column(column, justify=justify)
    for row in memory.rows:
        table.add_row(row.name, f"{row.size / GIB:.2f}", row.phase, row.note)
    table.add_section()
    table.add_row("peak of a worker", f"{memory.per_worker / GIB:.2f}", "", "always + the larger of rollout and update")
    if memory.engine:
        table.add_row("generation engines", f"{memory.engine / GIB:.2f}", "", "vLLM, in the workers")
    if memory.host:
        table.add_row("loading, host memory", f"{memory.host / GIB:.2f}", "", f"{memory.workers_here} workers")
    table.add_row("checkpoints on disk", f"{memory.checkpoint / GIB:.2f}", "", f"{gib(memory.node.disk_free)} free")
    return table


def _verdict(memory: MemoryPlan) -> str:
    if memory.refusal is not None:
        return f"Does not fit: {memory.refusal}."
    if memory.present is None:
        return "No GPU on this machine: not checked."
    usable = f"{gib(memory.present)} usable"
    if memory.place == "GPU memory":
        return f"Fits: {gib(memory.needed)} a GPU of {usable} ({USABLE:.0%} of the smallest GPU)."
    kept = f"{USABLE:.0%} of {gib(memory.node.memory)} less {gib(RESERVE)} for Ray, its object store and the driver"
    return f"Fits: {gib(memory.needed)} of {usable} ({kept}); workers here: {memory.workers_here}."
