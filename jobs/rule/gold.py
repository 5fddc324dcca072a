"""How near a comparison's models come to one that never saw what was to be forgotten: TOFU's two scores.

Needs TOFU's files in the data (`jobs.rule.tofu.FILES`); every model is asked on a worker, and its scores are kept.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cluster import cli, models, session
from cluster.config import Generation, Train
from cluster.generation import open_engine
from cluster.report import Metric, digest, read_json, write_json
from jobs.rule.benchmarks import LONGEST_PROMPT
from jobs.rule.config import Evaluation
from jobs.rule.job import EVALUATION_LIMIT_S, Run
from jobs.rule.tofu import FORGET_QUALITY, MODEL_UTILITY, TofuRow, forget_quality, score_tofu


@dataclass(frozen=True)
class Gold:
    """The model that never saw what was to be forgotten, and TOFU's questions where the data have any."""

    source: models.ModelSource
    rows: Mapping[str, list[TofuRow]] | None

    def identity(self) -> list[str]:
        """What pins both."""
        return [self.source.version, repr(self.rows)]


@dataclass(frozen=True)
class TofuTask:
    """Which model is asked TOFU's questions, and how."""

    model: Path
    rows: Mapping[str, list[TofuRow]]
    settings: Evaluation
    generation: Generation
    train: Train
    seed: int
    stop: tuple[str, ...] = ()


def gold_scores(
    run: Run, asked: Mapping[str, Path], gold: Gold, versions: Mapping[str, str], failures: dict[str, str]
) -> dict[str, dict[str, Metric]]:
    """`tofu/forget_quality` against `gold` and `tofu/model_utility` of each model in `asked`, and of gold its utility.

    A score is left out where the files that it needs are not there. What fails of a model that `versions` names, of
    which nothing is known but that digest of its files, stands in `failures` and does not end the rest.
    """
    if gold.rows is None:
        return {}
    everyone = {**asked, "gold": gold.source.path}
    scored: dict[str, dict[str, Any]] = {}
    for name, path in everyone.items():
        kept = name if name not in versions else f"{name}-{digest(versions[name])[:8]}"
        try:
            scored[name] = _scored(run, kept, path, gold.rows)
        except Exception as error:
            if name not in versions:
                raise
            failures[name] = cli.sentence(cli.root_cause(error))
    found: dict[str, dict[str, Metric]] = {}
    for name, one in scored.items():
        found[name] = {}
        if name != "gold" and one["ratios"]:
            found[name][FORGET_QUALITY] = forget_quality(one["ratios"], scored["gold"]["ratios"], run.config.rule.seed)
        if one["utility"] is not None:
            found[name][MODEL_UTILITY] = Metric.from_json(one["utility"])
    return found


def _scored(run: Run, name: str, model: Path, rows: Mapping[str, list[TofuRow]]) -> dict[str, Any]:
    kept = run.folder / "tofu" / f"{name}.json"
    known = read_json(kept)
    if known is None:
        rule, config = run.config.rule, run.config
        task = TofuTask(model, rows, rule.evaluation, config.generation, config.train, rule.seed, rule.stop)
        with run.phase(f"TOFU's questions to {name}"):
            known = session.on_worker(score, config, task, seconds=EVALUATION_LIMIT_S)
        write_json(known, kept)
    return known


def score(task: TofuTask) -> dict[str, Any]:
    """The truth ratios of the forget set, and the model's utility where its three sets are there, else None."""
    tokenizer = models.load_tokenizer(task.model)
    longest = min(models.context_of(task.model), LONGEST_PROMPT)
    engine = open_engine(task.model, task.generation, task.train, longest, task.seed)
    model = models.scoring_model(task.model, task.train)
    metrics, ratios = score_tofu(
        model,
        engine,
        tokenizer,
        dict(task.rows),
        max_batch_tokens=task.settings.max_batch_tokens,
        seed=task.seed,
        stop=task.stop,
    )
    utility = metrics.get(MODEL_UTILITY)
    return {"ratios": ratios, "utility": utility and utility.to_json()}
