"""What a search found: the front, the volume that it spans trial by trial, what mattered, and what halving saved."""

from collections.abc import Mapping, Sequence
from math import prod
from typing import TYPE_CHECKING, Any

from jobs.scoring.front import hypervolume, hypervolumes, nondominated
from tune.records import COMPLETE, FAILED, STOPPED, Plan, Record
from tune.space import distributions

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from rich.table import Table

IMPORTANCE_FROM = 4  # trials; with fewer nothing can be told apart
COLOURS = {COMPLETE: "#1F77B4", STOPPED: "#AAAAAA"}
FRONT_COLOUR = "#D62728"


def summary(plan: Plan, records: Sequence[Record]) -> dict[str, Any]:
    """The search's part of its report.

    The front is of looks, not of trials: a training's first steps do not depend on how many it has (its learning rate
    is constant), so what a trial had reached at a look is what its settings with so many steps reach.
    """
    looked = [record for record in records if record.looks and record.state in (COMPLETE, STOPPED)]
    steps = {record.number: plan.trained(plan.trial_folder(record.number)) for record in records}
    paths = [[look for look in record.looks if look["step"] % plan.updates_per_step == 0] for record in looked]
    reached = [[_point(look, plan.objectives) for look in path] for path in paths]
    places = [(record, look) for record, path in zip(looked, paths, strict=True) for look in path]
    places.sort(key=lambda place: place[1]["step"])  # of equals the one with the fewest steps is taken
    points = [_point(look, plan.objectives) for _, look in places]
    as_it_is = next((path for record, path in zip(looked, reached, strict=True) if not record.values), []) or None
    trained, planned = sum(steps[record.number] for record in looked), plan.max_steps * len(looked)
    best = max(places, key=lambda place: spanned(place[1], plan.objectives), default=None)
    return {
        "objectives": list(plan.objectives),
        "trials": [vars(record) | {"trained": steps[record.number]} for record in records],
        "failures": {str(record.number): record.message for record in records if record.state == FAILED},
        "front": sorted(
            (_place(*places[index]) for index in nondominated(points)),
            key=lambda place: (place["trial"], place["step"]),
        ),
        "best": best and _place(*best),
        "hypervolume": {
            "all": hypervolume(points),
            "configuration_as_it_is": as_it_is and hypervolume(as_it_is[-1:]),
            "path_of_configuration_as_it_is": as_it_is and hypervolume(as_it_is),
            "by_trial": hypervolumes(reached),
        },
        "importance": importance(plan, looked),
        "steps": {
            "trained": trained,
            "planned": planned,
            "saved": 1 - trained / planned if planned else 0.0,
            "of_failed_trials": sum(steps[record.number] for record in records if record.state == FAILED),
        },
    }


def place_name(place: Mapping[str, int]) -> str:
    """TRIAL@STEP, as `metrics` has it."""
    return f"{place['trial']}@{place['step']}"


def _place(record: Record, look: Mapping[str, float]) -> dict[str, int]:
    return {"trial": record.number, "step": int(look["step"])}


def _point(look: Mapping[str, float], objectives: Sequence[str]) -> tuple[float, ...]:
    return tuple(look[name] for name in objectives)


def importance(plan: Plan, looked: Sequence[Record]) -> dict[str, float]:
    """Share of each name of the space in the variance of the spanned volume (fANOVA), falling.

    Of drawn trials at the last step that all were looked at, for else it would tell who was ended early. Empty for few
    trials, without such a step, and where all span the same.
    """
    import optuna

    by_step = {record.number: {look["step"]: look for look in record.looks} for record in looked if record.values}
    common = max(set.intersection(*map(set, by_step.values())) if by_step else (), default=None)
    if common is None:
        return {}
    drawn = [(record, spanned(by_step[record.number][common], plan.objectives)) for record in looked if record.values]
    if len(drawn) < IMPORTANCE_FROM or len({value for _, value in drawn}) == 1:
        return {}
    space = distributions(plan.space)
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    study = optuna.create_study(direction="maximize")
    for record, value in drawn:
        study.add_trial(optuna.trial.create_trial(value=value, params=record.values, distributions=space))
    evaluator = optuna.importance.FanovaImportanceEvaluator(seed=plan.settings.seed)
    return dict(optuna.importance.get_param_importances(study, evaluator=evaluator))


def spanned(look: Mapping[str, float], objectives: Sequence[str]) -> float:
    """The volume between the origin and a point, which the best trial has most of."""
    return prod(look[name] for name in objectives)


def table(content: Mapping[str, Any]) -> "Table":
    """A row for each look on the front, then one for each other trial at its last look."""
    from rich import box
    from rich.table import Table

    shown = Table(title="Front, and where the other trials ended", title_justify="left", box=box.SIMPLE_HEAD)
    for name in ("trial", "step", *content["objectives"]):
        shown.add_column(name, justify="right", no_wrap=True)
    shown.add_column("")
    shown.add_column("settings")
    trials = {trial["number"]: trial for trial in content["trials"]}
    for place in content["front"]:
        mark = "front, best" if place == content["best"] else "front"
        _row(shown, content, trials[place["trial"]], place["step"], mark, place_name(place))
    shown.add_section()
    on_front = {place["trial"] for place in content["front"]}
    for number, trial in trials.items():
        if number not in on_front:
            step = trial["looks"][-1]["step"] if trial["looks"] else "-"
            _row(shown, content, trial, step, trial["state"], str(number))
    volume, steps = content["hypervolume"], content["steps"]
    shown.caption = (
        f"Trial 0 is the configuration as it is. {_volumes(volume)}\n"
        f"Steps: {steps['trained']} of {steps['planned']}, {100 * steps['saved']:.0f} % saved; not counted: "
        f"{steps['of_failed_trials']} of trials that failed, stage 1, and what a resume repeats.\n"
        "Figures have 95 % intervals over the facts that are asked for; the best of many looks leans to the good side."
    )
    shown.caption_justify = "left"
    return shown


def _volumes(volume: Mapping[str, Any]) -> str:
    alone = "of trial 0 there is none."
    if volume["configuration_as_it_is"] is not None:
        alone = (
            f"{volume['path_of_configuration_as_it_is']:.3f} of trial 0's, "
            f"{volume['configuration_as_it_is']:.3f} of its last."
        )
    return f"Hypervolume from the origin: {volume['all']:.3f} of all looks, {alone}"


def _row(shown: "Table", content: Mapping[str, Any], trial: Mapping[str, Any], step: Any, mark: str, name: str) -> None:
    from rich.markup import escape

    metrics = content["metrics"].get(name, {})
    shown.add_row(
        str(trial["number"]),
        str(step),
        *(_cell(metrics.get(objective)) for objective in content["objectives"]),
        mark,
        escape(", ".join(f"{key.rpartition('.')[2]} {_value(value)}" for key, value in trial["values"].items())),
    )


def figure(content: Mapping[str, Any]) -> "Figure":
    """Left: the trials' paths by the first two objectives; middle: hypervolume by trial; right: importance."""
    from matplotlib.figure import Figure

    drawn = Figure(figsize=(15, 4.8), layout="constrained")
    scatter, volume, bars = drawn.subplots(1, 3, width_ratios=(1.3, 1, 1))
    _scatter(scatter, content)
    heights = content["hypervolume"]["by_trial"]
    volume.step(range(1, len(heights) + 1), heights, where="post", color=FRONT_COLOUR, marker="o", markersize=4)
    volume.set_xticks(range(1, len(heights) + 1, max(1, len(heights) // 10)))
    if content["hypervolume"]["configuration_as_it_is"] is not None:
        volume.axhline(content["hypervolume"]["configuration_as_it_is"], color="#777777", linestyle="--", linewidth=1)
    volume.set_xlabel("trials that were looked at")
    volume.set_ylabel("hypervolume (dashed: end of trial 0)")
    volume.set_ylim(0, 1.03)
    shares = list(content["importance"].items())[::-1]
    bars.barh([name.removeprefix("rule.") for name, _ in shares], [share for _, share in shares], color="#1F77B4")
    bars.set_xlabel("importance at equal steps (share of variance)")
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
        colour = COLOURS[trial["state"]]
        axes.plot(*zip(*path, strict=True), color=colour, linewidth=0.7, alpha=0.35)
        axes.plot(*path[-1], marker="s" if not trial["values"] else "o", color=colour)
        axes.annotate(str(trial["number"]), path[-1], xytext=(4, 4), textcoords="offset points", color=colour)
    looks = {(trial["number"], look["step"]): look for trial in content["trials"] for look in trial["looks"]}
    front = [looks[place["trial"], place["step"]] for place in content["front"]]
    rings = {"marker": "o", "markersize": 9, "markerfacecolor": "none", "linestyle": "none"}
    axes.plot([look[first] for look in front], [look[second] for look in front], color=FRONT_COLOUR, **rings)
    axes.set_xlabel(f"{first} (rings: front; grey: ended early; square: trial 0)")
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
