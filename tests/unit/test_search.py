"""A search's memory without a cluster: records, what Optuna and the rungs are told of earlier trials, the report."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace

import cloudpickle
import pytest
from ray.tune.schedulers import TrialScheduler
from rich.console import Console

from cluster.errors import UserError
from cluster.report import write_json
from tune import report
from tune.config import Dimension, Search
from tune.halving import Halving, Rungs, ranked
from tune.records import COMPLETE, FAILED, RUNNING, STOPPED, Plan, Record, recorded
from tune.search import Keeper, Proposals, search

OBJECTIVES = ("forgotten", "retained")
AS_IT_IS = {"x": 0.05, "y": "a"}
LOW, HIGH = {"x": 0.1, "y": "a"}, {"x": 0.9, "y": "b"}


@pytest.fixture
def plan(tmp_path):
    ended, trained = [], {}
    space = {"x": Dimension(uniform=(0, 1)), "y": Dimension(choice=["a", "b"])}
    made = Plan(
        tmp_path,
        Search(trials=6, grace_steps=2),
        space,
        OBJECTIVES,
        8,
        1,
        lambda *_: {},
        lambda record, folder: ended.append((record.number, record.state, folder.name)),
        lambda folder: trained.get(int(folder.name), 0),
        lambda values: repr(sorted((AS_IT_IS | values).items())),
    )
    return SimpleNamespace(plan=made, ended=ended, trained=trained)


def looks(*spans: float) -> list[dict[str, float]]:
    return [{"step": 2 * (index + 1), "forgotten": span, "retained": 0.5} for index, span in enumerate(spans)]


def trial(number: int, values: dict) -> SimpleNamespace:
    return SimpleNamespace(trial_id=f"t{number}", config={"number": number, "values": values}, last_result={})


def told(step: int, forgotten: float, retained: float = 1.0) -> dict[str, float]:
    return {"step": step, "forgotten": forgotten, "retained": retained, "time_total_s": 3.21}


def test_records_come_back_in_order(plan):
    for record in (Record(11, HIGH, STOPPED, looks(0.3), 2.0), Record(2, LOW), Record(0, {}, FAILED, message="why")):
        plan.plan.keep(record)
    (plan.plan.folder / "trials" / "000-failure.json").write_text("{}")
    assert [vars(record) for record in recorded(plan.plan.folder)] == [
        vars(Record(0, {}, FAILED, message="why")),
        vars(Record(2, LOW)),
        vars(Record(11, HIGH, STOPPED, looks(0.3), 2.0)),
    ]


def test_a_new_search_begins_with_the_configuration_as_it_is(plan):
    proposals = Proposals(plan.plan, [], [], Keeper(plan.plan))
    assert proposals.suggest("a") == {"number": 0, "values": {}}
    drawn = proposals.suggest("b")
    assert drawn["number"] == 1
    assert set(drawn["values"]) == {"x", "y"}
    proposals.on_trial_complete("a", {"forgotten": 1, "retained": 1})
    proposals.on_trial_complete("b", {"forgotten": 0.2, "retained": 0.4})
    assert [done.values for done in proposals._ot_study.trials] == [[0.2, 0.4]]


def test_what_was_running_starts_again_under_its_number_and_what_ended_is_known(plan):
    ended = [Record(0, {}, COMPLETE, looks(0.5)), Record(1, LOW, STOPPED, looks(0.4)), Record(2, HIGH, FAILED)]
    proposals = Proposals(plan.plan, ended, [Record(3, HIGH), Record(4, LOW)], Keeper(plan.plan))
    assert [done.params for done in proposals._ot_study.trials] == [LOW]
    assert proposals.next == 5
    stale, running = (plan.plan.trial_folder(number) for number in (5, 3))
    for folder in (stale, running):
        folder.mkdir(parents=True)
    assert proposals.suggest("a") == {"number": 3, "values": HIGH}
    assert proposals.suggest("b") == {"number": 4, "values": LOW}
    assert proposals.suggest("c")["number"] == 5
    assert (stale.exists(), running.exists()) == (False, True)


def test_a_search_that_goes_on_draws_something_new(plan):
    first = Proposals(plan.plan, [], [], Keeper(plan.plan))
    first.suggest("default")
    drawn = [first.suggest(str(index))["values"]["x"] for index in range(2)]
    later = Proposals(
        plan.plan, [Record(n, LOW | {"x": x}, STOPPED, looks(0.1)) for n, x in enumerate(drawn)], [], Keeper(plan.plan)
    )
    assert later.suggest("next")["values"]["x"] not in drawn
    killed = Proposals(
        plan.plan, [], [Record(0, {}), *(Record(n + 1, LOW | {"x": x}) for n, x in enumerate(drawn))], Keeper(plan.plan)
    )
    assert [killed.suggest(str(index))["number"] for index in range(3)] == [0, 1, 2]
    assert killed.suggest("next")["values"]["x"] not in drawn


def test_nothing_is_tried_twice(plan):
    few = replace(plan.plan, space={"x": Dimension(choice=[1, 2]), "y": Dimension(choice=["a", "b"])})
    ended = [Record(0, {}, COMPLETE, looks(0.5)), Record(1, {"x": 1, "y": "a"}, FAILED)]
    proposals = Proposals(few, ended, [], Keeper(few))
    drawn = [proposals.suggest(str(index))["values"] for index in range(3)]
    found = sorted((values["x"], values["y"]) for values in drawn)
    assert found == [(1, "b"), (2, "a"), (2, "b")]
    assert proposals.suggest("one too many")["values"] in [{"x": 1, "y": "a"}, *drawn]


def test_a_space_that_holds_the_configuration_as_it_is_does_not_try_it_again(plan):
    few = replace(plan.plan, space={"y": Dimension(choice=["a", "b", "c"])})
    proposals = Proposals(few, [], [], Keeper(few))
    assert proposals.suggest("first") == {"number": 0, "values": {}}
    assert {proposals.suggest(name)["values"]["y"] for name in "bc"} == {"b", "c"}
    resumed = Proposals(few, [Record(0, {}, COMPLETE, looks(0.5)), Record(1, {"y": "c"}, FAILED)], [], Keeper(few))
    assert resumed.suggest("next")["values"] == {"y": "b"}


def test_nothing_is_tried_twice_once_the_space_has_a_model(plan):
    few = replace(plan.plan, space={"x": Dimension(choice=[1, 2, 3, 4]), "y": Dimension(choice=["a", "b", "c"])})
    proposals = Proposals(few, [Record(0, {}, COMPLETE, looks(0.5))], [], Keeper(few))
    drawn = []
    for index in range(12):
        drawn.append(proposals.suggest(str(index))["values"])
        best = drawn[-1] == {"x": 2, "y": "b"}
        proposals.on_trial_complete(str(index), {"forgotten": 0.9 if best else 0.1, "retained": 0.9 if best else 0.1})
    assert len({tuple(values.values()) for values in drawn}) == 12


def test_a_failed_trial_is_no_success_after_a_resume(plan):
    proposals = Proposals(
        plan.plan, [Record(1, HIGH, FAILED, looks(0.9)), Record(2, LOW, STOPPED, looks(0.1))], [], Keeper(plan.plan)
    )
    assert [done.params for done in proposals._ot_study.trials] == [LOW]


def test_no_secret_is_written_with_a_search(plan, monkeypatch):
    kept, marker = [], "a-token-that-nobody-may-see"
    # on a cluster it holds a reference only
    monkeypatch.setattr("tune.search.tune.with_parameters", lambda trainable, **parameters: trainable)
    monkeypatch.setattr("tune.search.tune.Tuner", lambda trainable, **told: kept.append((trainable, told)) or Nothing())
    search(plan.plan, {"TOKEN": marker})
    [(trainable, told)] = kept
    written = cloudpickle.dumps([trainable, told["tune_config"].search_alg, told["tune_config"].scheduler])
    assert marker.encode() not in written


class Nothing:
    def fit(self) -> None:
        pass


def halving(*earlier: Record) -> Halving:
    return Halving(OBJECTIVES, Rungs(2, 2, 8), {record.number: record.looks for record in earlier})


def test_a_trial_behind_the_earlier_ones_is_ended_at_its_first_rung():
    scheduler = halving(Record(0, LOW, STOPPED, looks(0.8)), Record(1, LOW, STOPPED, looks(0.6)))
    slow, default = trial(2, HIGH), trial(3, {})
    assert scheduler.on_trial_result(None, slow, told(1, 0.0, 0.1)) == TrialScheduler.CONTINUE
    assert scheduler.on_trial_result(None, slow, told(2, 0.1, 0.1)) == TrialScheduler.STOP
    assert scheduler.on_trial_result(None, default, told(2, 0.0, 0.1)) == TrialScheduler.CONTINUE


def test_a_trial_that_keeps_more_and_forgets_less_goes_on():
    scheduler = halving(Record(0, LOW, STOPPED, looks(0.8)), Record(1, LOW, STOPPED, looks(0.6)))
    assert scheduler.on_trial_result(None, trial(2, HIGH), told(2, 0.5, 0.9)) == TrialScheduler.CONTINUE
    nothing = scheduler.on_trial_result(None, trial(3, HIGH), told(2, 0.0, 1.0))
    assert nothing == TrialScheduler.STOP  # no other keeps so much, but it has forgotten nothing


def test_a_trial_at_its_last_step_ends_by_itself():
    scheduler = halving(Record(0, LOW, COMPLETE, looks(0.9, 0.9, 0.9, 0.9)))
    assert scheduler.on_trial_result(None, trial(1, HIGH), told(8, 0.1, 0.1)) == TrialScheduler.CONTINUE


def test_trials_are_ranked_by_fronts_and_then_by_the_volume_that_they_add():
    points = [(0.9, 0.5), (0.0, 1.0), (0.5, 0.9), (0.85, 0.52), (0.4, 0.4), (0.9, 0.5)]
    # .45 both: the first; then what adds .2, .007 and nothing; the copy and the dominated one come after
    assert ranked(points, 6) == [0, 2, 3, 1, 5, 4]
    assert ranked(points, 2) == [0, 2]


def test_equals_of_the_best_go_on():
    rungs = Rungs(2, 2, 8)
    assert all(rungs.stays(str(number), 2, (0.25, 0.75)) for number in range(6))
    assert not rungs.stays("behind", 2, (0.2, 0.75))


def test_a_trial_is_compared_on_the_highest_rung_that_it_reached_only():
    rungs = Rungs(2, 2, 16)
    assert rungs.stays("good", 2, (0.9, 0.9))
    assert rungs.stays("late", 5, (0.1, 0.1))  # the first at four steps; two steps are behind it
    assert rungs.stays("late", 6, (0.1, 0.1))
    assert rungs.stays("good", 4, (0.9, 0.9))
    assert not rungs.stays("later", 4, (0.05, 0.1))


def test_rungs_lie_so_many_times_further_and_below_the_last_step():
    assert list(Rungs(2, 1.5, 8).points) == [2, 3, 4, 7]
    assert list(Rungs(8, 2, 8).points) == []


def test_what_a_killed_driver_saw_of_a_trial_still_counts(plan):
    waiting = Record(2, HIGH, looks=looks(0.9, 0.2), seconds=10.0)
    scheduler, again, other = halving(waiting), trial(2, HIGH), trial(3, LOW)
    assert scheduler.on_trial_result(None, other, told(2, 0.3, 0.3)) == TrialScheduler.STOP  # (.9, .5) is at that rung
    keeper = Keeper(plan.plan, [waiting])
    keeper.on_trial_start(0, [], again)
    keeper.on_trial_result(0, [], again, told(4, 0.7))
    keeper.on_trial_result(0, [], again, told(6, 0.8))
    [record] = recorded(plan.plan.folder)
    assert [(look["step"], look["forgotten"]) for look in record.looks] == [(2, 0.9), (4, 0.2), (6, 0.8)]
    assert record.seconds == 13.2


@pytest.mark.parametrize("content", ["[]", '{"number": 1}', '{"number": 2, "values": {}}', '{"number": 1, "why": 2}'])
def test_a_record_that_is_none_is_told(plan, content):
    path = plan.plan.folder / "trials" / "001.json"
    path.parent.mkdir()
    path.write_text(content)
    with pytest.raises(UserError, match=r"001\.json is no record of a trial; move it"):
        recorded(plan.plan.folder)


def test_the_keeper_writes_what_happens(plan, capsys):
    keeper = Keeper(plan.plan)
    one, other = trial(0, {}), trial(1, HIGH)
    keeper.on_trial_start(0, [], one)
    assert [record.state for record in recorded(plan.plan.folder)] == [RUNNING]
    keeper.on_trial_result(0, [], one, told(2, 0.25))
    keeper.on_trial_result(0, [], one, told(2, 0.25))
    keeper.on_trial_complete(0, [], one)
    keeper.on_trial_start(0, [], other)
    (plan.plan.folder / "trials" / "001-failure.json").write_text('{"message": "it diverged"}')
    keeper.on_trial_error(0, [], other)
    stopped, failed = recorded(plan.plan.folder)
    assert (stopped.state, stopped.last_step, len(stopped.looks), stopped.seconds) == (STOPPED, 2, 1, 3.2)
    assert (failed.state, failed.message, failed.last_step) == (FAILED, "it diverged", 0)
    assert plan.ended == [(0, STOPPED, "000"), (1, FAILED, "001")]
    shown = capsys.readouterr().out.splitlines()
    assert shown == [
        "trial 0: the configuration as it is",
        "trial 0 step 2/8  forgotten 0.25  retained 1.00",
        "trial 0 stopped",
        "trial 1: x 0.9, y b",
        "trial 1 failed: it diverged",
    ]


@pytest.mark.parametrize(("step", "result"), [(8, {}), (4, {"returned": True})])
def test_a_trial_that_came_to_its_end_is_complete(plan, step, result):
    keeper, one = Keeper(plan.plan), trial(1, HIGH)
    keeper.on_trial_start(0, [], one)
    keeper.on_trial_result(0, [], one, told(step, 0.5))
    one.last_result = result
    keeper.on_trial_complete(0, [], one)
    assert recorded(plan.plan.folder)[0].state == COMPLETE


@pytest.fixture
def records():
    drawn = [Record(n, {"x": n / 10, "y": "ab"[n % 2]}, STOPPED, looks(n / 10)) for n in range(1, 6)]
    best = Record(6, HIGH, COMPLETE, looks(0.2, 0.5, 0.7, 0.9))
    return [Record(0, {}, COMPLETE, looks(0.4, 0.4, 0.4, 0.4)), *drawn, best, Record(7, LOW, FAILED, message="why")]


def test_the_report_counts_what_was_looked_at_and_every_step_that_was_trained(plan, records):
    # of the two steps that ended trials were looked at they trained one more, until the scheduler's word arrived
    plan.trained |= {0: 8, **dict.fromkeys(range(1, 6), 3), 6: 8, 7: 1}
    content = report.summary(plan.plan, records)
    assert content["front"] == [{"trial": 6, "step": 8}]
    assert content["best"] == {"trial": 6, "step": 8}
    assert content["failures"] == {"7": "why"}
    assert content["hypervolume"]["all"] == pytest.approx(0.45)
    assert content["hypervolume"]["configuration_as_it_is"] == pytest.approx(0.2)
    assert content["hypervolume"]["path_of_configuration_as_it_is"] == pytest.approx(0.2)
    assert content["hypervolume"]["by_trial"] == pytest.approx([0.2, 0.2, 0.2, 0.2, 0.2, 0.25, 0.45])
    assert content["steps"] == {
        "trained": 31,
        "planned": 56,
        "saved": pytest.approx(25 / 56),
        "of_failed_trials": 1,
    }
    assert [trial["trained"] for trial in content["trials"]] == [8, 3, 3, 3, 3, 3, 8, 1]
    assert set(content["importance"]) == {"x", "y"}
    assert sum(content["importance"].values()) == pytest.approx(1)


def test_few_trials_and_equal_ones_tell_no_importance(plan, records):
    assert report.summary(plan.plan, records[:3])["importance"] == {}
    equal = [Record(n, {"x": n / 10, "y": "a"}, STOPPED, looks(0.3)) for n in range(1, 7)]
    assert report.summary(plan.plan, equal)["importance"] == {}


def test_importance_is_told_at_a_step_that_all_were_looked_at(plan):
    early = [Record(n, {"x": n / 10, "y": "a"}, STOPPED, looks(n / 10)) for n in (1, 3, 5, 7)]
    late = [Record(n, {"x": n / 10, "y": "b"}, COMPLETE, looks(n / 10, 0.9, 0.9, 0.9)) for n in (2, 4, 6, 8)]
    found = report.importance(plan.plan, [*early, *late])
    # at the first look x alone decides; at the last ones y would, which the trials that went on have in common
    assert found["x"] > found["y"]
    ends = [Record(one.number, one.values, one.state, looks(one.looks[-1]["forgotten"])) for one in (*early, *late)]
    at_the_end = report.importance(plan.plan, ends)
    assert at_the_end["y"] > at_the_end["x"]
    odd = Record(9, {"x": 0.9, "y": "b"}, COMPLETE, [told(1, 0.5)])
    assert report.importance(plan.plan, [*early, *late, odd]) == {}


def test_every_look_is_a_configuration_of_so_many_steps(plan, records):
    early = Record(8, LOW, STOPPED, [{"step": 2, "forgotten": 0.05, "retained": 1.0}])
    on_the_way = {"step": 4, "forgotten": 0.3, "retained": 0.9}
    default = Record(0, {}, COMPLETE, [on_the_way, {"step": 8, "forgotten": 0.9, "retained": 0.6}])
    running = Record(9, LOW, RUNNING, [{"step": 2, "forgotten": 1.0, "retained": 1.0}])
    content = report.summary(plan.plan, [default, *records[1:], early, running])
    front = [{"trial": 0, "step": 4}, {"trial": 0, "step": 8}, {"trial": 8, "step": 2}]
    assert (content["front"], content["best"]) == (front, front[1])
    volume = content["hypervolume"]
    assert volume["configuration_as_it_is"] == pytest.approx(0.54)
    assert volume["path_of_configuration_as_it_is"] == pytest.approx(0.54 + 0.3 * 0.3)
    assert volume["all"] == pytest.approx(0.54 + 0.3 * 0.3 + 0.05 * 0.1)
    two_updates_a_step = replace(plan.plan, updates_per_step=4)
    assert report.summary(two_updates_a_step, [default, early])["front"] == front[:2]


def test_of_equal_looks_the_one_with_the_fewest_steps_is_taken(plan):
    slow = Record(0, {}, COMPLETE, [{"step": 6, "forgotten": 1.0, "retained": 1.0}])
    fast = Record(1, HIGH, STOPPED, [{"step": 2, "forgotten": 1.0, "retained": 1.0}])
    content = report.summary(plan.plan, [slow, fast])
    assert (content["best"], content["front"]) == ({"trial": 1, "step": 2}, [{"trial": 1, "step": 2}])
    between = replace(plan.plan, updates_per_step=4)
    assert report.summary(between, [slow])["hypervolume"]["configuration_as_it_is"] is None


def test_without_the_configuration_as_it_is_no_figure_stands_for_it(plan, records):
    content = report.summary(plan.plan, [Record(0, {}, FAILED, message="why"), *records[1:]]) | {"metrics": {}}
    assert content["hypervolume"]["configuration_as_it_is"] is None
    console = Console(width=140, record=True)
    console.print(report.table(content))
    assert "of trial 0 there is none" in console.export_text()
    assert not report.figure(content).axes[1].lines[1:]
    nothing = report.summary(plan.plan, [Record(9, LOW, RUNNING, looks(0.3))])
    assert (nothing["best"], nothing["front"], nothing["hypervolume"]["all"]) == (None, [], 0)


def test_table_and_figure_show_every_trial(plan, records):
    plan.trained |= {0: 8, **dict.fromkeys(range(1, 6), 2), 6: 8, 7: 3}
    content = report.summary(plan.plan, records) | {
        "metrics": {"6@8": {"forgotten": {"value": 0.9, "ci95": [0.8, 1.0], "n": 5, "seed": 0}}}
    }
    console = Console(width=140, record=True)
    console.print(report.table(content))
    text = console.export_text()
    assert "0.90 [0.80, 1.00]" in text
    assert "26 of 56, 54 % saved; not counted: 3 of trials that failed" in text
    assert "front, best" in text
    scatter, volume, bars = report.figure(content).axes
    assert len(scatter.texts) == 7
    running = content | {"trials": [*content["trials"], vars(Record(9, LOW, RUNNING, looks(0.1)))]}
    assert len(report.figure(running).axes[0].texts) == 7
    assert len(bars.patches) == 2
    assert volume.get_ylim()[0] == 0


def test_a_trial_that_found_no_room_is_left_for_the_next_driver(plan, capsys):
    keeper = Keeper(plan.plan)
    proposals = Proposals(plan.plan, [], [], keeper)
    first = SimpleNamespace(trial_id="a", config=proposals.suggest("a"), last_result={})
    keeper.on_trial_start(1, [], first)
    failure = plan.plan.folder / "trials" / "000-failure.json"
    write_json({"message": "stage rebo waited 30 minutes for room", "try_again": True}, failure)
    keeper.on_trial_error(1, [], first)
    [record] = recorded(plan.plan.folder)
    assert (record.state, record.message) == (RUNNING, "stage rebo waited 30 minutes for room")
    assert proposals.suggest("b") == proposals.FINISHED
    assert "waits for another time" in capsys.readouterr().out
    Keeper(plan.plan, [record]).on_trial_start(1, [], first)
    assert recorded(plan.plan.folder)[0].message == ""
    assert not failure.exists()
