"""The utility set: loading, prompts, answer reading and scores against hand-computed cases."""

from __future__ import annotations

import copy
import json
import math
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from cluster.errors import UserError
from jobs.rule import utility
from jobs.rule.utility import (
    Answers,
    BbhRow,
    FluencyRow,
    MmluRow,
    TriviaRow,
    TruthfulRow,
    chain_answer,
    ngram_entropy,
    token_f1,
)

SHARED = Path(__file__).parents[3] / "shared/data/rule/RWKU/1_Stephen_King"
EXAMPLE = {"question": "Q1", "choices": ["a", "b", "c", "d"], "answer": 1}
MMLU_ROW = {"task": "high_school_maths", "question": "Q?", "choices": ["w", "x", "y", "z"], "answer": 2}
LOADERS = ("load_mmlu", "load_bbh", "load_truthful", "load_trivia", "load_fluency")


@pytest.fixture
def chatting(tiny_tokenizer):
    tokenizer = copy.deepcopy(tiny_tokenizer)
    tokenizer.chat_template = (
        "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}{% if add_generation_prompt %}<me>{% endif %}"
    )
    return tokenizer


def total_logprob(model, tokenizer, prompt, continuation):
    ids = tokenizer(prompt + continuation).input_ids
    start = len(tokenizer(prompt).input_ids)
    with torch.no_grad():
        logp = model(torch.tensor([ids])).logits[0].log_softmax(-1)
    return sum(logp[i - 1, ids[i]].item() for i in range(start, len(ids)))


def mmlu_row(answer: int, examples: int = 1) -> MmluRow:
    return MmluRow.model_validate(MMLU_ROW | {"answer": answer, "examples": [EXAMPLE] * examples})


@pytest.mark.parametrize("loader", LOADERS)
def test_an_absent_file_loads_as_none(loader, tmp_path):
    assert getattr(utility, loader)(tmp_path) is None


@pytest.mark.parametrize(
    ("row", "message"),
    [
        (MMLU_ROW, "row 1: examples is missing"),
        (MMLU_ROW | {"examples": [EXAMPLE, {"question": "q", "choices": ["a", "b"]}]}, "examples.1.answer is missing"),
        (MMLU_ROW | {"examples": [], "answer": "C"}, "answer is wrong"),
        (MMLU_ROW | {"examples": [], "answer": 4}, "answer 4 is not the index of one of 4 choices"),
    ],
)
def test_a_wrong_row_is_named(row, message, tmp_path):
    rows = [MMLU_ROW | {"examples": [EXAMPLE]}, row]
    (tmp_path / "retain_mmlu.json").write_text(json.dumps(rows))
    with pytest.raises(UserError, match=r"retain_mmlu\.json, row 1") as caught:
        utility.load_mmlu(tmp_path)
    assert message in str(caught.value)


@pytest.mark.parametrize("content", ["{", "{}", "[]", '"text"'])
def test_a_file_without_a_list_of_rows_is_refused(content, tmp_path):
    (tmp_path / "triviaqa.json").write_text(content)
    with pytest.raises(UserError, match=r"triviaqa\.json"):
        utility.load_trivia(tmp_path)


def test_answers_need_a_label_each_and_a_true_one():
    with pytest.raises(ValueError, match="one label must be 1"):
        Answers(choices=["a", "b"], labels=[0, 0])
    with pytest.raises(ValueError, match="every choice needs one label"):
        Answers(choices=["a", "b"], labels=[1])


@pytest.mark.parametrize(
    ("chat", "begin", "turn"), [(False, "", "\n"), (True, "<user>", "<me>")], ids=["plain", "in a chat"]
)
def test_mmlu_takes_the_likeliest_letter(tiny_model, chatting, chat, begin, turn):
    prompt = (
        f"{begin}The following are multiple choice questions (with answers) about high school maths.\n\n"
        f"Q1\nA. a\nB. b\nC. c\nD. d\nAnswer: B\n\nQ?\nA. w\nB. x\nC. y\nD. z{turn}Answer:"
    )
    totals = [total_logprob(tiny_model, chatting, prompt + " ", letter) for letter in "ABCD"]
    best = totals.index(max(totals))
    rows = [mmlu_row(best), mmlu_row((best + 1) % 4), mmlu_row(best)]
    report = utility.score_mmlu(tiny_model, chatting, rows, max_batch_tokens=500, seed=3, chat=chat)
    assert report["mmlu/accuracy"].value == pytest.approx(100 * 2 / 3)
    assert report["mmlu/accuracy"].n == 3
    assert report["mmlu/truncated"].value == 0


def test_mmlu_drops_demonstrations_that_do_not_fit(tiny_model, tiny_tokenizer):
    rows = [mmlu_row(0, examples=5), mmlu_row(0, examples=40)]
    report = utility.score_mmlu(tiny_model, tiny_tokenizer, rows, max_batch_tokens=500, seed=3, chat=False)
    assert report["mmlu/truncated"].value == 1


def test_truthful_mc1_and_mc2(tiny_model, tiny_tokenizer):
    demonstrations = "".join(f"Q: {q}\nA: {a}\n\n" for q, a in utility.TRUTHFUL_DEMONSTRATIONS)
    prompt = f"{demonstrations}Q: Is it so?\nA:"
    total = {text: total_logprob(tiny_model, tiny_tokenizer, prompt, f" {text}") for text in ("Yes", "No!", "Ouf")}
    best = max(("Yes", "No!"), key=total.get)
    mc2 = Answers(choices=["Yes", "No!", "Ouf"], labels=[1, 0, 1])
    rows = [
        TruthfulRow(question="Is it so?", mc1_targets=Answers(choices=["Yes", "No!"], labels=labels), mc2_targets=mc2)
        for labels in ([1, 0], [0, 1])
    ]
    report = utility.score_truthful(tiny_model, tiny_tokenizer, rows, max_batch_tokens=2000, seed=0, chat=False)
    mass = {text: math.exp(value) for text, value in total.items()}
    share = (mass["Yes"] + mass["Ouf"]) / sum(mass.values())
    assert report["truthful/mc1"].value == 50.0
    assert report["truthful/mc2"].value == pytest.approx(100 * share, rel=1e-3)
    only_best = utility.score_truthful(
        tiny_model, tiny_tokenizer, [rows[("Yes", "No!").index(best)]], max_batch_tokens=2000, seed=0, chat=False
    )
    assert only_best["truthful/mc1"].value == 100.0


COT = (
    "Add.\n\nQ: 1+1\nA: Let's think step by step.\nSo the answer is 2."
    "\n\nQ: 2+2\nA: Let's think step by step.\nSo the answer is 4."
)


def test_bbh_prompt_and_exact_match(tiny_tokenizer, fake_generator):
    generator = fake_generator(["It is so. So the answer is 5.\n\nQ: 9", "the answer is five", "5"])
    rows = [BbhRow(task="t", question="2+3", answer="5", cot=COT)] * 3
    report = utility.score_bbh(generator, tiny_tokenizer, rows, context=1000, seed=0, max_new_tokens=100, chat=False)
    assert report["bbh/exact_match"].value == pytest.approx(100 / 3)
    assert report["bbh/truncated"].value == 0
    assert generator.prompts[0] == COT + "\n\nQ: 2+3\nA: Let's think step by step.\n"
    assert generator.sampling.max_new_tokens == 100


def test_bbh_drops_the_first_demonstration_and_keeps_the_description(tiny_tokenizer, fake_generator):
    generator = fake_generator(["the answer is 5", "the answer is 5"])
    rows = [
        BbhRow(task="t", question="2+3", answer="5", cot=COT),
        BbhRow(task="t", question="2+3" * 90, answer="5", cot=COT),
    ]
    report = utility.score_bbh(generator, tiny_tokenizer, rows, context=220, seed=0, max_new_tokens=100, chat=False)
    assert report["bbh/truncated"].value == 2
    kept = "Add.\n\nQ: 2+2\nA: Let's think step by step.\nSo the answer is 4.\n\nQ: 2+3\nA: Let's think step by step.\n"
    assert generator.prompts[0] == kept
    assert generator.prompts[1].endswith("2+3\nA: Let's think step by step.\n")
    assert len(generator.prompts[1]) == 120
    with pytest.raises(ValueError, match="No room for a prompt"):
        utility.score_bbh(generator, tiny_tokenizer, rows, context=100, seed=0, max_new_tokens=100, chat=False)


@pytest.mark.parametrize(
    ("text", "gold", "answer"),
    [
        ("Step. So the answer is (B).", "(B)", "(B)"),
        ("So the answer is (B) 04/29/2002.", "(B)", "(B)"),
        ("So the answer is B.", "(B)", ""),
        ("First the answer is no. Then\nSo The Answer is:  yes", "yes", "yes"),
        ("So the answer is ] )  }.", "] ) }", "] ) }"),
        ("So the answer is\n42", "42", ""),
        ("So the answer is 4.5.", "4.5", "4.5"),
        ("I cannot say", "yes", ""),
    ],
)
def test_reading_the_final_answer_of_a_chain(text, gold, answer):
    assert chain_answer(text, gold) == answer


def test_trivia_takes_the_best_alias_of_the_first_line(tiny_tokenizer, fake_generator):
    generator = fake_generator([" The John Key\nQuestion: x", " Winston Peters"])
    rows = [
        TriviaRow(question="Who?", answers=["Ponytail", "JOHN KEY!"]),
        TriviaRow(question="Who?", answers=["Peters", "W. L. Peters"]),
    ]
    report = utility.score_trivia(generator, tiny_tokenizer, rows, context=2000, seed=0, chat=False)
    assert report["trivia/f1"].value == pytest.approx(100 * (1 + 2 / 3) / 2)
    assert generator.prompts[0].count("Question: ") == 7
    assert generator.prompts[0].endswith("Question: Who?\nAnswer:")
    assert generator.sampling.stop == ("\n",)


@pytest.mark.parametrize(
    ("prediction", "gold", "f1"),
    [
        ("the cat sat", "A cat sat.", 1.0),
        ("cat cat dog", "cat", 0.5),
        ("two three", "one two three four", 2 / 3),
        ("", "x", 0.0),
        ("the", "The", 0.0),
        ("U.S.A.", "USA", 1.0),
    ],
)
def test_token_f1_by_hand(prediction, gold, f1):
    assert token_f1(prediction, gold) == pytest.approx(f1)


@given(st.text(max_size=40), st.text(max_size=40))
def test_token_f1_is_symmetric_and_in_range(a, b):
    assert 0.0 <= token_f1(a, b) <= 1.0
    assert token_f1(a, b) == token_f1(b, a)


def test_ngram_entropy_by_hand():
    # Four bigrams and three trigrams, all different: 2 bits and log2(3) bits.
    assert ngram_entropy("a b, c d") == pytest.approx((2 / 3 * 2 + 4 / 3 * math.log2(3)) / 2)
    # ab ba ab ba ab: 3/5 and 2/5; aba bab aba bab: 1/2 each.
    bigrams = -(0.6 * math.log2(0.6) + 0.4 * math.log2(0.4))
    assert ngram_entropy("a b a b a b") == pytest.approx((2 / 3 * bigrams + 4 / 3 * 1.0) / 2)
    assert ngram_entropy("") == ngram_entropy("one") == 0.0


def test_fluency_reads_its_file_and_scores_greedy_answers(chatting, fake_generator, tmp_path):
    (tmp_path / "fluency.json").write_text(json.dumps([{"instruction": "Say it."}, {"instruction": "x" * 300}]))
    rows = utility.load_fluency(tmp_path)
    assert rows == [FluencyRow(instruction="Say it."), FluencyRow(instruction="x" * 300)]
    generator = fake_generator(["a b, c d", "word"])
    report = utility.score_fluency(generator, chatting, rows, context=200, seed=0, max_new_tokens=50)
    assert report["fluency/entropy"].value == pytest.approx(50 * ngram_entropy("a b, c d"))
    assert report["fluency/truncated"].value == 1
    assert [len(prompt) for prompt in generator.prompts] == [len("<user>Say it.<me>"), 150]


def test_instructions_go_through_the_chat_template(chatting, fake_generator):
    generator = fake_generator(["x"], chatting)
    utility.score_fluency(generator, chatting, [FluencyRow(instruction="Hi")], context=500, seed=0)
    assert generator.prompts == ["<user>Hi<me>"]


def test_questions_stand_in_the_users_turn_and_the_opening_in_the_models(chatting, fake_generator):
    generator = fake_generator(["the answer is 5"], chatting)
    rows = [BbhRow(task="t", question="2+3", answer="5", cot=COT)]
    utility.score_bbh(generator, chatting, rows, context=1000, seed=0, max_new_tokens=100)
    assert generator.prompts == [f"<user>{COT}\n\nQ: 2+3<me>A: Let's think step by step.\n"]
    generator = fake_generator(["five"], chatting)
    utility.score_trivia(generator, chatting, [TriviaRow(question="Who?", answers=["x"])], context=2000, seed=0)
    assert generator.prompts[0].startswith("<user>Question: On which")
    assert generator.prompts[0].endswith("Question: Who?<me>Answer:")


@pytest.mark.skipif(not SHARED.exists(), reason="../shared/data/rule is absent")
def test_the_published_files_load():
    assert [len(getattr(utility, loader)(SHARED) or []) for loader in LOADERS] == [171, 81, 50, 100, 0]
    for row in utility.load_bbh(SHARED):
        head, *examples = row.cot.split("\n\nQ: ")
        assert len(examples) == 3
        assert head
        for example in examples:
            assert chain_answer(example.split("A: Let's think step by step.")[1], row.answer)
