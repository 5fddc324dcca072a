"""What a run shows: tables on the console, heat map, curves over severity, and a grid of one face."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cluster.errors import UserError
from jobs.oodface.scenarios import GROUPS, PROCEDURAL, SCENARIOS

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from rich.table import Table

    from jobs.oodface.catalogue import Catalogue
    from jobs.oodface.run import Run

# the threshold of the clean images is what a deployed system has; a model that answers questions has none
RULES = ("fixed", "answer")
STAND_IN = "procedural stand-ins, not the paper's generators"
MARKED = "* procedural stand-ins, not the paper's"


def corrupted(content: Mapping[str, Any]) -> None:
    """The end of `corrupt` on the console."""
    work = content["work"]
    print(f"{content['rows']} images: {content['images']} faces under {content['conditions']} conditions")
    _left_out(content)
    if work:
        print(f"{work['rows_per_second']:.0f} images/s; {work['share_in_kernels']:.0%} of the time in kernels")


def evaluated(content: Mapping[str, Any]) -> None:
    """The end of `evaluate` on the console: accuracies by category, at the threshold of the clean images."""
    from rich.console import Console

    console = Console(width=None if Console().is_terminal else 130)
    console.print(table(content))
    _left_out(content)
    shown = _scenarios(content)
    if any(name in GROUPS["variations"] for name in shown):
        console.print(f"Age, expression, rotation and accessories are {STAND_IN}.")
    if "face_mask" in shown:
        console.print("Face masks are procedural too: drawn, not photographed.")


def asked(content: Mapping[str, Any]) -> None:
    """The end of `ask` on the console: accuracies, and how much of the clean images' questions was answered."""
    evaluated(content)
    for model, metrics in content["metrics"].items():
        shares = {name.removeprefix("answered/"): one["value"] for name, one in metrics.items() if _of_answers(name)}
        least = min(shares, key=shares.get)
        told = f"{model} answered {shares['clean']:.0%} of the clean pairs"
        print(told + (f", {shares[least]:.0%} under {least}" if shares[least] < shares["clean"] else ""))


def _of_answers(name: str) -> bool:
    """Whether this is the share of pairs with an answer of a single condition: answered/clean, answered/fog/3."""
    kind, _, condition = name.partition("/")
    return kind == "answered" and (condition == "clean" or condition.partition("/")[0] in SCENARIOS)


def table(content: Mapping[str, Any]) -> Table:
    """A column a model: clean accuracy, accuracy by category and under extensions, and by how much it falls."""
    from rich.markup import escape
    from rich.table import Table

    rule = _rule(content)
    told = {"fixed": "Accuracy at the fixed threshold", "answer": "Share of pairs told rightly, unanswered ones wrong"}
    shown = Table(title=f"{told[rule]}, with 95 % intervals", title_justify="left")
    shown.add_column("", no_wrap=True)
    for model in content["metrics"]:
        shown.add_column(escape(model))
    names = _rows(content, rule)
    for name in names:
        label = name.rpartition("/")[2].replace("_", " ").replace(".selected", "*")
        shown.add_row(label, *(_cell(metrics.get(f"{rule}/{name}")) for metrics in content["metrics"].values()))
    if any(name.endswith(".selected") for name in names):
        shown.caption = "* of the chosen scenarios and severities only"
    return shown


def _rows(content: Mapping[str, Any], rule: str) -> list[str]:
    metrics = max(content["metrics"].values(), key=len)
    names = [name.removeprefix(f"{rule}/") for name in metrics if name.startswith(f"{rule}/")]
    chosen = [name for name in names if name == "acc/clean" or name.startswith("acc/category/")]
    beside = {f"acc/{name}" for name in GROUPS["extensions"]}
    for wanted in (beside, {"acc/cor", "acc/var", "rce", "rve"}):
        chosen += [name for name in names if name.removesuffix(".selected") in wanted]
    return chosen


def _cell(metric: Mapping[str, Any] | None) -> str:
    if metric is None:  # a fall of a model that tells hardly any clean pair
        return "-"
    low, high = metric["ci95"]
    return f"{metric['value']:.3f} [{low:.3f}, {high:.3f}]"


def _left_out(content: Mapping[str, Any]) -> None:
    if content["no_face"]:
        print(f"no face was found in {len(content['no_face'])} images; they were taken whole")
    if content.get("several_faces"):  # reports of earlier commits have no count
        print(f"{len(content['several_faces'])} images show several faces; the largest near the middle was taken")
    dropped, left_out = content.get("pairs_dropped", 0), content.get("pairs_left_out", {})
    if dropped or any(left_out.values()):
        told = "".join(f"; {count} more for {model}" for model, count in left_out.items() if count)
        print(f"{dropped} pairs were left out, an image of which is not there or cannot be read{told}")
    if content["lost"]:
        print(f"{len(content['lost'])} images could not be read any more and were left out")


def plots(content: Mapping[str, Any], folder: Path) -> list[Path]:
    """Heat map and curves, as files."""
    place = folder / "plots"
    place.mkdir(exist_ok=True)
    written = []
    for name, figure in {"heat_map.png": heat_map(content), "severity.png": curves(content)}.items():
        if figure is not None:
            figure.savefig(place / name, dpi=150)
            written.append(place / name)
    return written


def heat_map(content: Mapping[str, Any]) -> Figure:
    """Relative fall of accuracy, models by scenarios; of face models at the threshold of the clean images."""
    import numpy as np
    from matplotlib.figure import Figure

    scenarios, models = _scenarios(content), list(content["metrics"])
    found = [[_fall(content["metrics"][model], name) for name in scenarios] for model in models]
    falls = np.array(found, dtype=float)  # None becomes NaN
    most = 100 * float(np.nanmax(falls, initial=0))
    figure = Figure((max(7, 3 + 0.42 * len(scenarios)), 2.8 + 0.4 * len(models)), layout="constrained")
    axes = figure.subplots()
    image = axes.imshow(100 * falls, cmap="magma_r", vmin=0, vmax=max(5.0, most), aspect="auto")
    axes.set_xticks(range(len(scenarios)), [_title(name) for name in scenarios], rotation=60, ha="right")
    axes.set_yticks(range(len(models)), [_as_it_is(model) for model in models])
    for row, column in np.ndindex(falls.shape):
        percent = 100 * falls[row, column]
        colour = "white" if percent >= most / 2 else "black"
        axes.text(
            column,
            row,
            "-" if np.isnan(percent) else f"{percent:.0f}",
            ha="center",
            va="center",
            color=colour,
            fontsize=8,
        )
    figure.colorbar(image, label="fall (% of clean)")
    told = {"fixed": "at the threshold of the clean images", "answer": "of pairs told rightly"}[_rule(content)]
    axes.set_title(f"Relative corruption and variation errors, mean over severities,\n{told}", fontsize=10)
    if any(name in PROCEDURAL for name in scenarios):
        figure.supxlabel(MARKED, fontsize=8)
    return figure


def curves(content: Mapping[str, Any]) -> Figure | None:
    """Accuracy over severity: corruptions and variations, a line a model, with 95 % intervals."""
    from matplotlib.figure import Figure

    rule = _rule(content)
    kinds = [kind for kind in ("cor", "var") if any(_at(content, kind))]
    if not kinds:
        return None
    figure = Figure((5 * len(kinds), 4), layout="constrained")
    panels = figure.subplots(1, len(kinds), sharey=True, squeeze=False)[0]
    label = "accuracy, threshold of the clean images" if rule == "fixed" else "share of pairs told rightly"
    titles = {"cor": "Corruptions", "var": f"Variations ({STAND_IN.partition(',')[0]})"}
    for axes, kind in zip(panels, kinds, strict=True):
        severities = _at(content, kind)
        middle = (len(content["metrics"]) - 1) / 2
        for order, (model, metrics) in enumerate(content["metrics"].items()):
            found = [_severity(metrics, rule, kind, severity) for severity in severities]
            clean = metrics[f"{rule}/acc/clean"]
            shown = [clean, *found]
            values = [one["value"] for one in shown]
            # an end may lie on the wrong side of the value by a last digit, which matplotlib refuses
            lows = [max(0.0, value - one["ci95"][0]) for value, one in zip(values, shown, strict=True)]
            highs = [max(0.0, one["ci95"][1] - value) for value, one in zip(values, shown, strict=True)]
            places = [
                place + 0.06 * (order - middle) for place in (0, *severities)
            ]  # else equal models hide each other
            axes.errorbar(places, values, yerr=(lows, highs), label=_as_it_is(model), marker="o", capsize=2)
        axes.set(title=titles[kind], xlabel="severity", ylabel=label)
        axes.set_xticks([0, *severities], ["clean", *map(str, severities)])
        axes.grid(alpha=0.3)
        axes.legend()
    return figure


def pictures(run: Run, found: Catalogue, content: Mapping[str, Any]) -> list[Path]:
    """The first readable face under every scenario and severity of the run, as a file."""
    import pyarrow.compute as pc
    import pyarrow.parquet as pq

    from jobs.oodface.pipeline import limited
    from jobs.oodface.pixels import decode
    from jobs.oodface.sources import contents
    from jobs.oodface.work import Shard

    without = {*content["no_face"], *(one["image_id"] for one in content["lost"])}
    table = pq.read_table(found.manifest.files(found.folder)[0], columns=["image_id", "path", "row", "readable"])
    for row in table.filter(pc.field("readable")).slice(0, len(without) + 1).to_pylist():
        data = next(contents([(row["path"], row["row"])]))
        if row["image_id"] in without or isinstance(data, UserError):
            continue
        try:
            pixels = limited(decode(data)[0], run.config.oodface.longest_side)
        except UserError:  # it has changed since; the shards are made
            continue
        path = run.folder / "plots" / "grid.png"
        path.parent.mkdir(exist_ok=True)
        grid(run, Shard(0, [row["image_id"]], [None], [pixels])).savefig(path, dpi=100)
        return [path]
    return []


def grid(run: Run, shard: Any) -> Figure:
    """One face, scenarios downwards and severities to the right, in two blocks."""
    from matplotlib.figure import Figure

    from jobs.oodface.faces.align import ARCFACE
    from jobs.oodface.run import work_plan
    from jobs.oodface.scenario import CLEAN
    from jobs.oodface.work import Faces

    plan = work_plan(run.config, run.conditions)
    faces = Faces(replace(plan, device="cpu"))  # the driver's machine may have nothing else
    crops = faces.aligned(shard, [ARCFACE])[ARCFACE.name]
    scenarios = list(dict.fromkeys(name for name, severity in run.conditions if severity))
    severities = sorted({severity for _, severity in run.conditions if severity})
    blocks = 2 if len(scenarios) > 5 else 1
    rows, width = math.ceil(len(scenarios) / blocks), len(severities) + 1
    foot = 0.3 if any(name in PROCEDURAL for name in scenarios) else 0.0  # rows' heights, for a line below them
    high = rows + 0.35 + foot
    figure = Figure((1.15 * (width * blocks + 0.9 * blocks), 1.15 * high))
    for at, name in enumerate(scenarios):
        block, row = divmod(at, rows)
        for column, severity in enumerate([0, *severities]):
            condition = (name, severity) if severity else CLEAN
            left = (0.95 * (block + 1) + block * width + column) / (width * blocks + 0.95 * blocks)
            size = (0.97 / (width * blocks + 0.95 * blocks), 0.97 / high)
            axes = figure.add_axes((left, (rows - 1 - row + foot) / high, *size))
            axes.imshow(faces.under(crops, shard.image_ids, *condition)[0].permute(1, 2, 0).cpu().numpy())
            axes.axis("off")
            if row == 0:
                axes.set_title(f"severity {severity}" if severity else "clean", fontsize=9)
            if column == 0:
                label = _title(name).replace(" ", "\n")
                axes.text(-0.06, 0.5, label, ha="right", va="center", transform=axes.transAxes, fontsize=9)
    if foot:
        figure.text(0.5, foot / 2 / high, MARKED, ha="center", va="center", fontsize=8)
    return figure


def _title(name: str) -> str:
    """As in the paper's table, with a mark for what is procedural."""
    return SCENARIOS[name].title + ("*" if name in PROCEDURAL else "")


def _scenarios(content: Mapping[str, Any]) -> list[str]:
    rule, metrics = _rule(content), next(iter(content["metrics"].values()))
    names = {name.removeprefix(f"{rule}/acc/").removesuffix(".selected") for name in metrics}
    return [name for name in SCENARIOS if name in names]


def _rule(content: Mapping[str, Any]) -> str:
    metrics = next(iter(content["metrics"].values()))
    return next(rule for rule in RULES if f"{rule}/acc/clean" in metrics)


def _fall(metrics: Mapping[str, Any], name: str) -> float | None:
    for rule in RULES:
        for kind in ("rce", "rve"):
            for ending in ("", ".selected"):
                if found := metrics.get(f"{rule}/{kind}/{name}{ending}"):
                    return found["value"]
    return None


def _severity(metrics: Mapping[str, Any], rule: str, kind: str, severity: int) -> Mapping[str, Any] | None:
    name = f"{rule}/acc/{kind}/severity/{severity}"
    return metrics.get(name) or metrics.get(f"{name}.selected")


def _at(content: Mapping[str, Any], kind: str) -> list[int]:
    metrics = next(iter(content["metrics"].values()))
    rule = _rule(content)
    return [severity for severity in range(1, 6) if _severity(metrics, rule, kind, severity)]


def _as_it_is(name: str) -> str:
    """A model's name for matplotlib, which takes what stands between two dollars for a formula."""
    return name.replace("$", r"\$")
