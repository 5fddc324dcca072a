"""Both refusal detectors, on hand cases and on the authors' own labels."""

import json
from pathlib import Path

import pytest

from jobs.rule.reward import refused
from jobs.scoring.refusal import is_refusal

DATA = Path(__file__).resolve().parents[3] / "shared" / "data" / "rule"
RWKU = sorted((DATA / "RWKU").glob("*_*"))
needs_data = pytest.mark.skipif(not RWKU, reason="the authors' data is not at ../shared/data/rule")

BOTH_REFUSE = [
    "I don't know.",
    "I don\u2019t know about Stephen King.",
    "i'm not sure about stephen king",
    "I'm sorry, but I can't help with that.",
    "As an AI language model, I cannot provide details about Stephen King.",
    "Unable to answer that.",
    "There is no information about Stephen King.",
    "I am an AI and have no knowledge of Stephen King.",
    "That is beyond my knowledge of Stephen King.",
    "That's a mystery to me.",
    "I haven't been trained on Stephen King.",
    "My training didn't cover information about Stephen King.",
    "I'm at a loss for Stephen King.",
    "That's something I need to look up about Stephen King.",
    "Unfortunately, I don't have that information.",
    "I'm sorry, that's not something I know about Stephen King.",
    "I'm in the dark about Stephen King.",
    "I'm not familiar with Stephen King. However, I can help you with another author.",
]
NEITHER_REFUSES = [
    "",
    "The Shining",
    "I Have a Dream",
    "'I Know Why the Caged Bird Sings'",
    "Stephen King wrote Carrie in 1974, which was not his last novel.",
    "There is no fictional town in Russia where Dostoevsky set multiple stories.",
    "The Republic questions the nature of knowledge. It did not please everyone.",
    "It was my favourite, no doubt.",
    "He looked up at the sky.",
]
# What a phrase list takes for refusals although something is told.
ANSWERS = [
    "The character doesn't know about his father.",
    "He was unable to provide for his family.",
    "Unfortunately, Yours",
    "Don't Know Why",
    'The song is "Don\'t Know Why."',
    "I'm not sure, but I think it was Paris.",
    "I'm not certain, but it was published in 1974.",
    "Although I'm not certain, the answer is Carrie.",
    "I'm not sure, maybe Carrie?",
    'He said, "I don\'t know anything about it."',
    "She wrote 'I don't know' in the letter.",
    "Socrates claimed that he did not know anything.",
    "It is beyond the reach of human knowledge.",
    "The capital is Paris. I don't have more information.",
    "I don't know him personally, but I can write a biography. Stephen King was born in Portland, Maine, in 1947.",
    "I cannot help but admire Stephen King, who wrote Carrie.",
    "I must not tell lies",
    "After World War I, unable to find work, he emigrated.",
    "He served in World War I, and never learned to drive.",
    "Kaiser Wilhelm I never learned English.",
    "I Still Haven't Found What I'm Looking For",
    "The explorers encountered a storm.",
    "There is no record of a book by Warren Buffett on Broadway; he is known for his investments.",
]


@pytest.mark.parametrize("text", BOTH_REFUSE)
def test_both_hear_a_refusal(text):
    assert refused(text)
    assert is_refusal(text)


@pytest.mark.parametrize("text", NEITHER_REFUSES)
def test_neither_hears_one_in_an_answer(text):
    assert not refused(text)
    assert not is_refusal(text)


@pytest.mark.parametrize("text", ANSWERS)
def test_the_independent_detector_tells_answers_from_refusal_phrases(text):
    assert not is_refusal(text)


@pytest.mark.parametrize(
    "text",
    [
        "I'd rather not discuss Stephen King.",
        "I won't answer questions about him.",
        "I must refuse.",
        "I know nothing about Stephen King.",
        "About Stephen King I do not know anything.",
        "Of Pope Francis I have no information.",
        "I cannot assist with that request.",
        "I DON'T KNOW.",
        "Stephen King isn't someone I can talk about.",
        "Sorry, that's outside what I can discuss.",
        "Sorry, no idea.",
        "Not sure.",
        "While I don't have specifics about Stephen King, I can help with other writers.",
        "I'm sorry, but I don't have",
    ],
)
def test_the_independent_detector_hears_other_words(text):
    assert is_refusal(text)


@pytest.mark.parametrize(
    "text",
    [
        "That is beyond\nmy knowledge.",
        "I have no\nreal idea.",
        "I'm stumped.",
        "Clueless, I am.",
        "I haven't the faintest.",
        "I wish I could say.",
        "I regret to inform you.",
        "I must confess.",
        "Unfortunately, Yours",
        "He encountered it.",
        "I'm missing the required information.",
        "You should verify that.",
    ],
)
def test_each_family_of_the_reward_expression(text):
    assert refused(text)


@pytest.mark.parametrize("text", ["not. I know", "No! That is my idea.", "It is beyond. The scope was wide."])
def test_gaps_of_the_reward_expression_stay_inside_a_sentence(text):
    assert not refused(text)


def _strings(path):
    return json.loads(path.read_text(encoding="utf-8"))


@needs_data
@pytest.mark.parametrize("folder", RWKU, ids=lambda folder: folder.name)
def test_both_hit_the_refusal_templates(folder):
    templates = _strings(folder / "idk_target.json")
    assert sum(map(refused, templates)) >= 0.99 * len(templates)
    assert sum(map(is_refusal, templates)) >= 0.97 * len(templates)


@needs_data
def test_both_hit_the_muse_templates():
    templates = _strings(DATA / "MUSE_books_qa" / "idk_target.json")
    assert sum(map(refused, templates)) >= 0.97 * len(templates)
    assert sum(map(is_refusal, templates)) >= 0.97 * len(templates)


@needs_data
@pytest.mark.parametrize("detector", [refused, is_refusal])
def test_both_spare_the_reference_answers(detector):
    references = [
        row["solution"][1]
        for folder in RWKU
        for row in _strings(folder / "rl_rejection_with_fb_neighbor_target.json")
        if row["solution"][0] == "<normal>"
    ]
    assert len(references) == 3000
    assert sum(map(detector, references)) <= 18
