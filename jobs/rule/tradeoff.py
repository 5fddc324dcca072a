"""What a comparison shows: each method's point of forgetting and keeping, the front, differences, costs."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import permutations
from pathlib import Path
from statistics import mean
from typing import TYPE_CHECKING, Any

from cluster.errors import UserError
from cluster.recorder import HISTORY
from cluster.report import Metric, read_json, read_lines
from jobs.rule.costs import Spent
from jobs.rule.entries import group_of
from jobs.rule.evaluate import unpacked
from jobs.rule.pareto import LEAST_FACTS, Point, area, front, paired_difference, verdict
from jobs.rule.probes import Answer, leaked, recalled
from jobs.rule.tofu import FORGET_QUALITY, MODEL_UTILITY
from jobs.rule.trace import AXES, asked_for, known_probes, scores
from jobs.scoring.intervals import score_interval

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from rich.table import Table

STAGES = ("steered", "unlearned")
GOLD = "gold"  # a model that never saw what is to be forgotten: shown beside the methods, and none of them
TRAININGS = ("steering", "rebo", "unlearning")
HALF_KEEPS = 0.85
FEW_DIFFERENCES = 10
FLOORS = (0.0, 0.4, 0.5, 0.6, 0.7)
GOLD_SCORES = {"p(gold)": FORGET_QUALITY, "utility": MODEL_UTILITY}
STEMMED = tuple(f"{axis}/stemmed" for axis in AXES)
COPIED = {
    "refusal": "known/forget/refusal",
    "over_refusal": "retain/refusal",
    "naturalness": "naturalness/all",
    "judged": "naturalness_judged/all",
}


@dataclass(frozen=True)
class Outcome:
    """One finished run of a comparison, or a model that was given to it.

    name, method: of entries of one method the best is taken (`entries.Entry.group`). folder, model: of the run, and of
    what it made. scores: axis -> value of each known probe, after the last stage, 0 to 1, more is better, by the recall
    of RULE's package and of stems. facts: axis -> what each of these probes asks for.
    trace: points of its looks and stages in order, the last one the result. stages: those that are of all known probes.
    copied: metrics of its report. seconds: of training, None where nobody knows. tokens, used: as in `jobs.rule.costs`.
    reached: what had been spent at the first look that had forgotten half of what the original knew and kept HALF_KEEPS
    of the rest; None where no look did, or none was taken.
    """

    name: str
    method: str
    folder: Path
    model: Path
    scores: Mapping[str, Sequence[float]]
    facts: Mapping[str, Sequence[str]]
    trace: tuple[Point, ...]
    stages: tuple[Point, ...]
    copied: Mapping[str, Metric] = field(default_factory=dict)
    seconds: float | None = None
    tokens: int | None = None
    used: Mapping[str, float | None] = field(default_factory=dict)
    reached: Spent | None = None

    @property
    def point(self) -> Point:
        """Where it ends."""
        return self.trace[-1]


def outcome(
    name: str, method: str, folder: Path, threshold: float, spent: Sequence[Spent], used: Mapping[str, float | None]
) -> Outcome:
    """Reads the folder of a method's run; `threshold` is `rule.evaluation.known_threshold`.

    Raises:
        UserError: as `require_known`.
    """
    report = read_json(folder / "report.json")
    original = _answers(folder, "original")
    is_known = recalled(original, threshold)
    found: dict[str, list[float]] = {}
    trace, whole = [], []
    rows = [row for row in read_lines(folder / HISTORY) if AXES[0] in row]
    looks = [Point(name, *(row[axis] for axis in AXES)) for row in rows]
    limit = report["configuration"]["rule"]["trace"]["probes"]
    for stage in STAGES:
        if (folder / "answers" / f"{stage}.json").exists():
            found = _scores(_answers(folder, stage), is_known)
            point = Point(name, *(mean(found[axis]) for axis in AXES))
            trace += [*(looks if stage == STAGES[-1] else []), point]
            whole += [*(looks if stage == STAGES[-1] and limit is None else []), point]
    metrics = report["metrics"]["unlearned"]
    copied = {short: Metric.from_json(metrics[long]) for short, long in COPIED.items() if long in metrics}
    seconds = sum(report["seconds"].get(stage, 0.0) for stage in TRAININGS)
    tokens = spent[-1].tokens if spent else 0
    asked = set(known_probes(original, threshold, limit))
    before = _scores(original, [knows and a.probe in asked for a, knows in zip(original, is_known, strict=True)])
    reached = _reached(rows, before, spent)
    ends = tuple(trace), tuple(whole)
    known_facts, model = _facts(original, is_known), folder / "model"
    return Outcome(name, method, folder, model, found, known_facts, *ends, copied, seconds, tokens, used, reached)


def model_outcome(
    name: str,
    folder: Path,
    answers: Sequence[Answer],
    original: Sequence[Answer],
    threshold: float,
    metrics: Mapping[str, Metric],
) -> Outcome:
    """The row of the model in `folder`, of whose training nothing is known."""
    is_known = recalled(original, threshold)
    found = _scores(answers, is_known)
    point = Point(name, *(mean(found[axis]) for axis in AXES))
    copied = {short: metrics[long] for short, long in COPIED.items() if long in metrics}
    used = dict.fromkeys(("forget", "retain"))
    group = group_of(name)
    known_facts = _facts(original, is_known)
    return Outcome(name, group, folder, folder, found, known_facts, (point,), (point,), copied, used=used)


def _reached(
    rows: Sequence[Mapping[str, Any]], original: Mapping[str, Sequence[float]], spent: Sequence[Spent]
) -> Spent | None:
    knew, kept = 1 - mean(original["forgotten"]), mean(original["retained"])
    for row in rows:
        if 1 - row["forgotten"] <= knew / 2 and row["retained"] >= HALF_KEEPS * kept:
            return next((one for one in spent if (one.stage, one.step) == (row["stage"], row["step"])), None)
    return None


def require_known(original: Sequence[Answer], threshold: float) -> None:
    """Raises UserError where the original answers no forget probe, or no retained one."""
    _scores(original, recalled(original, threshold))


def best(outcomes: Sequence[Outcome]) -> list[Outcome]:
    """Of each method the run whose point spans the largest rectangle, in order of the methods."""
    chosen: dict[str, Outcome] = {}
    for one in outcomes:
        if one.method not in chosen or _spans(one) > _spans(chosen[one.method]):
            chosen[one.method] = one
    return list(chosen.values())


def summary(outcomes: Sequence[Outcome], seed: int) -> dict[str, Any]:
    """The content of a comparison's report: metrics, front, areas and paired differences of the methods' best runs.

    Areas are of all points that a method has, its stages and learning rates. Differences are told from gold as well.
    """
    chosen = best(outcomes)
    methods = [one for one in chosen if one.method != GOLD]
    reached = {(point.forgotten, point.retained) for point in front([one.point for one in methods])}
    on_front = {one.name for one in methods if (one.point.forgotten, one.point.retained) in reached}
    metrics = {one.name: _intervals(one, seed) | dict(one.copied) for one in outcomes}
    counted: dict[str, list[Point]] = {}
    for one in outcomes:
        counted.setdefault(one.method, []).extend(one.stages)
    differences = {
        f"{one.name} - {other.name}": _differences(one, other, seed) for one, other in permutations(chosen, 2)
    }
    return {
        "metrics": {name: {key: metric.to_json() for key, metric in row.items()} for name, row in metrics.items()},
        "best": {one.method: one.name for one in methods},
        "front": sorted(on_front),
        "area": {method: {f"{r:g}": area(points, r) for r in FLOORS} for method, points in counted.items()},
        "differences": differences,
        "costs": {
            one.name: {
                "seconds": one.seconds and round(one.seconds, 1),
                "tokens": one.tokens,
                "data_used": dict(one.used),
                "half_forgotten": one.reached and vars(one.reached),
            }
            for one in outcomes
        },
        "traces": {one.name: [[point.forgotten, point.retained] for point in one.trace] for one in outcomes},
        "runs": {one.name: str(one.folder) for one in outcomes},
        "models": {one.name: str(one.model) for one in outcomes},
    }


def table(content: Mapping[str, Any]) -> "Table":
    """A row a run; the best of each method says whether the others' best are better on an axis."""
    from rich import box
    from rich.table import Table

    shown = Table(title="Forgetting against keeping", title_justify="left", box=box.SIMPLE_HEAD, pad_edge=False)
    judged = any("judged" in metrics for metrics in content["metrics"].values())
    shown.add_column("method", no_wrap=True)
    for name in (
        "forgotten %",
        "retained %",
        "refusal %",
        "over-refusal %",
        "naturalness",
        *(["judged"] if judged else []),
        "min",
        "tokens",
        "D_f %",
        "D_r %",
        *(GOLD_SCORES if content.get("against_gold") else ()),
        "front",
    ):
        shown.add_column(name, justify="right")
    for name, metrics in content["metrics"].items():
        cost = content["costs"][name]
        cells = [
            _cell(metrics.get("forgotten"), 100),
            _cell(metrics.get("retained"), 100),
            _cell(metrics.get("refusal"), 100),
            _cell(metrics.get("over_refusal"), 100),
            _cell(metrics.get("naturalness"), 1),
            *([_cell(metrics.get("judged"), 1)] if judged else []),
            "-" if cost["seconds"] is None else f"{cost['seconds'] / 60:.1f}",
            "-" if cost["tokens"] is None else f"{cost['tokens']:,}",
            *("-" if share is None else f"{100 * share:.0f}" for share in cost["data_used"].values()),
        ]
        if content.get("against_gold"):
            ranked = content["against_gold"].get(name, {})
            cells += [f"{ranked[key]['value']:.2g}" if key in ranked else "-" for key in GOLD_SCORES.values()]
        mark = "yes" if name in content["front"] else "" if name not in content["best"].values() else "no"
        shown.add_row(name, *cells, mark)
    shown.caption = (
        "Forgotten: 1 - ROUGE-L recall on forget probes that the original knows; retained: recall on neighbours and\n"
        "general knowledge that it knows; 95 % intervals over the facts asked for, those of the others over probes.\n"
        "Refusal: of known forget probes (known by an entailment model too); over-refusal: of all retained ones;\n"
        "naturalness: of answers to all forget ones.\n"
        "Minutes: of training, with start-up and looks. D_f, D_r: tokens read, in percent of the corpora.\n"
        "Front: of each method's best run (largest product of forgotten and retained), chosen on the same probes: the\n"
        "more runs a method has, the more its figures lean to the good side."
    )
    looked_at = len(content["differences"])  # each pair stands there twice, and is told on two axes
    if looked_at > FEW_DIFFERENCES:
        shown.caption += (
            f"\nBelow, what is decided of {looked_at} differences, each at 95 %: were none real, about "
            f"{looked_at / 20:.0f} would seem so."
        )
    if content.get("against_gold"):
        found = content["against_gold"]["original"]
        before = ", ".join(f"{short} {found[key]['value']:.2g}" for short, key in GOLD_SCORES.items() if key in found)
        shown.caption += (
            "\np(gold): TOFU's forget quality, near 1 where nobody can tell the model from gold; utility: TOFU's, of\n"
            f"what is to stay. The original has {before}."
        )
    shown.caption_justify = "left"
    return shown


def areas(content: Mapping[str, Any]) -> str:
    """The area under each method's own front, of points that keep anything and of those that keep half."""
    told = [f"{name} {found['0']:.2f}, {found['0.5']:.2f}" for name, found in content["area"].items()]
    return f"Area under the front of a method's runs and stages, and where retained >= .5 alone: {'; '.join(told)}."


def verdicts(content: Mapping[str, Any]) -> list[str]:
    """A sentence a pair whose difference is decided on an axis, each pair once; and why nothing can be decided."""
    sentences, seen = [], set()
    for axis in AXES:
        counts = {found[axis]["facts"] for found in content["differences"].values()}
        if any(count < LEAST_FACTS for count in counts):
            sentences.append(
                f"nothing is decided of {axis}: the known probes ask for {min(counts)} different answers, and fewer "
                f"than {LEAST_FACTS} say too little"
            )
    for pair, axes in content["differences"].items():
        one, other = pair.split(" - ")
        if (other, one) in seen:
            continue
        seen.add((one, other))
        for axis, stemmed in zip(AXES, STEMMED, strict=True):
            found = axes[axis]
            low, high = (100 * value for value in found["ci95"])
            state = {"better": "more", "worse": "less"}.get(found["verdict"])
            if state:
                size = f"{abs(100 * found['value']):.0f} points [{low:.0f}, {high:.0f}]"
                by_stems = axes[stemmed]["verdict"]
                doubt = "" if by_stems == found["verdict"] else f"; {by_stems} by recall of stems"
                sentences.append(f"{one} has {state} {axis} than {other}: {size}{doubt}")
    return sentences


def figure(content: Mapping[str, Any]) -> "Figure":
    """Every run's path through its stages to its point with intervals, and the front as steps."""
    from matplotlib.figure import Figure

    drawn = Figure(figsize=(9.6, 6), layout="constrained")
    axes = drawn.add_subplot()
    methods = {name: group_of(name) for name in content["metrics"]}
    different = list(dict.fromkeys(methods.values()))
    colours = dict(zip(different, _colours(len(different)), strict=True))
    for name, metrics in content["metrics"].items():
        colour, chosen = colours[methods[name]], name in content["best"].values() or name == GOLD
        path = content["traces"][name]
        axes.plot(*zip(*path, strict=True), color=colour, linewidth=1, alpha=0.6, marker="o", markersize=3)
        x, y = (metrics[axis] for axis in AXES)
        axes.errorbar(
            x["value"],
            y["value"],
            xerr=_whiskers(x),
            yerr=_whiskers(y),
            color=colour,
            alpha=1 if chosen else 0.35,
            marker="o",
            markersize=8 if chosen else 5,
            elinewidth=1,
            label=name if chosen else None,
        )
    points = sorted((content["metrics"][name]["forgotten"]["value"], name) for name in content["front"])
    heights = [content["metrics"][name]["retained"]["value"] for _, name in points]
    steps = [0, *(x for x, _ in points)], [heights[0], *heights]
    axes.step(*steps, where="pre", color="#777777", linestyle="--", linewidth=1)
    axes.set_xlabel("forgotten: 1 - recall on known forget probes")
    axes.set_ylabel("retained: recall on known retained probes")
    axes.set_xlim(-0.03, 1.03)
    axes.set_ylim(-0.03, 1.03)
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(color="#DDDDDD", linewidth=0.8)
    axes.set_axisbelow(True)
    drawn.legend(loc="outside right upper", frameon=False)  # beside the points: the methods' best lie close together
    return drawn


def _answers(folder: Path, stage: str) -> list[Answer]:
    return unpacked(read_json(folder / "answers" / f"{stage}.json")).answers


def _scores(answers: Sequence[Answer], is_known: Sequence[bool]) -> dict[str, list[float]]:
    chosen = [answer for answer, knows in zip(answers, is_known, strict=True) if knows]
    probes = [answer.probe for answer in chosen]
    found = scores(probes, [answer.rouge_l_recall for answer in chosen])
    if not all(found.values()):
        side = "forget" if not found["forgotten"] else "retained"
        raise UserError(f"the original model answers no {side} probe, so that nothing can be compared; take others")
    stems = scores(probes, [leaked(answer.completion, answer.probe.answer) for answer in chosen])
    return found | dict(zip(STEMMED, stems.values(), strict=True))


def _facts(original: Sequence[Answer], is_known: Sequence[bool]) -> dict[str, list[str]]:
    probes = [answer.probe for answer, knows in zip(original, is_known, strict=True) if knows]
    by_axis = asked_for(probes)
    return {axis: by_axis[axis.partition("/")[0]] for axis in (*AXES, *STEMMED)}


def _intervals(one: Outcome, seed: int) -> dict[str, Metric]:
    return {axis: score_interval(values, seed, one.facts[axis]) for axis, values in one.scores.items()}


def _differences(one: Outcome, other: Outcome, seed: int) -> dict[str, Any]:
    found = {}
    for axis, values in one.scores.items():
        metric = paired_difference(values, other.scores[axis], seed, one.facts[axis])
        count = len(set(one.facts[axis]))
        found[axis] = metric.to_json() | {"facts": count, "verdict": verdict(metric, count)}
    return found


def _spans(one: Outcome) -> float:
    return one.point.forgotten * one.point.retained


def _cell(metric: Mapping[str, Any] | None, factor: float) -> str:
    if metric is None:
        return "-"
    low, high = metric["ci95"]
    return f"{factor * metric['value']:.0f} [{factor * low:.0f}, {factor * high:.0f}]"


def _whiskers(metric: Mapping[str, Any]) -> list[list[float]]:
    low, high = metric["ci95"]
    return [[max(0.0, metric["value"] - low)], [max(0.0, high - metric["value"])]]


def _colours(count: int) -> list[Any]:
    from matplotlib import colormaps

    palette = colormaps["tab10" if count <= 10 else "tab20"].colors
    return [palette[index % len(palette)] for index in range(count)]
