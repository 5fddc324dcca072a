"""The pictures of a RULE run: training curves, bars before and after, time by phase (PNG, 150 dpi)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jobs.rule.report import STAGES, Row, label, rows, stages

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Okabe and Ito's palette, which people with any colour blindness tell apart.
BLUE, ORANGE, GREEN, VERMILION, GREY = "#0072B2", "#E69F00", "#009E73", "#D55E00", "#9A9A9A"
STAGE_COLOURS = {"original": GREY, "steered": ORANGE, "unlearned": BLUE, "gold": GREEN}
STEP_PARTS = ("rollout", "reward", "reference", "update", "sync")

History = Sequence[Mapping[str, Any]]

# Stage of the history, title, and what each panel draws: key -> (name in the legend, colour).
_PANELS: tuple[tuple[str, str, dict[str, tuple[str, str]]], ...] = (
    ("unlearning", "Loss", {"loss": ("", BLUE)}),
    ("steering", "Stage 1: loss", {"loss": ("", BLUE)}),
    (
        "steering",
        "Stage 1: share of sampled refusals",
        {"refusal_forget": ("forget", VERMILION), "refusal_boundary": ("boundary", BLUE)},
    ),
    ("rebo", "Stage 2: mean reward", {"reward": ("", BLUE)}),
    (
        "rebo",
        "Stage 2: share of sampled refusals",
        {"refusal_forget": ("forget", VERMILION), "refusal_boundary": ("boundary", BLUE)},
    ),
    ("rebo", "Stage 2: KL to the reference", {"kl": ("", GREEN)}),
    ("rebo", "Stage 2: share of groups without advantage", {"zero_advantage_groups": ("", ORANGE)}),
)
_SHARES = {"refusal_forget", "refusal_boundary", "zero_advantage_groups"}


def plots(report: Mapping[str, Any], history: History, folder: Path) -> list[Path]:
    """Draw what the report and the training history hold; returns the written files.

    `history` has one mapping a logged step: "stage" ("steering", "rebo", or "unlearning" of another method), "step",
    any of "reward", "kl", "loss", "zero_advantage_groups", "refusal_forget", "refusal_boundary" (shares from 0 to 1).
    `report` is as in `jobs.rule.report`. A picture without data is not written.
    """
    folder.mkdir(parents=True, exist_ok=True)
    drawn = {
        "training.png": training_curves(history),
        "before_after.png": before_after(report),
        "seconds.png": phase_seconds(report),
    }
    written = []
    for name, figure in drawn.items():
        if figure is not None:
            figure.savefig(folder / name, dpi=150)
            written.append(folder / name)
    return written


def training_curves(history: History) -> Figure | None:
    """One panel a curve of either stage; curves that were never logged leave no panel."""
    panels = [panel for panel in _PANELS if any(_series(history, panel[0], key) for key in panel[2])]
    if not panels:
        return None
    columns = min(len(panels), 2)
    lines = -(-len(panels) // columns)
    figure = _figure(5.2 * columns, 2.9 * lines)
    for place, (stage, title, curves) in enumerate(panels, start=1):
        axes = figure.add_subplot(lines, columns, place)
        for key, (name, colour) in curves.items():
            points = _series(history, stage, key)
            steps, values = [step for step, _ in points], [value for _, value in points]
            axes.plot(steps, values, color=colour, alpha=0.35, linewidth=1, marker=".", markersize=4)
            axes.plot(steps, _smoothed(values), color=colour, linewidth=2, label=name)
        _tidy(axes, title)
        axes.set_xlabel("step")
        axes.xaxis.get_major_locator().set_params(integer=True)
        if _SHARES & curves.keys():
            axes.set_ylim(-0.03, 1.03)
        if len(curves) > 1:
            axes.legend(frameon=False)
    return figure


def before_after(report: Mapping[str, Any]) -> Figure | None:
    """Bars of refusal and of recall by probe kind, a bar a stage, with 95 % intervals; all and known probes apart."""
    wanted = {"refusal": "Refusal rate", "rouge_l_recall": "ROUGE-L recall"}
    chosen = [row for row in rows(report) if row.measure in wanted and "/" not in row.kind]
    sets = [known for known in (False, True) if any(row.known == known for row in chosen)]
    if not chosen:
        return None
    kinds = max(len({row.kind for row in chosen if row.known == known}) for known in sets)
    figure = _figure(max(4.5, 1.2 + 0.62 * kinds) * len(sets), 7.6)
    for line, (measure, title) in enumerate(wanted.items()):
        for column, known in enumerate(sets):
            axes = figure.add_subplot(2, len(sets), 1 + line * len(sets) + column)
            _bars(axes, [row for row in chosen if (row.measure, row.known) == (measure, known)], stages(report))
            _tidy(axes, f"{title}, {'known' if known else 'all'} probes")
    handles, names = figure.axes[0].get_legend_handles_labels()
    figure.legend(handles, names, loc="outside upper center", ncols=len(names), frameon=False)
    return figure


def phase_seconds(report: Mapping[str, Any]) -> Figure | None:
    """Horizontal bars: seconds of each phase of the run, and mean seconds of each part of a stage 2 step."""
    parts = {part: seconds for part, seconds in report.get("step_seconds", {}).items() if part in STEP_PARTS}
    charts = [
        (title, values)
        for title, values in (("Seconds by phase", report["seconds"]), ("Mean seconds of a stage 2 step", parts))
        if values
    ]
    if not charts:
        return None
    height = 1.1 + 0.38 * max(len(values) for _, values in charts)
    figure = _figure(5.2 * len(charts), height)
    for place, (title, values) in enumerate(charts, start=1):
        axes = figure.add_subplot(1, len(charts), place)
        bars = axes.barh([name.replace("_", " ") for name in values], list(values.values()), color=BLUE, height=0.65)
        axes.bar_label(bars, labels=[_seconds(value) for value in values.values()], padding=4)
        axes.invert_yaxis()
        axes.margins(x=0.18)
        _tidy(axes, title)
        axes.tick_params(axis="y", length=0)
        axes.grid(visible=False)
        axes.xaxis.set_visible(False)
        axes.spines["bottom"].set_visible(False)
    return figure


def _bars(axes: Axes, chosen: list[Row], shown: list[str]) -> None:
    width = 0.8 / len(shown)
    for index, stage in enumerate(shown):
        places = [place for place, row in enumerate(chosen) if stage in row.scores]
        scores = [chosen[place].scores[stage] for place in places]
        values = [score["value"] for score in scores]
        below = [max(0.0, value - score["ci95"][0]) for value, score in zip(values, scores, strict=True)]
        above = [max(0.0, score["ci95"][1] - value) for value, score in zip(values, scores, strict=True)]
        axes.bar(
            [place + (index - (len(shown) - 1) / 2) * width for place in places],
            values,
            width * 0.92,
            yerr=[below, above],
            color=STAGE_COLOURS[stage],
            error_kw={"elinewidth": 1, "capsize": 2, "ecolor": "#333333"},
            label=STAGES[stage],
        )
    names = [f"{label(row.kind)} ({row.n})" for row in chosen]
    axes.set_xticks(range(len(chosen)), names, rotation=35, ha="right", rotation_mode="anchor")
    axes.tick_params(axis="x", length=0)
    axes.set_ylim(0, 1.16)
    forget = sum("forget" in row.kind for row in chosen)
    if 0 < forget < len(chosen):
        axes.axvline(forget - 0.5, color="#555555", linewidth=1, linestyle="--")
        axes.text(forget - 0.6, 1.08, "to forget", ha="right", color="#555555")
        axes.text(forget - 0.4, 1.08, "to keep", ha="left", color="#555555")


def _series(history: History, stage: str, key: str) -> list[tuple[int, float]]:
    return [(entry["step"], entry[key]) for entry in history if entry["stage"] == stage and entry.get(key) is not None]


def _smoothed(values: list[float]) -> list[float]:
    """Centred mean of up to seven values: no lag behind the points, and a window that narrows towards both ends."""
    smooth = []
    for place in range(len(values)):
        reach = min(3, place, len(values) - 1 - place)
        window = values[place - reach : place + reach + 1]
        smooth.append(sum(window) / len(window))
    return smooth


def _seconds(value: float) -> str:
    if value < 1:
        return f"{value:.2g} s"
    return f"{value:.1f} s" if value < 100 else f"{value / 60:.1f} min"


def _figure(width: float, height: float) -> Figure:
    # Without pyplot there is no global state, no window, and nothing to close.
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    figure.get_layout_engine().set(w_pad=0.1, h_pad=0.1)
    return figure


def _tidy(axes: Axes, title: str) -> None:
    axes.set_title(title, loc="left", fontsize=11)
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis="y", color="#DDDDDD", linewidth=0.8)
    axes.set_axisbelow(True)
