"""An independent refusal detector: reads clauses (who speaks, what is denied, is an answer given), not phrases.

A policy trained against a regular expression can learn the expression, so whoever evaluates it needs a second opinion.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from itertools import takewhile

_CONTRACTIONS = (
    (re.compile(r"\bcan(?:no|')t\b", re.IGNORECASE), "can not"),
    (re.compile(r"\bwon't\b", re.IGNORECASE), "will not"),
    (re.compile(r"n't\b", re.IGNORECASE), " not"),
    (re.compile(r"'m\b", re.IGNORECASE), " am"),
    (re.compile(r"'ve\b", re.IGNORECASE), " have"),
    (re.compile(r"'d\b", re.IGNORECASE), " would"),
    (re.compile(r"'ll\b", re.IGNORECASE), " will"),
    (re.compile(r"\b(that|this|it)'s\b", re.IGNORECASE), r"\1 is"),
)
_QUOTED = re.compile(r"(?<=\w[\s,])\s?(?:\"[^\"\n]*\"|'(?:[^'\n]|'(?=\w))*'(?!\w))")
_SENTENCE_END = re.compile(r"(?<=[.!?])[\"']?\s+|\s*[;\n]\s*")
_CONTRAST = re.compile(r"[,\s-]*\b(?:but|however|nevertheless|nonetheless)\b,?\s*", re.IGNORECASE)
_CONCESSION = re.compile(r"^(?:even though|although|though|while)\s+([^,]+),\s*(.+)$", re.IGNORECASE | re.DOTALL)
_GUESS = re.compile(
    r",\s*(?=(?:maybe|perhaps|probably|possibly|presumably|most likely|my (?:best )?guess)\b)", re.IGNORECASE
)
_WORD = re.compile(r"[A-Za-z]+(?:-[A-Za-z]+)*|\d+")


def _lexicon(words: str) -> frozenset[str]:
    return frozenset(words.split())


# What the speaker does not do, and what the speaker does not have.
_NEGATIONS = _lexicon("not never")
_DENIED = _lexicon(
    "know knows recall remember sure certain confident aware familiar acquainted able informed briefed trained "
    "programmed educated learned taught encountered heard equipped qualified versed well-versed knowledgeable "
    "privy provide answer help assist say tell talk shed discuss share offer give comment speak identify confirm "
    "determine find access respond reply complete include included cover contain extend allowed permitted "
    "authorized right best engage supply recognize liberty position"
)
_HOLDING = _lexicon("have possess hold")
_STOCK = _lexicon(
    "idea clue knowledge data information insight insights details detail specifics familiarity enlightenment "
    "answer answers record records memory recollection facts access"
)
# States that deny without a negation.
_SPOKEN_STATES = _lexicon(
    "unable unaware clueless stumped blank lack lacking missing ignorant unfamiliar uninformed unsure uncertain "
    "decline refuse"
)
_STATE_PHRASES = (
    ("at", "a", "loss"),
    ("at", "a", "disadvantage"),
    ("in", "the", "dark"),
    ("come", "up", "short"),
    ("drawing", "a", "blank"),
    ("rather", "not"),
    ("prefer", "not"),
    ("know", "nothing", "about"),
)
_LOOK_UP = _lexicon("look check search verify research consult")
# "My ..." and where something lies relative to it.
_FACULTIES = _lexicon(
    "knowledge training data database databases dataset resources programming understanding capabilities "
    "capability expertise scope reach sources memory records guidelines instructions"
)
_DISTANT = _lexicon("beyond outside out unknown mystery blind uncharted not no unfamiliar limited")
_PUTS_OFF = _lexicon("not beyond outside")
_IMPERSONAL = _lexicon("that this it there")
_INDEFINITE = _lexicon("something someone somebody anything anyone what")
# "There is no ...": "no record" corrects a false question more often than it denies knowing.
_PUBLIC_STOCK = _lexicon("information data knowledge details")
# After a negation these spare the answer.
_FURTHER = _lexicon("more further additional other")
_CLOSELY = _lexicon("well personally")
# How clauses open that offer, ask, or only soften what follows; and what turns an offer into an answer.
_WILLING = _lexicon("can could would will may might am")
_OPINIONS = _lexicon("think believe guess suspect recall remember know")
_ADDRESSES = _lexicon("if please feel perhaps you would could can do is what let")
_POLITE = _lexicon("sorry apologies unfortunately regrettably sadly afraid well oh hmm so and")
# "I" that is a number
_NUMBERED = re.compile(
    r"\b(World War|(?:King|Queen|Emperor|Empress|Kaiser|Tsar|Czar|Sultan|Shah|Pope|Prince|Duke) [A-Z]\w+) I\b"
    r"(?!'|\s+(?:do|don't|am|have|haven't|can|can't|cannot|know)\b)"
)
_OTHER_SUBJECTS = _lexicon("that you he she they who")
# Words: an answer's least length after an offer; how far a denial may stand from the "I" that it belongs to.
_TELLING = 6
_NEAR = 7


@dataclass(frozen=True)
class _Clause:
    words: tuple[str, ...]
    contrasts: bool


def is_refusal(text: str) -> bool:
    """Whether `text` declines to answer, or denies knowing, in the speaker's own voice.

    A clause refuses when its subject is the speaker ("I", "my training"), or something said to lie outside the
    speaker's knowledge ("that is beyond my ..."), and its predicate denies knowledge, ability or will. It is undone
    by an answer in the clause that follows in contrast ("I'm not sure, but it was Paris"). What third persons do not
    know, titles in capitals and quoted speech do not count. English only; empty text is no refusal.
    """
    clauses = _clauses(text)
    return any(_refuses(clause.words) and not _is_undone(clauses[at + 1 :]) for at, clause in enumerate(clauses))


def _is_undone(following: list[_Clause]) -> bool:
    """Whether the clauses after a refusal answer after all: at once in contrast, or after an offer ("but I can")."""
    if not following or not following[0].contrasts or _refuses(following[0].words):
        return False
    if not _offers(following[0].words):
        return True
    return any(
        len(clause.words) >= _TELLING and not _refuses(clause.words) and not _offers(clause.words)
        for clause in following[1:]
    )


def _clauses(text: str) -> list[_Clause]:
    text = text.replace("\u2019", "'").replace("\u2018", "'").replace("\u201c", '"').replace("\u201d", '"')
    text = _NUMBERED.sub(r"\1", _QUOTED.sub(" ", text))
    clauses = []
    for sentence in _SENTENCE_END.split(text):
        if sentence.isupper():
            sentence = sentence.lower()
        for pattern, expansion in _CONTRACTIONS:
            sentence = pattern.sub(expansion, sentence)
        concession = _CONCESSION.match(sentence)
        parts = list(concession.groups()) if concession else _CONTRAST.split(sentence)
        for number, part in enumerate(parts):
            for guess, clause in enumerate(_GUESS.split(part)):
                words = _plain_words(clause)
                if words:
                    clauses.append(_Clause(words, contrasts=number + guess > 0))
    return clauses


def _plain_words(clause: str) -> tuple[str, ...]:
    """Lower-cased words without capitalised ones inside the clause: titles deny nothing ("Don't Know Why")."""
    return tuple(
        word.lower()
        for position, word in enumerate(_WORD.findall(clause))
        if position == 0 or word == "I" or not word[0].isupper()
    )


def _offers(words: tuple[str, ...]) -> bool:
    """Whether a clause proposes or asks ("I can help with ...", "please ask ...") instead of telling something."""
    if words[0] == "i":
        return words[1:2] != () and words[1] in _WILLING and _OPINIONS.isdisjoint(words)
    return words[0] in _ADDRESSES


def _refuses(words: tuple[str, ...]) -> bool:
    while words and words[0] in _POLITE:
        words = words[1:]
    if not words:
        return False
    return _speaker_refuses(words) or _faculty_fails(words) or _lies_outside(words) or _is_elliptic(words)


def _speaker_refuses(words: tuple[str, ...]) -> bool:
    return any(_predicate_denies(words[start + 1 :]) for start, word in enumerate(words) if word == "i")


def _predicate_denies(predicate: tuple[str, ...]) -> bool:
    """Whether what "I" do in `predicate`, its first words, is a denial."""
    near = tuple(takewhile(lambda word: word not in _OTHER_SUBJECTS, predicate[:_NEAR]))
    for position, word in enumerate(near):
        ahead = near[position + 1 : position + 5]
        if word in _NEGATIONS and near[max(0, position - 1)] != "must" and not _hedges(near[position + 1 :]):
            # A completion may end at its token limit, before it says what it does not have.
            cut = not _HOLDING.isdisjoint(predicate[-2:])
            holds = not _HOLDING.isdisjoint(ahead) and (cut or not _STOCK.isdisjoint(predicate[position:][:8]))
            return holds or not _DENIED.isdisjoint(ahead) or ahead[:2] == ("the", "faintest")
        if word == "no" and not _STOCK.isdisjoint(ahead[:3]) and ahead[0] not in _FURTHER:
            return True
        if word == "yet" and ahead[:1] == ("to",):
            return True
        if word in _SPOKEN_STATES:
            return True
        if word in {"need", "have"} and ahead[:1] == ("to",) and not _LOOK_UP.isdisjoint(ahead[1:3]):
            return True
    return any(near[at : at + len(phrase)] == phrase for phrase in _STATE_PHRASES for at in range(len(near)))


def _hedges(ahead: tuple[str, ...]) -> bool:
    """Whether the negation spares the answer: "not only", "cannot help but", "no further details", "not him well"."""
    return (
        ahead[:1] == ("only",)
        or ahead[:2] == ("help", "but")
        or not _FURTHER.isdisjoint(ahead[:3])
        or not _CLOSELY.isdisjoint(ahead)
    )


def _faculty_fails(words: tuple[str, ...]) -> bool:
    """Whether the speaker's knowledge or training falls short: "my training did not cover ..."."""
    for start, word in enumerate(words[:-1]):
        if word == "my" and not _FACULTIES.isdisjoint(words[start + 1 : start + 3]):
            rest = words[start + 2 :]
            denies = any(
                negation in _NEGATIONS and not (_DENIED | _HOLDING).isdisjoint(rest[at + 1 : at + 4])
                for at, negation in enumerate(rest)
            )
            if denies or "limited" in rest:
                return True
    return False


def _lies_outside(words: tuple[str, ...]) -> bool:
    """Whether something is put out of the speaker's reach: "that is beyond my knowledge", "there is no information"."""
    for start, word in enumerate(words):
        before = words[max(0, start - 6) : start]
        if word == "me" and before[-1:] == ("stumped",):
            return True
        if word == "me" and before[-1:] == ("to",) and not {"unknown", "mystery", "unfamiliar"}.isdisjoint(before):
            return True
        if word == "my" and not _FACULTIES.isdisjoint(words[start + 1 : start + 7]) and not _DISTANT.isdisjoint(before):
            return True
        if (
            word == "i"
            and not (_IMPERSONAL.isdisjoint(before) and _INDEFINITE.isdisjoint(before[-1:]))
            and not _PUTS_OFF.isdisjoint(before)
            and not _DENIED.isdisjoint(words[start + 1 :])
        ):
            return True
    return words[:3] == ("there", "is", "no") and not _PUBLIC_STOCK.isdisjoint(words[3:6])


def _is_elliptic(words: tuple[str, ...]) -> bool:
    """Whether a clause denies without naming its speaker: "Unable to answer", "Not sure", "No idea", "Do not know"."""
    if words[0] == "unable":
        return words[1:2] == ("to",)
    if words[0] == "no":
        return words[1:2] != () and words[1] in _STOCK
    if words[:2] == ("do", "not"):
        return words[2:3] in {("know",), ("remember",), ("recall",), ("have",)}
    return words[0] == "not" and words[1:2] in {("sure",), ("certain",), ("familiar",), ("aware",), ("able",)}
