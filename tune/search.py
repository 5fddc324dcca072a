"""A search over one job with Ray Tune: Optuna proposes, halving ends what falls behind, every trial leaves a record.

After `kill -9` the next driver tells Optuna and the rungs what the records say, and starts what was running again under
its number.
"""

import os
import random
import shutil
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from ray import tune
from ray.tune.integration.ray_train import TuneReportCallback
from ray.tune.search.optuna import OptunaSearch

from cluster.cli import root_cause, sentence
from cluster.errors import TryAgain
from cluster.report import read_json, write_json
from tune.halving import Halving, Rungs
from tune.records import COMPLETE, FAILED, RUNNING, STOPPED, Plan, Record, recorded
from tune.space import Values, distributions, drawn

# Ours are the only lines, records and handlers: Tune's own would print tables, write logs and swallow Ctrl-C.
ENVIRONMENT = {
    "TUNE_DISABLE_AUTO_CALLBACK_LOGGERS": "1",
    "TUNE_DISABLE_SIGINT_HANDLER": "1",
    "RAY_AIR_NEW_OUTPUT": "0",
}
STUDY = "search"
STARTUP_SHARE = 4  # a trial in so many is drawn at random before Optuna's model of the space is asked
REDRAWS = 1000  # at random, of a proposal that was tried before


def search(plan: Plan, environment: Mapping[str, str]) -> list[Record]:
    """Runs what is not on record as ended; returns all records.

    Args:
        environment: variables of the trials' processes; they may be secret, and are not written anywhere.
    """
    before = recorded(plan.folder)
    ended = [record for record in before if record.state != RUNNING]
    waiting = [record for record in before if record.state == RUNNING]
    missing = max(plan.settings.trials - len(ended), len(waiting))
    if missing > 0:
        os.environ.update(ENVIRONMENT)
        grace = min(plan.settings.grace_steps, plan.max_steps)
        rungs = Rungs(grace, plan.settings.reduction_factor, plan.max_steps)
        keeper = Keeper(plan, waiting)
        trial = tune.with_parameters(_trainable(plan), environment=dict(environment))
        tuner = tune.Tuner(
            tune.with_resources(trial, {"memory": 1_000_000}),  # of the CPUs none: they are its training's
            tune_config=tune.TuneConfig(
                search_alg=Proposals(plan, ended, waiting, keeper),
                scheduler=Halving(plan.objectives, rungs, {record.number: record.looks for record in before}),
                num_samples=missing,
                max_concurrent_trials=plan.slots,
            ),
            run_config=tune.RunConfig(
                name="tune", storage_path=str(plan.folder / "ray"), callbacks=[keeper], verbose=0
            ),
        )
        try:
            tuner.fit()
        finally:
            shutil.rmtree(plan.folder / "ray", ignore_errors=True)  # Tune's own state, which nothing reads again
    return recorded(plan.folder)


class Proposals(OptunaSearch):
    """Optuna's proposals, numbered; the configuration as it is comes first, then what a killed driver left running."""

    def __init__(self, plan: Plan, ended: Sequence[Record], waiting: Sequence[Record], keeper: "Keeper") -> None:
        import optuna

        optuna.logging.set_verbosity(optuna.logging.WARNING)
        space, trials = distributions(plan.space), plan.settings.trials
        storage = optuna.storages.InMemoryStorage()
        sampler = optuna.samplers.TPESampler(
            # a search that goes on must not draw what it drew before
            seed=plan.settings.seed + len(ended) + len(waiting),
            n_startup_trials=max(2, trials // STARTUP_SHARE),
            multivariate=True,
            constant_liar=True,
        )
        directions = ["max"] * len(plan.objectives)
        super().__init__(
            space,
            metric=list(plan.objectives),
            mode=directions,
            sampler=sampler,
            storage=storage,
            study_name=STUDY,
        )
        for record in ended:
            if record.values and record.looks and record.state != FAILED:
                self._ot_study.add_trial(
                    optuna.trial.create_trial(
                        values=record.point(plan.objectives), params=record.values, distributions=space
                    )
                )
        self.waiting = [(record.number, record.values) for record in waiting]
        self.known = {record.number for record in (*ended, *waiting)}
        self.next = max(self.known, default=0) + 1
        if 0 not in self.known:
            self.waiting.insert(0, (0, {}))
        # the configuration as it is among them, for a space may hold it as well
        self.tried = {plan.resolved(values) for values in ({}, *(record.values for record in (*ended, *waiting)))}
        self.random = random.Random(plan.settings.seed + len(ended) + len(waiting))
        self.as_it_is: set[str] = set()
        self.plan, self.keeper = plan, keeper

    def suggest(self, trial_id: str) -> dict[str, Any] | None:
        """The next trial: {"number", "values"}."""
        if self.keeper.waits:
            return self.FINISHED
        if self.waiting:
            number, values = self.waiting.pop(0)
            if values:
                self._ot_study.enqueue_trial(values)
        else:
            number, values, self.next = self.next, None, self.next + 1
        if number not in self.known:  # a folder without a record is of a trial that someone took out
            shutil.rmtree(self.plan.trial_folder(number), ignore_errors=True)
        if values == {}:
            self.as_it_is.add(trial_id)
            return {"number": number, "values": {}}
        return {"number": number, "values": super().suggest(trial_id) if values else self._new(trial_id)}

    def _new(self, trial_id: str) -> Values:
        """A proposal that was not tried: a trial is seeded, so the same values would give the same figures."""
        import optuna

        values = super().suggest(trial_id)
        for _ in range(REDRAWS):
            if self.plan.resolved(values) not in self.tried:
                break
            # Optuna's model of a small space would propose its favourite again and again
            self._ot_study.tell(self._ot_trials.pop(trial_id), state=optuna.trial.TrialState.FAIL)
            self._ot_study.enqueue_trial(drawn(self.plan.space, self.random))
            values = super().suggest(trial_id)
        self.tried.add(self.plan.resolved(values))
        return values

    def on_trial_complete(self, trial_id: str, result: dict | None = None, error: bool = False) -> None:
        """Told by Tune."""
        if trial_id not in self.as_it_is:
            super().on_trial_complete(trial_id, result, error)


class Keeper(tune.Callback):
    """Writes the records, and a line for each look and each end.

    A trial that found no room (on the cluster, on a disk, at the tracking store) stays on record as running, for the
    next driver; `waits` says that there was one.
    """

    def __init__(self, plan: Plan, waiting: Sequence[Record] = ()) -> None:
        self.plan = plan
        self.waiting = {record.number: record for record in waiting}
        self.records: dict[str, Record] = {}
        self.before: dict[str, float] = {}
        self.waits = False

    def on_trial_start(self, iteration: int, trials: list, trial: Any, **_: Any) -> None:
        """Told by Tune."""
        number = trial.config["number"]
        record = self.waiting.pop(number, None) or Record(number, dict(trial.config["values"]))
        record.message = ""
        _failure(self.plan, number).unlink(missing_ok=True)  # of an earlier try
        self.records[trial.trial_id] = record
        self.before[trial.trial_id] = record.seconds
        self.plan.keep(record)
        chosen = ", ".join(f"{name} {_shown(value)}" for name, value in record.values.items())
        print(f"trial {record.number}: {chosen or 'the configuration as it is'}", flush=True)

    def on_trial_result(self, iteration: int, trials: list, trial: Any, result: dict, **_: Any) -> None:
        """Told by Tune."""
        record = self.records[trial.trial_id]
        record.seconds = round(self.before[trial.trial_id] + result["time_total_s"], 1)
        look = {name: result[name] for name in ("step", *self.plan.objectives)}
        if record.last_step < look["step"]:
            record.looks.append(look)
            figures = "  ".join(f"{name} {look[name]:.2f}" for name in self.plan.objectives)
            print(f"trial {record.number} step {look['step']}/{self.plan.max_steps}  {figures}", flush=True)
        self.plan.keep(record)

    def on_trial_complete(self, iteration: int, trials: list, trial: Any, **_: Any) -> None:
        """Told by Tune, of a trial that returned and of one that halving ended."""
        record = self.records[trial.trial_id]
        returned = bool((trial.last_result or {}).get("returned"))
        self._end(record, COMPLETE if returned or record.last_step >= self.plan.max_steps else STOPPED)

    def on_trial_error(self, iteration: int, trials: list, trial: Any, **_: Any) -> None:
        """Told by Tune."""
        if trial.trial_id not in self.records:  # it failed before it started
            self.on_trial_start(iteration, trials, trial)
        record = self.records[trial.trial_id]
        told = read_json(_failure(self.plan, record.number))
        record.message = told["message"] if told else "its process died"
        if told and told.get("try_again"):
            self.waits = True
            self.plan.keep(record)
            print(f"trial {record.number} waits for another time: {record.message}", flush=True)
        else:
            self._end(record, FAILED)

    def _end(self, record: Record, state: str) -> None:
        record.state = state
        self.plan.keep(record)
        self.plan.ended(record, self.plan.trial_folder(record.number))
        print(f"trial {record.number} {state}{': ' * bool(record.message)}{record.message}", flush=True)


class Reports(TuneReportCallback):
    """Hands the looks of a training on to Tune; what else workers report (a saved checkpoint) is not for it."""

    def __init__(self, objectives: Sequence[str]) -> None:
        super().__init__()
        self.objectives = tuple(objectives)

    def after_report(self, run_context: Any, metrics: list[dict[str, Any]], checkpoint: Any) -> None:
        """Told by Ray Train."""
        if all(name in metrics[0] for name in self.objectives):
            super().after_report(run_context, [metrics[0]], None)


def _trainable(plan: Plan) -> Callable[..., dict[str, Any]]:
    def trial(config: dict[str, Any], environment: Mapping[str, str]) -> dict[str, Any]:
        number = config["number"]
        os.environ.update(environment)
        try:
            look = plan.run(config["values"], plan.trial_folder(number), [Reports(plan.objectives)])
        except Exception as error:
            cause = root_cause(error)
            write_json({"message": sentence(cause), "try_again": isinstance(cause, TryAgain)}, _failure(plan, number))
            raise
        return look | {"returned": True}

    return trial


def _failure(plan: Plan, number: int) -> Path:
    return plan.folder / "trials" / f"{number:03d}-failure.json"


def _shown(value: Any) -> str:
    return f"{value:.3g}" if isinstance(value, float) else str(value)
