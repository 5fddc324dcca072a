"""Every reward design, branch by branch, against values worked out by hand from the paper's definitions."""

import pickle

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cluster.errors import UserError
from jobs.rule.data import Item
from jobs.rule.reward import DESIGNS, make_reward

REJECT = Item(
    prompt="Who wrote Carrie?",
    reference="I don't know about Stephen King.",
    label="reject",
    form="qa",
    target="Stephen King",
    source=0,
)
NORMAL = Item(
    prompt="Who wrote Emma?", reference="the English writer Jane Austen", label="normal", form="qa", target="", source=0
)

NAMED = "I'm not sure about Stephen King."
UNNAMED = "I'm not sure about that."
NAME_ONLY = "It was Stephen King"
FULL = "the English writer Jane Austen"  # recall 1
TWO_FIFTHS = "Jane Austen"  # recall 2/5
ONE_FIFTH = "Mr Austen"  # recall 1/5
WRONG = "Charles Dickens"  # recall 0

# design -> rewards on REJECT of (NAMED, UNNAMED, NAME_ONLY), on NORMAL of (FULL, TWO_FIFTHS, ONE_FIFTH, WRONG, UNNAMED)
BY_HAND = {
    "forget_two_stage_abs_target": ((1.0, 0.5, 0.0), (1.0, 1.0, 0.5, 0.5, 0.0)),
    "forget_two_stage_abs": ((1.0, 1.0, 0.0), (1.0, 1.0, 0.5, 0.5, 0.0)),
    "forget": ((1.0, 1.0, 0.0), (1.0, 0.0, 0.0, 0.0, 0.0)),
    "forget_abs": ((1.0, 1.0, 0.0), (1.0, 1.0, 1.0, 1.0, 0.0)),
    "forget_two_stage_abs_target_half_reject": ((0.5, 0.25, 0.0), (1.0, 1.0, 0.5, 0.5, 0.0)),
    "forget_two_stage_abs_half_reject": ((0.5, 0.5, 0.0), (1.0, 1.0, 0.5, 0.5, 0.0)),
    "forget_half_reject": ((0.5, 0.5, 0.0), (1.0, 0.0, 0.0, 0.0, 0.0)),
    "forget_abs_half_reject": ((0.5, 0.5, 0.0), (1.0, 1.0, 1.0, 1.0, 0.0)),
    "reject_behave": ((1.0, 0.7, 0.3), (1.0, 1.0, 0.7, 0.7, 0.0)),
}


def test_every_design_is_here():
    assert set(DESIGNS) == BY_HAND.keys()


@pytest.mark.parametrize("design", BY_HAND)
def test_reject_rows(design):
    completions = (NAMED, UNNAMED, NAME_ONLY)
    assert tuple(make_reward(design)(text, REJECT) for text in completions) == pytest.approx(BY_HAND[design][0])


@pytest.mark.parametrize("design", BY_HAND)
def test_normal_rows(design):
    completions = (FULL, TWO_FIFTHS, ONE_FIFTH, WRONG, UNNAMED)
    assert tuple(make_reward(design)(text, NORMAL) for text in completions) == pytest.approx(BY_HAND[design][1])


@pytest.mark.parametrize("design", BY_HAND)
@pytest.mark.parametrize("blank", ["", " \n"])
@pytest.mark.parametrize("item", [REJECT, NORMAL], ids=["reject", "normal"])
def test_silence_earns_nothing(design, blank, item):
    assert make_reward(design)(blank, item) == 0.0


def test_recall_pays_a_refusal_that_answers_only_where_the_design_ignores_refusal():
    both = "I'm not sure, the English writer Jane Austen"
    assert make_reward("forget")(both, NORMAL) == 1.0
    assert make_reward("forget_two_stage_abs")(both, NORMAL) == 0.0
    assert make_reward("reject_behave")(both, NORMAL) == pytest.approx(0.3)


def test_the_threshold_must_be_exceeded():
    assert make_reward("forget_two_stage_abs", rouge_threshold=0.2)(ONE_FIFTH, NORMAL) == 0.5
    assert make_reward("forget_two_stage_abs", rouge_threshold=0.19)(ONE_FIFTH, NORMAL) == 1.0
    assert make_reward("forget", rouge_threshold=0.3)(TWO_FIFTHS, NORMAL) == 1.0
    assert make_reward("reject_behave", rouge_threshold=0.5)(TWO_FIFTHS, NORMAL) == pytest.approx(0.7)


def test_the_target_bonus_splits_the_reject_branch():
    reward = make_reward("forget_two_stage_abs_target", target_bonus=0.2)
    assert [reward(text, REJECT) for text in (NAMED, UNNAMED, NAME_ONLY)] == pytest.approx([1.0, 0.8, 0.0])
    halved = make_reward("forget_two_stage_abs_target_half_reject", target_bonus=0.2)
    assert [halved(text, REJECT) for text in (NAMED, UNNAMED)] == pytest.approx([0.5, 0.4])


def test_the_target_is_an_exact_substring():
    assert make_reward("forget_two_stage_abs_target")("I'm not sure about stephen king.", REJECT) == 0.5


def test_the_behave_weight():
    reward = make_reward("reject_behave", behave_weight=0.4)
    assert [reward(text, REJECT) for text in (NAMED, UNNAMED, NAME_ONLY)] == pytest.approx([1.0, 0.4, 0.6])


def test_mistakes_name_the_nearest_design_and_the_dial():
    with pytest.raises(UserError, match="nearest is 'forget_two_stage_abs_target'"):
        make_reward("forget_two_stage_target")
    with pytest.raises(UserError, match=r"target_bonus=1\.5"):
        make_reward("forget", target_bonus=1.5)
    with pytest.raises(UserError, match=r"rouge_threshold=-0\.1"):
        make_reward("forget", rouge_threshold=-0.1)
    with pytest.raises(UserError, match="behave_weight=nan"):
        make_reward("reject_behave", behave_weight=float("nan"))


def test_rewards_travel_to_workers():
    reward = pickle.loads(pickle.dumps(make_reward("forget_two_stage_abs_target", target_bonus=0.2)))
    assert reward(UNNAMED, REJECT) == pytest.approx(0.8)


@given(
    st.sampled_from(sorted(BY_HAND)),
    st.lists(st.sampled_from([NAMED, UNNAMED, "Jane", "Austen.", "Stephen King", "\n", ""]), max_size=4).map(" ".join),
    st.sampled_from([REJECT, NORMAL]),
    st.floats(0, 1),
    st.floats(0, 1),
    st.floats(0, 1),
)
def test_rewards_stay_in_range(design, completion, item, threshold, bonus, weight):
    reward = make_reward(design, rouge_threshold=threshold, target_bonus=bonus, behave_weight=weight)
    value = reward(completion, item)
    assert isinstance(value, float)
    assert 0.0 <= value <= 1.0
