"""Seconds of a ReBO step against TRL's own GRPOTrainer: equal prompts, completions, lengths, reward and KL term.

    python tests/performance/rebo_step.py [--steps 5] [--prompts 8] [--completions 4] [--tokens 24]

Both train the embedded model from the same weights in turns in this process, transformers generation, two threads.
The first step of each is left out (allocation). Writes `tests/performance/rebo_step.json`.
"""

import argparse
import os
import statistics
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent.parent
sys.path.insert(0, str(ROOT))
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("GOMP_SPINCOUNT", "10000")

LEARNING_RATE = 1e-5


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("--prompts", type=int, default=8)
    parser.add_argument("--completions", type=int, default=4)
    parser.add_argument("--tokens", type=int, default=24)
    parser.add_argument("--model", default="embedded:smollm2-135m", help="e.g. the steered/ folder of a run")
    size = parser.parse_args()

    import torch

    from cluster.models import resolve
    from cluster.report import machine, write_json

    torch.set_num_threads(2)
    model = resolve(size.model)
    ours, theirs = ours_on(model.path, size), trl_on(model.path, size)
    median = {
        name: statistics.median(row["seconds"] for row in rows) for name, rows in (("rayward", ours), ("trl", theirs))
    }
    result = {
        "question": "seconds of one GRPO step, Rayward's ReBO against TRL's GRPOTrainer",
        "command": f"python tests/performance/rebo_step.py --steps {size.steps} --prompts {size.prompts}"
        f" --completions {size.completions} --tokens {size.tokens}",
        "machine": machine(),
        "model": model.name,
        "median_seconds": median,
        "ratio": median["rayward"] / median["trl"],
        "reward": {"rayward": _spread(ours), "trl": _spread(theirs)},
        "rayward_steps": ours,
        "trl_steps": theirs,
    }
    path = write_json(result, Path(__file__).with_suffix(".json"))
    print(f"ratio {result['ratio']:.2f}  rayward {median['rayward']:.1f} s  trl {median['trl']:.1f} s  -> {path}")


def common(size: argparse.Namespace, folder: str) -> dict:
    """The arguments that both trainers get."""
    return {
        "output_dir": folder,
        "use_cpu": True,
        "bf16": False,
        "gradient_checkpointing": False,
        "per_device_train_batch_size": size.prompts * size.completions,
        "num_generations": size.completions,
        "max_completion_length": size.tokens,
        "max_steps": size.steps + 1,
        "learning_rate": LEARNING_RATE,
        "lr_scheduler_type": "constant",
        "beta": 1e-2,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        "shuffle_dataset": False,
        "loss_type": "dapo",
    }


def ours_on(path: Path, size: argparse.Namespace) -> list[dict]:
    """Steps of ReboTrainer."""
    from trl import GRPOConfig

    from cluster.config import Generation, Train
    from cluster.models import chat_ids, load_model, load_tokenizer
    from jobs.rule.config import Rebo
    from jobs.rule.data import load_data, schedule
    from jobs.rule.rebo import ReboTask, rollout_engine
    from jobs.rule.trainer import ReboTrainer

    data, tokenizer = load_data("demo", None, 0, 42), load_tokenizer(path)
    settings = Rebo(
        prompts_per_step=size.prompts, completions_per_prompt=size.completions, max_completion_tokens=size.tokens
    )
    task = ReboTask(path, path, path, data.items, settings, Train(), Generation(engine="transformers"), 42)
    with tempfile.TemporaryDirectory() as folder:
        trainer = ReboTrainer(
            model=load_model(path),
            tokenizer=tokenizer,
            args=GRPOConfig(**common(size, folder)),
            settings=settings,
            items=data.items,
            prompts=[chat_ids(tokenizer, item.prompt) for item in data.items],
            order=schedule(data.items, size.steps + 1, size.prompts, 42),
            engine_of=lambda owner: rollout_engine(owner, task),
            reference=path,
            tokens_per_row=Train().tokens_per_row,
            callbacks=[StepClock()],
        )
        trainer.train()
    return steps_of(trainer)


def trl_on(path: Path, size: argparse.Namespace) -> list[dict]:
    """Steps of TRL's trainer on the same questions in the same order with the same reward."""
    from datasets import Dataset
    from trl import GRPOConfig, GRPOTrainer

    from cluster.models import load_model, load_tokenizer
    from jobs.rule.data import load_data, schedule
    from jobs.rule.reward import make_reward

    data = load_data("demo", None, 0, 42)
    order = schedule(data.items, size.steps + 1, size.prompts, 42)
    reward = make_reward("forget_two_stage_abs_target")

    def scores(completions: list, item: list[int], **_: object) -> list[float]:
        return [reward(turns[0]["content"], data.items[index]) for turns, index in zip(completions, item, strict=True)]

    prompts = [[{"role": "user", "content": data.items[index].prompt}] for index in order]
    with tempfile.TemporaryDirectory() as folder:
        trainer = GRPOTrainer(
            model=load_model(path),
            reward_funcs=[scores],
            args=GRPOConfig(**common(size, folder)),
            train_dataset=Dataset.from_dict({"prompt": prompts, "item": order}),
            processing_class=load_tokenizer(path),
            callbacks=[StepClock()],
        )
        trainer.train()
    return steps_of(trainer)


def StepClock():  # noqa: N802 - a class whose base must not be imported with the module
    """Wall time of each optimiser step, taken alike from both trainers."""
    from transformers import TrainerCallback

    class Clock(TrainerCallback):
        def on_step_begin(self, args, state, control, **_) -> None:
            self.start = time.perf_counter()

        def on_log(self, args, state, control, logs=None, **_) -> None:
            if logs is not None and "train_runtime" not in logs:
                state.log_history[-1]["wall"] = time.perf_counter() - self.start

    return Clock()


def steps_of(trainer) -> list[dict]:
    """Seconds, reward and mean completion length of the steps after the first."""
    rows = [row for row in trainer.state.log_history if "wall" in row]
    return [
        {
            "seconds": round(row["wall"], 3),
            "reward": row["reward"],
            "completion_tokens": row.get("completion_tokens", row.get("completions/mean_length")),
        }
        for row in rows[1:]
    ]


def _spread(rows: list[dict]) -> dict[str, float]:
    rewards = [row["reward"] for row in rows]
    return {"mean": statistics.mean(rewards), "stdev": statistics.stdev(rewards) if len(rewards) > 1 else 0.0}


if __name__ == "__main__":
    main()
