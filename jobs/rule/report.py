"""What a RULE run shows at its end: tables, plots, samples and a model card, all from the content of report.json.

The parts of `report` that are read here:

    model         name of the base model, as the configuration gives it
    targets       names of what was unlearned
    command       the command line of the run
    data_digests  data set -> beginning of its sha256
    metrics       stage -> name -> {"value", "ci95": [low, high], "n", "seed"}; stages are the keys of STAGES
    seconds       phase -> seconds

A metric's name is KIND/MEASURE over all probes of a kind and known/KIND/MEASURE over those that the original model
answers, with KIND a `Probe.kind`, one with a type behind it (forget_aa/cloze), or an aggregate (forget, retain), and
MEASURE a key of MEASURES. Every other name (mia/auc/min_20) goes to the second table as it is.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from rich import box
from rich.table import Table

from cluster.report import write_text

STAGES = {"original": "original", "steered": "after stage 1", "unlearned": "unlearned", "gold": "never saw it"}
MEASURES = {"refusal": "refusal", "refusal_rule": "RULE refusal", "rouge_l_recall": "ROUGE-L"}
KINDS = (
    "forget",
    "forget_fb",
    "forget_qa",
    "forget_aa",
    "heldout_forget",
    "heldout_forget_fb",
    "heldout_forget_qa",
    "retain",
    "heldout_boundary",
    "heldout_boundary_fb",
    "heldout_boundary_qa",
    "neighbor",
    "neighbor_fb",
    "neighbor_qa",
    "general",
)
_WORDS = {"fb": "FB", "qa": "QA", "aa": "AA", "heldout": "held-out"}
_CAPTION = (
    "Percent with 95 % interval. Refusal: by the evaluation's own detector; RULE refusal: by the reward's.\n"
    "ROUGE-L: recall of the reference. Known: probes that the original model answers."
)


@dataclass(frozen=True)
class Row:
    """One measure over one set of probes: `scores` maps a stage to its metric and lacks the stages without one."""

    kind: str
    known: bool
    measure: str
    scores: Mapping[str, Mapping[str, Any]]

    @property
    def n(self) -> int:
        return next(iter(self.scores.values()))["n"]


def rows(report: Mapping[str, Any]) -> list[Row]:
    """The probe metrics of a report by kind, all probes before the known ones; other metrics are left out."""
    found: dict[tuple[str, bool, str], dict[str, Any]] = {}
    for stage in stages(report):
        for name, metric in report["metrics"][stage].items():
            if place := _place(name):
                found.setdefault(place, {})[stage] = metric
    order = list(MEASURES)
    ranked = sorted(found, key=lambda place: (_rank(place[0]), place[1], order.index(place[2])))
    return [Row(*place, found[place]) for place in ranked]


def stages(report: Mapping[str, Any]) -> list[str]:
    """The stages that a report has metrics of, in order."""
    return [stage for stage in STAGES if report["metrics"].get(stage)]


def label(kind: str) -> str:
    """A probe kind in words: "heldout_forget_qa" -> "held-out forget QA", "forget_aa/cloze" -> "forget AA: cloze"."""
    head, _, detail = kind.partition("/")
    words = " ".join(_WORDS.get(word, word) for word in head.split("_"))
    return f"{words}: {detail.replace('_', ' ')}" if detail else words


def table(report: Mapping[str, Any]) -> Table:
    """Refusal rates and ROUGE-L recall of every probe kind, a column a stage (80 columns; 92 wrap no label)."""
    shown = _empty_table("Probes", ["probes", "measure"], report)
    shown.columns[1].no_wrap = True
    shown.caption, shown.caption_justify = _CAPTION, "left"
    before: tuple[str, bool] | None = None
    for row in rows(report):
        if before and row.kind != before[0]:
            shown.add_section()
        first = (row.kind, row.known) != before
        name = "  known" if row.known else label(row.kind)
        shown.add_row(name if first else "", *_cells(row, report))
        before = (row.kind, row.known)
    return shown


def other_table(report: Mapping[str, Any]) -> Table | None:
    """The metrics that are not probe rates (membership inference, utility, naturalness); None if there are none."""
    others = _others(report)
    if not others:
        return None
    shown = _empty_table("Other measures", ["measure"], report)
    for cells in others:
        shown.add_row(*cells)
    return shown


def write_markdown(report: Mapping[str, Any], path: Path) -> None:
    """Write the model card that lies beside the unlearned model (README.md with YAML front matter)."""
    front = {
        "base_model": report["model"],
        "library_name": "transformers",
        "pipeline_tag": "text-generation",
        "tags": ["machine-unlearning", "rule", "rayward"],
    }
    targets = ", ".join(report["targets"])
    parts = [
        f"---\n{yaml.safe_dump(front, sort_keys=False)}---",
        f"# {report['model']} without {targets}",
        f"This model was made by {report.get('method', 'RULE')} to forget **{targets}** and "
        "to answer everything else as before. That does not prove that the weights no longer "
        "hold the facts, so test the model with attacks of your own before you rely on it.",
        "## Results",
        _markdown_table(
            ["probes", "measure", "n", *(STAGES[stage] for stage in stages(report))],
            [[_probes(row), *_cells(row, report)] for row in rows(report)],
        ),
        _CAPTION.replace("\n", " "),
    ]
    if others := _others(report):
        header = ["measure", "n", *(STAGES[stage] for stage in stages(report))]
        parts += ["## Other measures", _markdown_table(header, others)]
    digests = [[name, f"`{digest}`"] for name, digest in report["data_digests"].items()]
    parts += [
        "## How it was made",
        f"```\n{report['command']}\n```",
        _markdown_table(["data", "digest (sha256)"], digests),
        "## Loading",
        "```python\nfrom transformers import AutoModelForCausalLM, AutoTokenizer\n\n"
        'model = AutoModelForCausalLM.from_pretrained("FOLDER")\n'
        'tokenizer = AutoTokenizer.from_pretrained("FOLDER")\n```',
        "The base model's licence applies.",
    ]
    write_text("\n\n".join(parts) + "\n", path)


def _empty_table(title: str, labels: list[str], report: Mapping[str, Any]) -> Table:
    shown = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD, pad_edge=False, padding=(0, 1, 0, 0))
    for name in labels:
        shown.add_column(name)
    for name in ("n", *(STAGES[stage] for stage in stages(report))):
        shown.add_column(name, justify="right", no_wrap=True)
    return shown


def _place(name: str) -> tuple[str, bool, str] | None:
    known = name.startswith("known/")
    kind, _, measure = name.removeprefix("known/").rpartition("/")
    return (kind, known, measure) if measure in MEASURES and kind.partition("/")[0] in KINDS else None


def _rank(kind: str) -> tuple[int, str]:
    head, _, detail = kind.partition("/")
    return KINDS.index(head), detail


def _probes(row: Row) -> str:
    return f"{label(row.kind)}, known" if row.known else label(row.kind)


def _cells(row: Row, report: Mapping[str, Any]) -> list[str]:
    scores = [row.scores.get(stage) for stage in stages(report)]
    return [MEASURES[row.measure], str(row.n), *(_percent(score) for score in scores)]


def _percent(metric: Mapping[str, Any] | None) -> str:
    if metric is None:
        return "-"
    low, high = metric["ci95"]
    return f"{100 * metric['value']:.0f} [{100 * low:.0f}, {100 * high:.0f}]"


def _others(report: Mapping[str, Any]) -> list[list[str]]:
    names = sorted({name for stage in stages(report) for name in report["metrics"][stage] if not _place(name)})
    lines = []
    for name in names:
        scores = [report["metrics"][stage].get(name) for stage in stages(report)]
        n = next(score["n"] for score in scores if score)
        lines.append([name, str(n), *(_plain(score) for score in scores)])
    return lines


def _plain(metric: Mapping[str, Any] | None) -> str:
    if metric is None:
        return "-"
    low, high = metric["ci95"]
    return f"{metric['value']:.3g} [{low:.3g}, {high:.3g}]"


def _markdown_table(header: list[str], lines: list[list[str]]) -> str:
    cells = [header, ["---"] * len(header), *lines]
    return "\n".join(f"| {' | '.join(line)} |" for line in cells)


def step_seconds(history: Iterable[Mapping[str, Any]]) -> dict[str, float]:
    """Mean seconds of a stage-2 step by part (rollout, reward, reference, update, sync); `step` is the whole."""
    parts: dict[str, list[float]] = {}
    for row in history:
        if row["stage"] != "rebo":
            continue
        for part, seconds in row.get("seconds", {}).items():
            parts.setdefault(part, []).append(seconds)
    return {part: round(sum(values) / len(values), 3) for part, values in parts.items()}
