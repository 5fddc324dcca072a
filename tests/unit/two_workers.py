"""One step of each trainer on one worker, then on two: `python two_workers.py RANK FOLDER PORT` in two processes.

Rank 0 compares: gradients as DDP averages them, and what the trainers log.
"""

import copy
import os
import sys
from dataclasses import replace
from pathlib import Path

from cluster import training

training.leave_vllm_out()

import torch  # noqa: E402
import torch.distributed as dist  # noqa: E402
from accelerate.state import AcceleratorState, GradientState  # noqa: E402
from test_methods import batch, trainer_of  # noqa: E402
from test_rebo import FORGET, NORMAL, PROMPTS, rebo_trainer  # noqa: E402

from cluster.models import load_model, load_tokenizer  # noqa: E402
from jobs.rule.config import Rebo  # noqa: E402

LOGGED = (
    "reward",
    "reward_forget",
    "reward_boundary",
    "zero_advantage_groups",
    "completion_tokens",
    "policy_loss",
    "kl",
)
SILENT = replace(FORGET, source=1)
STEPS = {
    "ReBO, GRPO with KL": {"advantage": "grpo", "kl_coefficient": 0.5, "temperature": 0.7},
    "ReBO, REINFORCE++": {"advantage": "reinforce_plus_plus", "kl_coefficient": 0.0},
    "GA+GDR": None,
    "RMU": None,
}


def rebo_step(settings: dict, policy, tokenizer, folder: Path, rank: int, world: int) -> dict[str, float]:
    """Completions differ in length, and one group of the first worker's earns one reward, so that it has fewer rows."""
    settings = Rebo(prompts_per_step=4, completions_per_prompt=4, max_completion_tokens=8, **settings)
    trainer = rebo_trainer(policy, tokenizer, [SILENT, FORGET, NORMAL, NORMAL], folder, settings, world=world)
    if trainer.ref_model is not None:
        with torch.no_grad():
            for parameter in trainer.ref_model.parameters():
                parameter.mul_(0.9)
    told = trainer.reward
    trainer.reward = lambda text, item: 1.0 if item is SILENT else told(text, item)
    mine = range(len(PROMPTS))[rank * len(PROMPTS) // world : (rank + 1) * len(PROMPTS) // world]
    trainer.training_step(policy, [{"item": index} for index in mine for _ in range(4)])
    return {name: trainer._metrics["train"][name][0] for name in LOGGED if trainer._metrics["train"][name]}


def method_step(name: str, policy, tokenizer, folder: Path, rank: int, world: int) -> dict[str, float]:
    """A step over texts, of which the first worker has the longer ones."""
    trainer = trainer_of(name, policy, folder)
    rows = batch(policy, tokenizer, ["forget", "retain"])
    loss = trainer.training_step(policy, rows[rank::world])
    if world > 1:
        dist.all_reduce(loss)
    return {"loss": loss.item() / world}


def step(name: str, folder: Path, rank: int, world: int) -> tuple[dict[str, float], dict[str, torch.Tensor]]:
    """What a step logs, and the gradients that an optimiser would get."""
    policy, tokenizer = load_model(folder / "model"), load_tokenizer(folder / "model")
    own = folder / f"{world}-{rank}"
    settings = STEPS[name]
    if settings is None:
        logged = method_step(name, policy, tokenizer, own, rank, world)
    else:
        logged = rebo_step(settings, policy, copy.deepcopy(tokenizer), own, rank, world)
    gradients = {name: parameter.grad for name, parameter in policy.named_parameters() if parameter.grad is not None}
    if world > 1:
        for gradient in gradients.values():
            dist.all_reduce(gradient)
            gradient /= world
    return logged, gradients


def main(rank: int, folder: Path, port: str) -> None:
    """Raises AssertionError where two workers differ from one, or where vLLM was imported without need."""
    assert "vllm" not in sys.modules
    alone = {name: step(name, folder, 0, 1) for name in STEPS} if rank == 0 else {}
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "WORLD_SIZE": "2"}
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "LOCAL_WORLD_SIZE": "2"}
    together = {name: step(name, folder, rank, 2) for name in STEPS}
    dist.barrier()
    if rank == 0:
        for name, (logged, gradients) in together.items():
            wanted, wanted_gradients = alone[name]
            assert logged.keys() == wanted.keys(), name
            for key, value in logged.items():
                torch.testing.assert_close(
                    value, wanted[key], rtol=1e-4, atol=1e-5, msg=f"{name}: {key} {value} {wanted}"
                )
            assert gradients.keys() == wanted_gradients.keys(), name
            assert max(gradient.abs().max() for gradient in gradients.values()) > 0, name
            for key, gradient in gradients.items():
                torch.testing.assert_close(gradient, wanted_gradients[key], rtol=1e-3, atol=1e-5, msg=f"{name}: {key}")
    dist.destroy_process_group()


if __name__ == "__main__":
    main(int(sys.argv[1]), Path(sys.argv[2]), sys.argv[3])
