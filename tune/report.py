"""What a search found: the front, the volume that it spans trial by trial, what mattered, and what halving saved."""

from collections.abc import Mapping, Sequence
from math import prod
from typing import TYPE_CHECKING, Any

from tune.front import hypervolume, hypervolumes, nondominated
from tune.search import COMPLETE, FAILED, STOPPED, Plan, Record
from tune.space import distributions

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from rich.table import Table

IMPORTANCE_FROM = 4  # trials; with fewer nothing can be told apart
COLOURS = {COMPLETE: "#1F77B4", STOPPED: "#AAAAAA"}
FRONT_COLOUR = "#D62728"


def summary(plan: Plan, records: Sequence[Record]) -> dict[str, Any]:
    """The search's part of its report. Points are compared at equal steps: those of trials that came to their end."""
    looked = [record for record in records if record.looks and record.state in (COMPLETE, STOPPED)]
    complete = [record for record in looked if record.state == COMPLETE]
    points = [record.point(plan.objectives) for record in complete]
    default = [point for record, point in zip(complete, points, strict=True) if not record.values]
    trained, planned = sum(record.last_step for record in looked), plan.max_steps * len(looked)
    best = max(complete, key=lambda record: spanned(record.looks[-1], plan.objectives), default=None)
    return {
        "objectives": list(plan.objectives),
        "trials": [vars(record) for record in records],
        "failures": {str(record.number): record.message for record in records if record.state == FAILED},
        "front": [complete[index].number for index in nondominated(points)],
        "best": best and best.number,
        "hypervolume": {
            "all": hypervolume(points),
            "configuration_as_it_is": hypervolume(default),
            "by_trial": hypervolumes(points),
        },
        "importance": importance(plan, looked),
        "steps": {"trained": trained, "planned": planned, "saved": 1 - trained / planned if planned else 0.0},
    }


def importance(plan: Plan, looked: Sequence[Record]) -> dict[str, float]:
    """Share of each name of the space in the variance of the spanned volume at the last look (fANOVA), falling.

    Empty for few trials, and where all span the same.
    """
    import optuna

    drawn = [(record, spanned(record.looks[-1], plan.objectives)) for record in looked if record.values]
    if len(drawn) < IMPORTANCE_FROM or len({value for _, value in drawn}) == 1:
        return {}
    space = distributions(plan.space)
    study = optuna.create_study(direction="maximize")
    for record, value in drawn:
        study.add_trial(optuna.trial.create_trial(value=value, params=record.values, distributions=space))
    evaluator = optuna.importance.FanovaImportanceEvaluator(seed=plan.settings.seed)
    return dict(optuna.importance.get_param_importances(study, evaluator=evaluator))


def spanned(look: Mapping[str, float], objectives: Sequence[str]) -> float:
    """The volume between the origin and a point, which the best trial has most of."""
    return prod(look[name] for name in objectives)


def table(content: Mapping[str, Any]) -> "Table":
    """A row a trial, those of the front marked."""
    from rich import box
    from rich.table import Table

    shown = Table(title="Trials", title_justify="left", box=box.SIMPLE_HEAD, pad_edge=False)
    for name in ("trial", "step", *content["objectives"]):
        shown.add_column(name, justify="right", no_wrap=True)
    shown.add_column("")
    shown.add_column("settings")
    for trial in content["trials"]:
        last = trial["looks"][-1] if trial["looks"] else {}
        number = trial["number"]
        metrics = content["metrics"].get(str(number), {})
        marks = [trial["state"] * (trial["state"] != "complete"), "front" * (number in content["front"])]
        marks.append("best" * (number == content["best"]))
        shown.add_row(
            str(number),
            str(last.get("step", "-")),
            *(_cell(metrics.get(name)) for name in content["objectives"]),
            ", ".join(filter(None, marks)),
            ", ".join(f"{name.rpartition('.')[2]} {_value(value)}" for name, value in trial["values"].items()),
        )
    volume, steps = content["hypervolume"], content["steps"]
    shown.caption = (
        f"Trial 0 is the configuration as it is. Hypervolume from the origin: {volume['all']:.3f} of complete trials, "
        f"{volume['configuration_as_it_is']:.3f} of trial 0.\n"
        f"Steps: {steps['trained']} of {steps['planned']}, {100 * steps['saved']:.0f} % saved. "
        "Figures: last look, with 95 % intervals over its probes; the best of many trials leans to the good side."
    )
    shown.caption_justify = "left"
    return shown


def figure(content: Mapping[str, Any]) -> "Figure":
    """Left: the trials by the first two objectives; middle: hypervolume by trial; right: importance."""
    from matplotlib.figure import Figure

    drawn = Figure(figsize=(15, 4.8), layout="constrained")
    scatter, volume, bars = drawn.subplots(1, 3, width_ratios=(1.3, 1, 1))
    _scatter(scatter, content)
    heights = content["hypervolume"]["by_trial"]
    volume.step(range(1, len(heights) + 1), heights, where="post", color=FRONT_COLOUR, marker="o", markersize=4)
    volume.set_xticks(range(1, len(heights) + 1, max(1, len(heights) // 10)))
    volume.axhline(content["hypervolume"]["configuration_as_it_is"], color="#777777", linestyle="--", linewidth=1)
    volume.set_xlabel("complete trials")
    volume.set_ylabel("hypervolume (dashed: the configuration as it is)")
    volume.set_ylim(0, 1.03)
    shares = list(content["importance"].items())[::-1]
    bars.barh([name.removeprefix("rule.") for name, _ in shares], [share for _, share in shares], color="#1F77B4")
    bars.set_xlabel("importance (share of variance)")
    bars.set_xlim(0, 1.03)
    if not shares:
        bars.set_yticks([])
        bars.text(0.5, 0.5, "too few trials, or all alike", transform=bars.transAxes, ha="center", color="#777777")
    for axes in (scatter, volume, bars):
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(color="#DDDDDD", linewidth=0.8)
        axes.set_axisbelow(True)
    return drawn


def _scatter(axes: "Axes", content: Mapping[str, Any]) -> None:
    first, second = content["objectives"][:2]
    for trial in content["trials"]:
        if not trial["looks"] or trial["state"] not in COLOURS:
            continue
        path = [(look[first], look[second]) for look in trial["looks"]]
        on_front = trial["number"] in content["front"]
        colour = FRONT_COLOUR if on_front else COLOURS[trial["state"]]
        axes.plot(*zip(*path, strict=True), color=colour, linewidth=0.7, alpha=0.35)
        axes.plot(*path[-1], marker="s" if not trial["values"] else "o", color=colour)
        axes.annotate(str(trial["number"]), path[-1], xytext=(4, 4), textcoords="offset points", color=colour)
    axes.set_xlabel(f"{first} (red: front, grey: ended early, square: the configuration as it is)")
    axes.set_ylabel(second)
    axes.set_xlim(-0.03, 1.03)
    axes.set_ylim(-0.03, 1.03)


def _cell(metric: Mapping[str, Any] | None) -> str:
    if metric is None:
        return "-"
    low, high = metric["ci95"]
    return f"{metric['value']:.2f} [{low:.2f}, {high:.2f}]"


def _value(value: Any) -> str:
    return f"{value:.2g}" if isinstance(value, float) else str(value)
