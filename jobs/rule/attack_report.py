"""What attacks brought back: a table, a row a model and a column an attack, and the curves of relearning."""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from cluster.report import Metric
from jobs.rule.attacks import PLAIN, PREFILLS, REWORDINGS
from jobs.rule.pareto import LEAST_FACTS, paired_difference
from jobs.scoring.intervals import score_interval

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from rich.table import Table

MARKERS = "os^D"  # a further one where the colours are used up
MOST_TICKS = 12
KINDS = (PLAIN, "rewording", "prefilling", "sampling", "quantisation", "relearning")
RECALL, REGAINED = "recall/", "regained/"


def metrics(
    scores: Mapping[str, Mapping[str, Sequence[float]]], seed: int, asked_for: Sequence[str]
) -> dict[str, dict[str, Any]]:
    """Of each model `recall/ATTACK`, and `regained/ATTACK`, the points above the plain question, as JSON objects.

    scores: model -> attack -> recall of each probe, 0 to 1. asked_for: the fact that each probe asks for.
    """
    found: dict[str, dict[str, Metric]] = {}
    for name, by_attack in scores.items():
        every = by_attack | worst_of(by_attack)
        found[name] = {f"recall/{key}": score_interval(values, seed, asked_for) for key, values in every.items()}
        found[name] |= {
            f"regained/{key}": paired_difference(values, by_attack[PLAIN], seed, asked_for)
            for key, values in every.items()
            if key != PLAIN
        }
    return {name: {key: one.to_json() for key, one in row.items()} for name, row in found.items()}


def worst_of(by_attack: Mapping[str, Sequence[float]]) -> dict[str, list[float]]:
    """KIND/any of rewordings and prefillings, where all were asked: the one that brings most back, probe by probe."""
    worst = {}
    for kind, names in (("rewording", REWORDINGS), ("prefilling", PREFILLS)):
        variants = [by_attack[f"{kind}/{name}"] for name in names if f"{kind}/{name}" in by_attack]
        if len(variants) == len(names):
            worst[f"{kind}/any"] = [max(values) for values in zip(*variants, strict=True)]
    return worst


def best_of_several(attack: str) -> bool:
    """Whether an attack's recall is the best of several answers to a probe, which chance alone puts above one."""
    return attack.endswith("/any") or attack.startswith("sampling/")


def rows(content: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The table with a row a model and attack: recall and what is regained, 0 to 1, each with its interval."""
    found = []
    for model, metrics in content["metrics"].items():
        for key in (key.removeprefix(RECALL) for key in metrics if key.startswith(RECALL)):
            row = {"model": model, "attack": key, "n": metrics[f"{RECALL}{key}"]["n"]}
            for name, prefix in (("recall", RECALL), ("regained", REGAINED)):
                metric = metrics.get(f"{prefix}{key}")
                row |= {name: metric and metric["value"], f"{name}_ci95": metric and metric["ci95"]}
            found.append(row)
    return found


def show(content: Mapping[str, Any]) -> None:
    """The table on the console, and what failed."""
    from rich.console import Console

    console = Console(width=None if Console().is_terminal else 150)
    console.print(table(content))
    for name, why in content["failures"].items():
        console.print(f"{name} failed: {why}", soft_wrap=True, highlight=False, markup=False)


def table(content: Mapping[str, Any]) -> "Table":
    """Recall under each attack in percent with its interval; below it the points regained over the plain question.

    Of several wordings or openings only what any of them brings back: `rows` has each.
    """
    from rich import box
    from rich.table import Table

    metrics = content["metrics"]
    first = next(iter(metrics.values()))
    shown = Table(title="What attacks bring back", title_justify="left", box=box.SIMPLE_HEAD, pad_edge=False)
    shown.add_column("model", no_wrap=True)
    every = {key.removeprefix(RECALL): None for found in metrics.values() for key in found if key.startswith(RECALL)}
    keys = [key for key in every if f"{_kind(key)}/any" not in every or key.endswith("/any")]
    keys.sort(key=lambda key: KINDS.index(_kind(key)))
    for key in keys:
        shown.add_column(key.replace("/", "\n"), justify="right")
    decides = content["facts"] >= LEAST_FACTS
    for name, found in metrics.items():
        shown.add_row(name, *(_cell(found, key, decides) for key in keys))
    count = first[f"{RECALL}plain"]["n"]
    shown.caption = (
        f"Stemmed ROUGE-L recall in percent on {count} forget probes that the original knows, with 95 % intervals over "
        "facts;\nbelow it the points that come back over the plain question, marked * where their paired interval "
        f"leaves out 0 and\nthere are at least {LEAST_FACTS} facts. The best of several answers (any, best of) tells "
        "more than one\nalso where nothing was known, and is never marked. Each wording and opening: "
        "tables/attacks.jsonl."
    )
    shown.caption_justify = "left"
    return shown


def figure(content: Mapping[str, Any]) -> "Figure":
    """Recall of the forgotten over the steps of relearning, a line a model; dashed: recall of what was kept."""
    from matplotlib import colormaps
    from matplotlib.figure import Figure

    drawn = Figure(figsize=(9.6, 5), layout="constrained")
    axes = drawn.add_subplot()
    colours = colormaps["tab10"].colors
    for index, (name, steps) in enumerate(content["relearning"].items()):
        colour = colours[index % len(colours)]
        plain = content["metrics"][name][f"{RECALL}plain"]["value"]
        numbers = sorted(map(int, steps))
        forget = [plain, *(steps[str(step)]["forget"] for step in numbers)]
        marker = MARKERS[index // len(colours) % len(MARKERS)]
        axes.plot([0, *numbers], forget, marker=marker, markersize=4.5, color=colour, label=name)
        axes.plot(numbers, [steps[str(step)]["retain"] for step in numbers], linestyle="--", color=colour, alpha=0.5)
    looks = sorted({0, *(int(step) for steps in content["relearning"].values() for step in steps)})
    if len(looks) <= MOST_TICKS:
        axes.set_xticks(looks)
    axes.set_xlabel("steps of relearning on other forget questions")
    axes.set_ylabel("recall of the forgotten (dashed: of the retained)")
    axes.set_ylim(-0.03, 1.03)
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(color="#DDDDDD", linewidth=0.8)
    axes.set_axisbelow(True)
    drawn.legend(frameon=False, loc="outside right upper")
    return drawn


def _kind(attack: str) -> str:
    return attack.partition("/")[0]


def _cell(found: Mapping[str, Any], key: str, decides: bool) -> str:
    recall = found.get(f"{RECALL}{key}")
    if recall is None:
        return "-"
    low, high = (100 * end for end in recall["ci95"])
    text = f"{100 * recall['value']:.0f} [{low:.0f}, {high:.0f}]"
    regained = found.get(f"{REGAINED}{key}")
    if regained is None:
        return text
    decided = decides and not best_of_several(key) and (regained["ci95"][0] > 0 or regained["ci95"][1] < 0)
    return f"{text}\n({100 * regained['value']:+.0f}{'*' * decided})"
