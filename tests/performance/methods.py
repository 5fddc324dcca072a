"""Methods in the small world, each at the best of three learning rates: `python tests/performance/methods.py`.

All of docs/rule.md but WGA and DPO with a retain term; ICU takes no rate. The gold row is a model that never heard of
the target. Records, per seed and method, forgetting and keeping with their intervals, TOFU's two scores, and what it
took to forget half of what the original knew while keeping .85 of the rest. The same command goes on where it ended.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from cluster.report import machine, read_json, write_json  # noqa: E402
from cluster.tracking import git_commit  # noqa: E402

AXES = ("forgotten", "retained")
USUAL = (1e-4, 3e-4, 1e-3)
RATES = {
    "RULE": (1e-4, 3e-4, 1e-3),
    "RS": (1e-4, 2e-4, 4e-4),
    "RT": USUAL,
    "DPO": USUAL,
    **{f"{method}{term}": USUAL for method in ("GA", "NPO", "SimNPO") for term in ("", "+GDR", "+KLR")},
    "RMU": (3e-2, 6e-2, 1e-1),
}
LOOK_EVERY = 2


def main() -> None:
    """Makes the world where it is missing, compares once a seed, writes the record."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--folder", type=Path, default=Path("results/methods"))
    parser.add_argument("--seeds", type=int, nargs="+", default=[42])
    parser.add_argument("--out", type=Path, default=Path(__file__).with_suffix(".json"))
    arguments = parser.parse_args()
    folder = arguments.folder.resolve()
    world = folder / "world"
    if not world.exists():
        run("world", "--out", str(world))
    methods = ",".join([*(f"{name}@{rate:g}" for name, rates in RATES.items() for rate in rates), "ICU"])
    record = {"command": " ".join(["python", *sys.argv]), "machine": machine(), "commit": git_commit(ROOT), "seeds": {}}
    for seed in arguments.seeds:
        out, start = folder / f"seed-{seed}", time.perf_counter()
        options = {"rule.seed": seed, "rule.trace.every": LOOK_EVERY, "train.max_failures": 0}
        sets = [part for key, value in options.items() for part in ("--set", f"{key}={value}")]
        compared = ["--config", str(world / "world.yaml"), "--methods", methods, "--gold", str(world / "gold")]
        run("compare", *compared, *sets, "--out", str(out))
        record["seeds"][str(seed)] = summary(read_json(out / "report.json")) | {
            "minutes_of_this_command": round((time.perf_counter() - start) / 60, 1)
        }
    print(json.dumps(record["seeds"], indent=1))
    print(write_json(record, arguments.out))


def run(*arguments: str) -> None:
    """`python -m jobs.rule ...`."""
    subprocess.run([sys.executable, "-m", "jobs.rule", *arguments], cwd=ROOT, check=True)


def summary(content: dict) -> dict:
    """The best run of each method, who fails, and which differences from RULE are decided."""
    rows = {}
    for method, name in content["best"].items():
        found, cost = content["metrics"][name], content["costs"][name]
        rows[method] = {
            "run": name,
            "front": name in content["front"],
            **{
                axis: [round(found[axis]["value"], 3), *(round(end, 3) for end in found[axis]["ci95"])] for axis in AXES
            },
            "n": [found[axis]["n"] for axis in AXES],
            "half_forgotten": cost["half_forgotten"],
            **{key: found["value"] for key, found in content["against_gold"].get(name, {}).items()},
        }
    ranked = content["against_gold"]
    references = {name: {key: found["value"] for key, found in ranked[name].items()} for name in ("original", "gold")}
    rule = content["best"].get("RULE")
    verdicts = {
        pair: {axis: found[axis]["verdict"] for axis in AXES}
        for pair, found in content["differences"].items()
        if pair.startswith(f"{rule} - ")
    }
    return {"methods": rows, "references": references, "failures": content["failures"], "RULE_against": verdicts}


if __name__ == "__main__":
    main()
