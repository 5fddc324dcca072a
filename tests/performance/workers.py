"""Seconds of a ReBO step with two training workers against one, same global batch, on Ray Train (gloo).

    python tests/performance/workers.py [--steps 5]

One worker has two threads, two workers have one each: two cores either way. Writes `tests/performance/workers.json`.
"""

import argparse
import json
import os
import statistics
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent.parent
sys.path.insert(0, str(ROOT))
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ["PYTHONPATH"] = str(ROOT)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("--model", default="embedded:smollm2-135m", help="e.g. the steered/ folder of a run")
    size = parser.parse_args()

    from cluster.config import load
    from cluster.models import resolve
    from cluster.report import machine, write_json
    from jobs.rule.config import RuleConfig

    model = resolve(size.model)
    steps = {}
    for workers in (1, 2):
        sets = [
            f"train.num_workers={workers}",
            f"train.cpus_per_worker={2 // workers}",
            f"rule.rebo.steps={size.steps + 1}",
        ]
        steps[workers] = measured(load(RuleConfig, "laptop", sets=sets), model.path)
    median = {workers: statistics.median(row["seconds"]["step"] for row in rows) for workers, rows in steps.items()}
    result = {
        "question": "seconds of a ReBO step, two workers of one thread against one of two, same global batch",
        "command": f"python tests/performance/workers.py --steps {size.steps}",
        "machine": machine(),
        "model": model.name,
        "median_seconds": median,
        "ratio": median[2] / median[1],
        "steps": steps,
    }
    path = write_json(result, Path(__file__).with_suffix(".json"))
    print(f"ratio {result['ratio']:.2f}  two workers {median[2]:.1f} s  one {median[1]:.1f} s  -> {path}")


def measured(config, model: Path) -> list[dict]:
    """History of stage 2 without its first step."""
    from cluster import session, training
    from cluster.recorder import HISTORY, Recorder
    from jobs.rule.data import load_data
    from jobs.rule.rebo import ReboTask, rebo

    data = load_data("demo", None, 0, 42)
    session.prepare(config)
    with tempfile.TemporaryDirectory() as name, session.connected(config):
        folder = Path(name)
        task = ReboTask(
            model,
            model,
            folder / "model",
            data.items,
            config.rule.rebo,
            config.train,
            config.generation,
            config.rule.seed,
        )
        recorder = Recorder("rebo", folder, config.rule.rebo.steps)
        training.fit(rebo, task, recorder, config.train)
        rows = [json.loads(line) for line in (folder / HISTORY).read_text().splitlines()]
    return rows[1:]


if __name__ == "__main__":
    main()
