"""`python -m jobs.rule compare`: the same target unlearned by several methods, and what each trades for what.

Every method is an ordinary run in a process of its own, as many at once as the cluster has room for. They share the
original's answers and stage 1. The same command again continues, and takes the finished ones as they are; a method that
fails is recorded and does not end the others.
"""

import ctypes
import math
import os
import re
import signal
import subprocess
import sys
import threading
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from cluster import models, runs, session
from cluster.config import ENVIRONMENT_PREFIX, STORAGE_VARIABLE
from cluster.errors import JobFailure, UserError, paths_named
from cluster.memory import GIB
from cluster.report import digest, read_json
from jobs.rule import costs, job, methods, stages, tradeoff
from jobs.rule.config import RuleConfig
from jobs.rule.data import data_folder
from jobs.rule.evaluate import Examined, check_lengths, score
from jobs.rule.gold import Gold, gold_scores
from jobs.rule.in_context import in_form
from jobs.rule.tofu import load_tofu

PROGRESS = re.compile(r"step \d+/\d+|evaluation[ :]|error: ")
WORKER = re.compile(r"^\x1b\[\d+m\([^)]*\)\x1b\[0m ")  # how Ray begins a line of a worker
END_GRACE_S = 60
PR_SET_PDEATHSIG = 1  # linux/prctl.h
_PRCTL = ctypes.CDLL(None).prctl  # found now: after a fork nothing may be loaded


@dataclass(frozen=True)
class Entry:
    """A method, with a learning rate of its own or the configuration's."""

    method: str
    learning_rate: float | None = None

    @property
    def name(self) -> str:
        """METHOD or METHOD@LEARNING_RATE, as 2e-6."""
        return self.method if self.learning_rate is None else f"{self.method}@{self.rate}"

    @property
    def rate(self) -> str:
        """The learning rate as people write it, without zeros in the exponent."""
        return re.sub(r"e([+-])0+(\d)", r"e\1\2", str(self.learning_rate))

    def applied(self, config: RuleConfig) -> RuleConfig:
        """The configuration of its run."""
        rule = config.rule.model_copy(update={"method": self.method})
        if self.learning_rate is not None:
            part = {methods.RULE: "rebo", methods.STEERING_ONLY: "steering"}.get(self.method, "baseline")
            settings = getattr(rule, part).model_copy(update={"learning_rate": self.learning_rate})
            rule = rule.model_copy(update={part: settings})
        return config.model_copy(update={"rule": rule})


def entries(text: str) -> list[Entry]:
    """Entries of a list such as "RULE,NPO@2e-6,NPO@5e-6".

    Raises:
        UserError: an unknown method (the nearest is named), a learning rate that is none, an entry twice.
    """
    found: list[Entry] = []
    for part in text.split(","):
        method, at, number = part.strip().partition("@")
        methods.find(method)
        try:
            rate = float(number) if at else None
        except ValueError:
            rate = 0.0
        if rate is not None and not 0 < rate < math.inf:
            raise UserError(f"--methods {part.strip()}: '{number}' is no learning rate; write METHOD or METHOD@NUMBER")
        if rate is not None and method == methods.PROMPT_ONLY:
            raise UserError(f"--methods {part.strip()}: {method} trains nothing and takes no learning rate")
        entry = Entry(method, rate)
        if entry in found:
            raise UserError(f"--methods names {entry.name} twice; name each once")
        found.append(entry)
    return found


class Processes:
    """The runs of this comparison; once it ends, those that still run are ended and none starts any more."""

    def __init__(self) -> None:
        self._running: list[subprocess.Popen] = []
        self._turn = threading.Lock()
        self._ended = False

    def start(self, command: list[str], environment: dict[str, str]) -> subprocess.Popen:
        """Starts a run whose two outputs are one stream of lines.

        Raises:
            JobFailure: the comparison has ended.
        """
        with self._turn:
            if self._ended:
                raise JobFailure("the comparison was ended")
            process = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                encoding="utf-8",
                errors="replace",
                env=environment,
                start_new_session=True,
                preexec_fn=_end_with_parent,
            )
            self._running.append(process)
        return process

    def end(self) -> None:
        """As on Ctrl-C: each run frees its workers and can be continued."""
        with self._turn:
            self._ended = True
            left = [process for process in self._running if process.poll() is None]
        for process in left:
            process.terminate()
        for process in left:
            try:
                process.wait(END_GRACE_S)
            except subprocess.TimeoutExpired:
                process.kill()


def _end_with_parent() -> None:
    # A killed driver cannot end its runs, and they would hold their folders against the next one.
    _PRCTL(PR_SET_PDEATHSIG, signal.SIGTERM)


def compare(
    config: RuleConfig,
    chosen: Sequence[Entry],
    out: Path | None,
    fresh: bool,
    command: str,
    gold: Path | None = None,
) -> Path:
    """Runs what has no finished run yet, and writes the comparison; returns the path of its report.json.

    `gold`, a model that never saw what was to be forgotten, is asked the same and gets a row of its own.

    Raises:
        UserError: what `jobs.rule.job.main` would refuse of any entry, or an entry that was trained on other texts,
            before any starts.
        JobFailure: no method finished.
    """
    with paths_named():
        run, own, pinned = _prepared(config, chosen, out, command, gold)
        for prepared in own.values():  # reads the corpora also where a method does not
            costs.data_used(prepared)
        job.claim(run, fresh)
        _require_same_texts(own)
    run.shared = run.folder / "shared"
    known = read_json(run.folder / "report.json")
    if known is not None and not known["failures"] and known["methods"] == [entry.name for entry in chosen]:
        print(f"this comparison is finished (--fresh starts it over): {run.folder}")
        show(known)
        return run.folder / "report.json"
    with (
        job.exclusively(run.folder),
        session.connected(config),
        job.tracked(run, "rule-compare") as tracker,
    ):
        original = job.evaluated(run, "original", run.source.path)
        threshold = config.rule.evaluation.known_threshold
        tradeoff.require_known(original.answers, threshold)
        failures = _train(run, own)
        finished = [entry for entry in chosen if entry.name not in failures]
        if not finished:
            raise JobFailure(f"no method finished; the first: {next(iter(failures.values()))}")
        outcomes = [
            tradeoff.outcome(
                entry.name,
                entry.method,
                own[entry].folder,
                threshold,
                costs.spent(own[entry]),
                costs.data_used(own[entry]),
            )
            for entry in finished
        ]
        if pinned is not None:
            outcomes.append(_gold_outcome(run, pinned.source, original))
        content = job.provenance(run, tracker) | _content(own, failures)
        content |= tradeoff.summary(outcomes, config.rule.seed)
        if pinned is not None:
            best = {name: Path(content["runs"][name]) / "model" for name in content["best"].values()}
            scored = gold_scores(run, {"original": run.source.path} | best, pinned)
            content["against_gold"] = {
                name: {key: metric.to_json() for key, metric in found.items()} for name, found in scored.items()
            }
        for one in outcomes:
            found = content["metrics"][one.name] | content.get("against_gold", {}).get(one.name, {})
            flat = {name: metric["value"] for name, metric in found.items()}
            tracker.metrics(flat, step=0, stage=one.name.replace("@", "-"))
        plot = run.folder / "plots" / "tradeoff.png"
        plot.parent.mkdir(exist_ok=True)
        tradeoff.figure(content).savefig(plot, dpi=150)
        tracker.artifact(plot)
        path = runs.publish(content, run.folder, tracker)
    show(content)
    return path


def dry_run(config: RuleConfig, chosen: Sequence[Entry], gold: Path | None) -> None:
    """Checks what `compare` would, and prints what each entry would train."""
    from rich.console import Console
    from rich.table import Table

    with paths_named():
        run, own, _ = _prepared(config, chosen, None, "", gold)
    job.print_settings(run)
    columns = ("entry", "optimiser steps", "peak of a worker, GiB", "checkpoints on disk, GiB")
    table = Table(*columns, title="Plan of each run")
    for entry, prepared in own.items():
        plan = stages.plan(prepared)
        steps = " + ".join(str(batch.optimiser_steps) for batch in plan.batches) or "0"
        peak = max((memory.per_worker for memory in plan.memory.values()), default=0)
        disk = max((memory.checkpoint for memory in plan.memory.values()), default=0)
        table.add_row(entry.name, steps, f"{peak / GIB:.2f}", f"{disk / GIB:.2f}")
    Console().print(table)


def _prepared(
    config: RuleConfig, chosen: Sequence[Entry], out: Path | None, command: str, gold: Path | None
) -> tuple[job.Run, dict[Entry, job.Run], Gold | None]:
    """The comparison, the run of each entry, and the gold model: checked, before anything is written.

    Which entries are compared is no part of the folder's name: one that is added later finds the others trained.
    """
    pinned = None
    own = {entry: job.prepare(entry.applied(config), None, command) for entry in chosen}
    for prepared in own.values():
        stages.check(prepared)
    what = "compare"
    if gold is not None:
        folder = data_folder(config.rule.data)
        source = in_form(config.rule, models.resolve_directory(gold, "--gold"), folder)
        pinned = Gold(source, folder and load_tofu(folder))
        what += f"-{digest(pinned.identity())[:6]}"
    run = job.prepare(config, out, command, what=what)
    for entry, prepared in own.items():
        prepared.folder = run.folder / "runs" / slug(entry)
    if pinned is not None:
        check_lengths(pinned.source.path, job.chosen_probes(run), config.rule.evaluation)
    return run, own, pinned


def _require_same_texts(own: Mapping[Entry, job.Run]) -> None:
    """Raises UserError where the comparison's folder holds an entry that was trained on other texts."""
    for entry, prepared in own.items():
        state = read_json(prepared.folder / runs.STATE)
        if state is not None and state.get("identity") != prepared.state["identity"]:
            raise UserError(
                f"{prepared.folder} holds {entry.name} trained on other texts than {prepared.config.rule.data} has "
                "now; take another --out, or --fresh to train all entries of this folder again"
            )


def show(content: dict[str, Any]) -> None:
    """The table, what is decided, and what failed."""
    from rich.console import Console

    console = Console(width=None if Console().is_terminal else 130)
    console.print(tradeoff.table(content))
    for sentence in (*tradeoff.verdicts(content), *(f"{n} failed: {why}" for n, why in content["failures"].items())):
        console.print(sentence, soft_wrap=True, highlight=False, markup=False)


def _gold_outcome(run: job.Run, gold: models.ModelSource, original: Examined) -> tradeoff.Outcome:
    """The gold model asked the same probes as the others."""
    evaluation, rule = run.config.rule.evaluation, run.config.rule
    examined = job.evaluated(run, tradeoff.GOLD, gold.path)
    metrics = score(examined, original.answers, run.data.target, evaluation, run.source.path, rule.seed)
    return tradeoff.gold_outcome(gold.path, examined.answers, original.answers, evaluation.known_threshold, metrics)


def _train(run: job.Run, own: Mapping[Entry, job.Run]) -> dict[str, str]:
    """Runs every entry without a report, a process each; returns why entries failed."""
    import ray

    address = ray.get_runtime_context().gcs_address
    processes = Processes()
    slots = stages.slots(own.values(), ray.cluster_resources())
    with ThreadPoolExecutor(min(slots, len(own))) as pool:
        try:
            results = list(pool.map(lambda entry: _run(entry, own[entry], run.shared, address, processes), own))
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            processes.end()
            raise
    return {entry.name: why for entry, why in zip(own, results, strict=True) if why is not None}


def _run(entry: Entry, own: job.Run, shared: Path, address: str, processes: Processes) -> str | None:
    """Trains and evaluates one entry unless that is done; returns what it said where it failed."""
    folder = own.folder
    if (folder / "report.json").exists():
        print(f"[{entry.name}] is finished", flush=True)
        return None
    file, log_path = beside(folder, ".yaml"), beside(folder, ".log")
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(yaml.safe_dump(_settings(entry, own, address)), encoding="utf-8")
    command = [sys.executable, "-m", "jobs.rule", "run", "--shared", str(shared)]
    command += ["--config", str(file), "--out", str(folder)]
    last = ""
    with log_path.open("w", encoding="utf-8") as log:
        process = processes.start(command, _environment(own.config))
        for line in process.stdout:
            log.write(line)
            log.flush()
            last = line.strip() or last
            if PROGRESS.search(line):
                print(f"[{entry.name}] {WORKER.sub('', line).rstrip()}", flush=True)
        status = process.wait()
    return None if status == 0 else f"{last.removeprefix('error: ')} (exit status {status}; {log_path})"


def _settings(entry: Entry, own: job.Run, address: str) -> dict[str, Any]:
    """The whole configuration of an entry's run: on this cluster, and its model registered under a name of its own."""
    config = own.config
    registered = config.tracking.register_as or job.registered_name(own)
    parts = {
        "cluster": {"address": address, "storage": str(session.storage(config))},
        "tracking": {"register_as": f"{registered}-{slug(entry)}", "uri": None},  # see _environment
    }
    changed = {name: getattr(config, name).model_copy(update=values) for name, values in parts.items()}
    return config.model_copy(update=changed).model_dump()


def _environment(config: RuleConfig) -> dict[str, str]:
    """This process's, less what stands in the run's file, with the tracking address, which may hold a password."""
    outer = (ENVIRONMENT_PREFIX, STORAGE_VARIABLE)
    environment = {name: value for name, value in os.environ.items() if not name.startswith(outer)}
    return environment | ({"MLFLOW_TRACKING_URI": config.tracking.uri} if config.tracking.uri else {})


def _content(own: Mapping[Entry, job.Run], failures: Mapping[str, str]) -> dict[str, Any]:
    reports = {
        entry.name: read_json(one.folder / "report.json") for entry, one in own.items() if entry.name not in failures
    }
    return {
        "job": "compare",
        "methods": [entry.name for entry in own],
        "failures": dict(failures),
        "seconds": {name: report["seconds"] for name, report in reports.items()},
        "peak_memory_gib": {name: report["peak_memory_gib"] for name, report in reports.items()},
    }


def slug(entry: Entry) -> str:
    """The name of an entry's folder."""
    method = entry.method.replace("+", "-")
    return method if entry.learning_rate is None else f"{method}-at-{entry.rate}"


def beside(folder: Path, suffix: str) -> Path:
    """A file beside a run's folder; a learning rate has a dot, so that this is not `Path.with_suffix`."""
    return folder.with_name(f"{folder.name}{suffix}")
