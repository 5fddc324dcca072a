"""A comparison from the folders of finished runs: points, verdicts, costs, table and plot."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path

import pytest
from rich.console import Console

from cluster.config import load
from cluster.errors import UserError
from cluster.models import load_tokenizer, resolve
from cluster.report import Metric
from jobs.rule import compare, costs, tradeoff
from jobs.rule.config import RuleConfig
from jobs.rule.corpora import Sample, load_corpora
from jobs.rule.data import Probe, load_data
from jobs.rule.entries import Entry, entries, from_file, named_models, require_distinct
from jobs.rule.evaluate import Examined, packed
from jobs.rule.job import Run
from jobs.rule.methods import find
from jobs.rule.pareto import Point
from jobs.rule.probes import Answer

NEVER_METRIC = Metric(0.5, (0.4, 0.6), 4, 42)
NEVER = {"value": 0.5, "ci95": [0.4, 0.6], "n": 4, "seed": 42}


def answers(forget: list[float], retain: list[float]) -> list[Answer]:
    kinds = ["forget_fb"] * len(forget) + ["neighbor_qa"] * (len(retain) // 2) + ["general"] * (len(retain) // 2)
    return [
        Answer(Probe(f"q{i}", f"fact {i}", kind, "", ""), f"fact {i}" if recall == 1 else "said", False, False, recall)
        for i, (kind, recall) in enumerate(zip(kinds, [*forget, *retain], strict=True))
    ]


def finished(
    folder: Path, stages: dict[str, list[Answer]], seconds: dict[str, float], limit: int | None = None
) -> Path:
    folder.mkdir(parents=True)
    for stage, given in stages.items():
        (folder / "answers").mkdir(exist_ok=True)
        (folder / "answers" / f"{stage}.json").write_text(json.dumps(packed(Examined(given, [], {}, 1.0, 1.0))))
    metrics = {"known/forget/refusal": NEVER, "retain/refusal": NEVER}
    configuration = {"rule": {"trace": {"probes": limit}}}
    report = {"metrics": {"unlearned": metrics}, "seconds": seconds, "configuration": configuration}
    (folder / "report.json").write_text(json.dumps(report))
    return folder


@pytest.fixture
def outcomes(tmp_path):
    """RULE forgets and keeps, GA forgets all and keeps nothing, or little of either; the original does not know one."""
    original = answers([1, 1, 1, 1, 0.2] * 3, [1] * 12)
    runs = {
        "RULE": {
            "steered": answers([0.5] * 15, [0.5] * 12),
            "unlearned": answers([0, 0, 0, 0.4, 1] * 3, [1, 1, 1, 0.8] * 3),
        },
        "GA@1e-5": {"unlearned": answers([0] * 15, [0] * 12)},
        "GA@1e-6": {"unlearned": answers([0.8, 1, 1, 1, 1] * 3, [0.9, 1, 1, 1] * 3)},
    }
    return [
        tradeoff.outcome(
            name,
            name.partition("@")[0],
            finished(tmp_path / name, {"original": original} | stages, {"steering": 30, "rebo": 60, "scoring": 9}),
            0.5,
            [costs.Spent("rebo", 1, 4.0, 400), costs.Spent("rebo", 2, 8.5, 1000)],
            {"forget": 0.12, "retain": None},
        )
        for name, stages in runs.items()
    ]


def test_points_are_means_over_known_probes(outcomes):
    rule = outcomes[0]
    assert rule.scores["forgotten"] == [1, 1, 1, 0.6] * 3
    assert rule.scores["retained/stemmed"] == [1, 1, 1, 0] * 3
    assert rule.point.forgotten == pytest.approx(0.9)
    assert rule.point.retained == pytest.approx(0.95)
    assert (rule.trace[0].forgotten, rule.trace[0].retained) == (0.5, 0.5)
    assert rule.seconds == 90


@pytest.mark.parametrize(
    ("looks", "reached"),
    [
        ([(1, 0.45, 0.9), (2, 0.55, 0.9)], costs.Spent("rebo", 2, 8.5, 1000)),
        ([(1, 0.55, 0.84), (2, 0.9, 0.86)], costs.Spent("rebo", 2, 8.5, 1000)),
        ([(1, 0.5, 0.85)], costs.Spent("rebo", 1, 4.0, 400)),
        ([(1, 0.9, 0.2)], None),
        ([], None),
    ],
)
def test_what_half_forgotten_took_is_read_off_the_looks(tmp_path, looks, reached):
    original, unlearned = answers([1, 1, 0.2], [1, 1]), answers([0, 0, 0], [1, 1])
    folder = finished(tmp_path / "run", {"original": original, "unlearned": unlearned}, {})
    rows = [{"stage": "rebo", "step": step, "forgotten": gone, "retained": kept} for step, gone, kept in looks]
    (folder / "history.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    spent = [costs.Spent("rebo", 1, 4.0, 400), costs.Spent("rebo", 2, 8.5, 1000)]
    outcome = tradeoff.outcome("RULE", "RULE", folder, 0.5, spent, {})
    assert outcome.reached == reached
    assert [(point.forgotten, point.retained) for point in outcome.trace[:-1]] == [look[1:] for look in looks]
    assert tradeoff.summary([outcome], 42)["costs"]["RULE"]["half_forgotten"] == (reached and vars(reached))


def test_the_best_of_a_method_is_what_is_compared(outcomes):
    content = tradeoff.summary(outcomes, 42)
    assert content["best"] == {"RULE": "RULE", "GA": "GA@1e-6"}
    assert content["front"] == ["GA@1e-6", "RULE"]
    assert content["area"]["GA"]["0"] == pytest.approx(0.05 * 0.975)
    assert content["area"]["RULE"]["0.6"] == pytest.approx(0.9 * 0.95)
    assert content["differences"]["RULE - GA@1e-6"]["forgotten"]["verdict"] == "better"
    assert content["differences"]["RULE - GA@1e-6"]["retained"]["verdict"] == "undecided"
    [sentence] = tradeoff.verdicts(content)
    assert sentence.startswith("RULE has more forgotten than GA@1e-6: 85 points [")
    assert sentence.endswith("]")
    assert json.loads(json.dumps(content)) == content


def test_few_facts_decide_nothing(outcomes):
    one_fact = {axis: ["the same"] * len(asked) for axis, asked in outcomes[0].facts.items()}
    content = tradeoff.summary([replace(outcome, facts=one_fact) for outcome in outcomes], 42)
    assert {found["verdict"] for axes in content["differences"].values() for found in axes.values()} == {"undecided"}
    assert [sentence[:34] for sentence in tradeoff.verdicts(content)] == [
        "nothing is decided of forgotten: t",
        "nothing is decided of retained: th",
    ]


def test_a_verdict_that_case_and_punctuation_made_is_doubted(outcomes):
    rule, _, ga = outcomes
    alike = {"forgotten/stemmed": [1.0] * 12}
    content = tradeoff.summary([replace(one, scores={**one.scores, **alike}) for one in (rule, ga)], 42)
    [sentence] = tradeoff.verdicts(content)
    assert sentence.endswith("; undecided by recall of stems")
    turned = {"forgotten/stemmed": [0.0] * 12}
    content = tradeoff.summary([replace(rule, scores={**rule.scores, **turned}), ga], 42)
    assert content["differences"]["RULE - GA@1e-6"]["forgotten/stemmed"]["verdict"] == "undecided"


def test_looks_at_some_of_the_probes_count_in_no_area(tmp_path):
    original, unlearned = answers([1] * 4, [1] * 4), answers([0] * 4, [0.5] * 4)
    folder = finished(tmp_path / "run", {"original": original, "unlearned": unlearned}, {}, limit=2)
    (folder / "history.jsonl").write_text('{"stage": "rebo", "step": 1, "forgotten": 0.9, "retained": 0.9}\n')
    outcome = tradeoff.outcome("RULE", "RULE", folder, 0.5, [costs.Spent("rebo", 1, 4.0, 400)], {})
    assert len(outcome.trace) == 2
    assert tradeoff.summary([outcome], 42)["area"]["RULE"]["0"] == 0.5


def test_gold_is_shown_beside_the_methods_and_is_none_of_them(outcomes):
    gold = replace(outcomes[0], name="gold", method="gold", trace=(Point("gold", 1.0, 1.0),), seconds=None, tokens=None)
    equal = replace(outcomes[0], name="RS", method="RS")
    content = tradeoff.summary([*outcomes, equal, gold], 42)
    assert "gold" not in content["best"]
    assert content["front"] == ["GA@1e-6", "RS", "RULE"]  # equals are on it together
    assert "RULE - gold" in content["differences"]
    tradeoff.figure(content)
    console = Console(width=140, record=True)
    console.print(tradeoff.table(content))
    [row] = [line for line in console.export_text().splitlines() if line.startswith(" gold")]
    assert row.split()[-4:-2] == ["-", "-"]  # what gold cost nobody knows


def test_the_table_and_the_plot_show_every_run(outcomes, tmp_path):
    content = tradeoff.summary(outcomes, 42)
    console = Console(width=140, record=True, quiet=False)
    console.print(tradeoff.table(content))
    text = console.export_text()
    for shown in ("RULE", "GA@1e-5", "90 [77, 100]", "100 [76, 100]", "1.5", "1,000", "12"):
        assert shown in text
    tradeoff.figure(content).savefig(tmp_path / "tradeoff.png")
    assert (tmp_path / "tradeoff.png").stat().st_size > 10_000


def test_nothing_known_is_nothing_to_compare(tmp_path):
    unknown = answers([0.1] * 4, [1] * 4)
    folder = finished(tmp_path / "run", {"original": unknown, "unlearned": unknown}, {})
    with pytest.raises(UserError, match="answers no forget probe"):
        tradeoff.require_known(unknown, 0.5)
    with pytest.raises(UserError, match="answers no forget probe"):
        tradeoff.outcome("GA", "GA", folder, 0.5, [], {})


def test_a_model_that_cannot_be_asked_is_recorded_and_the_others_go_on(demo, monkeypatch, outcomes):
    def asked(run, name, model, original):
        if name == "broken":
            raise RuntimeError("it has no head")
        return replace(outcomes[0], name=name)

    monkeypatch.setattr(compare, "_model_outcome", asked)
    failures = {}
    found = compare._outcomes(demo, {}, {"broken": demo.source, "sound": demo.source}, None, failures)
    assert [one.name for one in found] == ["sound"]
    assert failures == {"broken": "RuntimeError: it has no head"}


def test_an_entry_of_other_texts_is_told_before_anything_starts(demo, tmp_path):
    own = Run(demo.config, demo.data, demo.source, tmp_path, "", state={"identity": "new"})
    compare._require_same_texts({Entry("GA"): own})
    (tmp_path / "state.json").write_text('{"identity": "old"}')
    with pytest.raises(UserError, match="holds GA of other settings than it has now, or trained on other texts"):
        compare._require_same_texts({Entry("GA"): own})


def test_recall_of_stems_reads_other_scripts_too():
    general = Answer(Probe("q", "東京", "general", "", ""), "東京", False, False, 1.0)
    forget = replace(general, probe=replace(general.probe, kind="forget_qa"))
    found = tradeoff._scores([general, forget], [True, True])
    assert (found["forgotten/stemmed"], found["retained/stemmed"]) == ([0.0], [1.0])


def test_entries_carry_their_learning_rate_to_where_it_belongs():
    config = load(RuleConfig, environ={})
    chosen = entries("RULE@1e-5, RS@2e-6,NPO+KLR@3e-6,ICU,GA")
    assert [entry.name for entry in chosen] == ["RULE@1e-5", "RS@2e-6", "NPO+KLR@3e-6", "ICU", "GA"]
    rules = [entry.applied(config).rule for entry in chosen]
    assert [rule.method for rule in rules] == ["RULE", "RS", "NPO+KLR", "ICU", "GA"]
    assert rules[0].rebo.learning_rate == 1e-5
    assert rules[1].steering.learning_rate == 2e-6
    assert rules[2].baseline.learning_rate == 3e-6
    assert rules[4] == config.rule.model_copy(update={"method": "GA"})
    assert Entry("GA") in chosen


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("RULE,NOP", "NPO"),
        ("GA@fast", "'fast' is no learning rate"),
        ("GA@-1", "is no learning rate"),
        ("GA@nan", "is no learning rate"),
        ("ICU@1e-5", "takes no learning rate"),
        ("GA,RS,GA", "names GA twice"),
        ("", "method"),
    ],
)
def test_wrong_entries_are_told(text, told):
    with pytest.raises(UserError, match=told):
        entries(text)


def test_a_file_holds_configurations_under_labels(tmp_path):
    config = load(RuleConfig, environ={})
    path = tmp_path / "designs.yaml"
    path.write_text("rloo: {rule.rebo.advantage: rloo}\nNPO.5: {rule.method: NPO, rule.baseline.beta: 0.5}\n")
    rloo, npo = from_file(path, config)
    assert (rloo.name, rloo.group, rloo.slug, rloo.method) == ("rloo", "rloo", "rloo", "RULE")
    assert rloo.applied(config).rule.rebo.advantage == "rloo"
    assert npo.applied(config).rule.baseline.beta == 0.5
    assert npo.applied(config).rule.method == "NPO"
    assert len({rloo, npo, Entry("NPO")}) == 3


@pytest.mark.parametrize(
    ("text", "told"),
    [
        (None, "cannot be read as YAML: .*No such file"),
        ("a: [", "cannot be read as YAML"),
        ("2026-13-45: {rule.rebo.steps: 3}", "cannot be read as YAML"),
        ("- RULE", "must hold labels"),
        ("", "must hold labels"),
        ("a: {rule.rebo.steps: 3}\na: {rule.rebo.steps: 4}", "has a twice"),
        ("no: {rule.rebo.steps: 3}", "YAML reads False there, which is no label; quote it"),
        ("a.log: {rule.rebo.steps: 3}", "'a.log' is no label; .* no .yaml or .log last"),
        ("a: {rule: {rebo: {steps: 3}}}", "a sets rule, .* written with dots"),
        ("a b: {rule.rebo.steps: 3}", "'a b' is no label"),
        ("a@1: {rule.rebo.steps: 3}", "'a@1' is no label"),
        ("a: 3", "below a stand no keys"),
        ("a: {rule.model: x}", "a sets rule.model, but entries are asked the same questions"),
        ("a: {rule.method: NOP}", "the nearest is NPO"),
        ("a: {rule.rebo.step: 3}", r"unknown key rule\.rebo\.step; .*rule\.rebo\.steps"),
        ("a: {rule.rebo.steps: many}", r"rule\.rebo\.steps"),
    ],
)
def test_what_is_wrong_in_a_file_of_entries_is_told(tmp_path, text, told):
    config = load(RuleConfig, environ={})
    path = tmp_path / "designs.yaml"
    if text is not None:
        path.write_text(text)
    with pytest.raises(UserError, match=told):
        [entry.applied(config) for entry in from_file(path, config)]


@pytest.mark.parametrize(
    ("labels", "model"),
    [
        (["NPO-at-0.01"], "x"),
        (["npo"], "x"),
        (["gold"], "x"),
        (["a", "A"], "x"),
        (["Mine"], "mine"),
        ([], "gold@2"),
        ([], "NPO@theirs"),
    ],
)
def test_two_rows_have_two_names(labels, model):
    given = [Entry("NPO", 0.01), *(Entry("RULE", label=label) for label in labels)]
    with pytest.raises(UserError, match="take another name"):
        require_distinct(given, named_models([f"{model}=/models/x"], ()))


def test_a_model_from_elsewhere_is_compared_like_a_method(outcomes, tmp_path):
    original, given = answers([1, 1, 1, 1, 0.2] * 3, [1] * 12), answers([0] * 15, [1] * 12)
    other = tradeoff.model_outcome("theirs@2", tmp_path, given, original, 0.5, {"known/forget/refusal": NEVER_METRIC})
    content = tradeoff.summary([*outcomes, other], 42)
    assert content["best"]["theirs"] == "theirs@2"
    assert content["front"] == ["theirs@2"]
    assert content["models"]["theirs@2"] == str(tmp_path)
    assert content["models"]["RULE"] == content["runs"]["RULE"] + "/model"
    assert content["differences"]["RULE - theirs@2"]["forgotten"]["facts"] == 12
    assert "theirs 1.00, 1.00" in tradeoff.areas(content)
    console = Console(width=160, record=True)
    console.print(tradeoff.table(content))
    assert "theirs@2" in console.export_text()


@pytest.fixture(scope="module")
def demo() -> Run:
    source = resolve("embedded:smollm2-135m")
    return Run(load(RuleConfig, environ={}), load_data("demo", None, 0.0, 42), source, Path("nowhere"), "")


def test_data_used_is_a_share_of_the_corpora(demo, tmp_path):
    tokenizer = load_tokenizer(demo.source.path)

    def size(texts) -> int:
        return sum(len(tokenizer(text, add_special_tokens=False).input_ids) for text in texts)

    corpora = load_corpora(demo.data, find("GA+GDR"))
    whole = {side: size(sample.completion for sample in corpora[side]) for side in ("forget", "retain")}
    steered = {f"{row.prompt} {row.refusal}" for row in demo.data.refusals}
    forget = steered | {f"{item.prompt} {item.reference}" for item in demo.data.items if item.label == "reject"}
    boundary = [item.prompt for item in demo.data.items if item.label == "normal"]
    assert costs.data_used(demo) == {
        "forget": size(forget) / whole["forget"],
        "retain": size(boundary) / whole["retain"],
    }
    gradient = Run(Entry("GA+GDR").applied(demo.config), demo.data, demo.source, Path("nowhere"), "", corpora)
    assert costs.data_used(gradient) == {"forget": 1.0, "retain": 1.0}
    early = tmp_path / "early"
    early.mkdir()
    batches = math.ceil(len(demo.data.refusals) / demo.config.rule.steering.batch_size)
    (early / "history.jsonl").write_text(f'{{"stage": "steering", "step": {batches // 2}}}\n')
    planned, half = (
        costs.data_used(Run(Entry("RS").applied(demo.config), demo.data, demo.source, folder, ""))["forget"]
        for folder in (tmp_path, early)
    )
    assert half / planned == pytest.approx(batches // 2 / batches)
    short = demo.config.rule.baseline.model_copy(update={"max_tokens": 16})
    cut = demo.config.model_copy(update={"rule": demo.config.rule.model_copy(update={"baseline": short})})
    used = costs.data_used(replace(gradient, config=Entry("GA+GDR").applied(cut)))
    assert max(used.values()) < 0.5
    prompt = Run(Entry("ICU").applied(demo.config), demo.data, demo.source, Path("nowhere"), "")
    assert costs.data_used(prompt) == {"forget": 0.0, "retain": 0.0}


def test_tokens_are_counted_from_the_steps_that_were_taken(demo, tmp_path):
    rows = [
        {"stage": "steering", "step": 1, "loss": 1.0, "seconds": {"step": 2.0}},
        {"stage": "steering", "step": 1},  # a look at the refusals, no step
        {"stage": "rebo", "step": 1, "loss": 1.0, "completion_tokens": 10.5, "seconds": {"step": 3.5}},
        {"stage": "rebo", "step": 2, "loss": 1.0, "completion_tokens": 12.0},
    ]
    (tmp_path / "history.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    run = Run(demo.config, demo.data, demo.source, tmp_path, "")
    tokenizer = load_tokenizer(demo.source.path)
    mean = sum(len(tokenizer(row.refusal).input_ids) + 1 for row in run.data.refusals) / len(run.data.refusals)
    batch = len(run.data.refusals) / math.ceil(len(run.data.refusals) / 8)  # the last one of an epoch is smaller
    assert costs.spent(run) == [
        costs.Spent("steering", 1, 2.0, round(batch * mean)),
        costs.Spent("rebo", 1, 5.5, round(batch * mean + 32 * 8 * 10.5)),
        costs.Spent("rebo", 2, 5.5, round(batch * mean + 32 * 8 * 22.5)),
    ]
    texts = {"forget": (Sample("", "one two three"),)}
    gradient = Run(Entry("GA").applied(demo.config), demo.data, demo.source, tmp_path / "ga", "", texts)
    gradient.folder.mkdir()
    (gradient.folder / "history.jsonl").write_text('{"stage": "unlearning", "step": 1, "loss": 1.0}\n')
    assert [one.tokens for one in costs.spent(gradient)] == [1 * 4]  # one text fills no batch of eight
