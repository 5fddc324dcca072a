"""The runs of a comparison: their files, and what their processes are told."""

from __future__ import annotations

import json
from pathlib import Path

from cluster.config import load
from cluster.models import ModelSource
from jobs.rule import children
from jobs.rule.children import beside
from jobs.rule.config import RuleConfig
from jobs.rule.data import load_data
from jobs.rule.entries import Entry, entries
from jobs.rule.job import Run


def test_every_entry_has_files_of_its_own():
    chosen = entries("GA,GA@1.5e-5,GA@1.2e-5,GA@0.001,GA@0.002,GA@1e30,GA@1e-30,NPO+KLR@1e-5,NPO+GDR@1e-5")
    folders = [Path("runs") / entry.slug for entry in chosen]
    assert len(set(folders)) == len(chosen)
    assert len({beside(folder, ".yaml") for folder in folders}) == len(chosen)
    assert beside(folders[1], ".log") == Path("runs/GA-at-1.5e-5.log")


def test_a_password_of_the_tracking_server_reaches_a_run_but_no_file():
    uri = "http://me:hunter2@host:5000"
    config = load(RuleConfig, sets=[f"tracking.uri={uri}"], environ={})
    own = Run(config, load_data("demo", None, 0.0, 42), ModelSource("mine", Path("nowhere"), "1"), Path("nowhere"), "")
    assert "hunter2" not in json.dumps(children.settings(Entry("GA", 1e-5), own, "127.0.0.1:1"))
    assert children.environment(config)["MLFLOW_TRACKING_URI"] == uri
