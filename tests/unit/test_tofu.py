"""TOFU's measures by hand, and against the model's own unbatched passes."""

from __future__ import annotations

import copy
import json

import numpy as np
import pytest
import torch

from cluster.errors import UserError
from cluster.generation import Sampling, TransformersEngine
from cluster.report import Metric
from jobs.rule import tofu
from jobs.rule.evaluate import Examined, against_gold
from jobs.rule.likelihood import greedy_matches
from jobs.rule.tofu import TofuRow, extraction_strength, forget_quality, model_utility, truth_ratio
from jobs.scoring.rouge import rouge_l_recall

TEMPLATE = "{% for message in messages %}<{{ message['content'] }}>{% endfor %}"


@pytest.fixture
def tokenizer(tiny_tokenizer):
    own = copy.deepcopy(tiny_tokenizer)
    own.chat_template = TEMPLATE
    return own


@pytest.fixture
def data():
    rows = [
        TofuRow(question="Who?", answer="Ada", paraphrased_answer="It is Ada", perturbed_answer=["Bob", "It is Eve"]),
        TofuRow(question="Where is it?", answer="In Rome", perturbed_answer=["In Bonn"]),
    ]
    return {"forget": rows, "retain": rows[::-1], "real_authors": rows, "world_facts": rows[1:]}


def probability(model, tokenizer, question: str, answer: str) -> float:
    prompt = tokenizer(f"<{question}>").input_ids
    ids = prompt + tokenizer(answer).input_ids + [tokenizer.eos_token_id]
    with torch.no_grad():
        logp = model(torch.tensor([ids])).logits[0, len(prompt) - 1 : -1].log_softmax(-1)
    return logp.gather(-1, torch.tensor(ids[len(prompt) :])[:, None]).mean().exp().item()


def test_scores_are_those_of_the_model_asked_one_by_one(tiny_model, tokenizer, data):
    engine = TransformersEngine(tiny_model, tokenizer, [tokenizer.eos_token_id])
    metrics, ratios = tofu.score_tofu(tiny_model, engine, tokenizer, data, max_batch_tokens=64, seed=3)
    p = lambda row, text: probability(tiny_model, tokenizer, row.question, text)  # noqa: E731
    first, second = data["forget"]
    expected = [
        (p(first, "Bob") * p(first, "It is Eve")) ** 0.5 / p(first, "It is Ada"),
        p(second, "In Bonn") / p(second, "In Rome"),
    ]
    assert ratios == pytest.approx(expected, rel=1e-4)
    own = [p(first, "Ada"), p(second, "In Rome")]
    assert metrics["tofu/forget/probability"].value == pytest.approx(np.mean(own), rel=1e-4)
    shares = [own[0] / (own[0] + p(first, "Bob") + p(first, "It is Eve")), own[1] / (own[1] + p(second, "In Bonn"))]
    assert metrics["tofu/real_authors/probability"].value == pytest.approx(np.mean(shares), rel=1e-4)
    best = [min(ratio, 1 / ratio) for ratio in expected]
    assert metrics["tofu/forget/truth_ratio"].value == pytest.approx(np.mean(best), rel=1e-4)
    kept = [max(0, 1 - ratio) for ratio in expected]
    assert metrics["tofu/retain/truth_ratio"].value == pytest.approx(np.mean(kept), rel=1e-4)
    said = engine.generate([tokenizer("<Who?>").input_ids], Sampling(tofu.ANSWER_TOKENS))[0][0].text
    alone, _ = tofu.score_tofu(tiny_model, engine, tokenizer, {"forget": [first]}, max_batch_tokens=64, seed=3)
    assert alone["tofu/forget/rouge_l_recall"].value == pytest.approx(rouge_l_recall(said, "Ada"))
    assert "tofu/model_utility" not in alone
    assert 0 <= metrics["tofu/model_utility"].value <= 1
    assert metrics["tofu/exact_memorization"].n == 2


def test_what_a_model_writes_by_itself_is_extracted_whole(tiny_model, tokenizer):
    prompt = tokenizer("<Who?>").input_ids
    with torch.no_grad():
        written = tiny_model.generate(torch.tensor([prompt]), do_sample=False, max_new_tokens=6)[0, len(prompt) :]
    [by_heart] = greedy_matches(tiny_model, [prompt + written.tolist()], [len(prompt)], 64)
    assert by_heart.tolist() == [True] * 6
    changed = [*written.tolist()[:-1], (written[-1].item() + 1) % 250]
    [nearly] = greedy_matches(tiny_model, [prompt + changed], [len(prompt)], 64)
    assert nearly.tolist() == [True] * 5 + [False]


@pytest.mark.parametrize(
    ("matches", "strength"),
    [([1, 1, 1, 1], 1.0), ([0, 1, 1, 1], 0.75), ([1, 1, 0, 1], 0.25), ([1, 1, 1, 0], 0.0), ([0], 0.0)],
)
def test_extraction_strength_by_hand(matches, strength):
    assert extraction_strength(np.array(matches, dtype=bool)) == pytest.approx(strength)


def test_ratio_and_utility_by_hand():
    assert truth_ratio(np.log([0.2, 0.45]), np.log(0.6)) == pytest.approx(0.5)
    assert truth_ratio([-3.0], -900.0) == pytest.approx(np.exp(50))
    assert truth_ratio([-900.0], -3.0) > 0
    sets = [np.array([[0.5, 1.0, 0.5], [0.5, 1.0, 0.5]])] * 3
    assert model_utility(*sets) == pytest.approx(9 / (3 * (2 + 1 + 2)))
    assert model_utility(np.array([[0.0, 1.0, 1.0]])) == 0


def test_forget_quality_tells_a_model_from_gold():
    rng = np.random.default_rng(0)
    gold, same, other = rng.normal(1, 0.1, 200), rng.normal(1, 0.1, 200), rng.normal(0.4, 0.1, 200)
    assert forget_quality(gold, gold, 1).value == pytest.approx(1)
    assert forget_quality(same, gold, 1).value > 0.05
    assert forget_quality(other, gold, 1).value < 1e-20
    few = forget_quality(same[:20], gold, 1)
    assert few.ci95 == (few.value, few.value)
    assert few.n == 20

    def examined(ratios, auc: float | None = None) -> Examined:
        found = {} if auc is None else {"priv_leak/auc": Metric(auc, (auc - 0.1, auc + 0.1), 20, 1)}
        return Examined([], [], found, 0.0, 0.0, list(ratios))

    found = against_gold({"original": examined(other), "unlearned": examined(same), "gold": examined(gold)}, 1)
    name = "tofu/forget_quality"
    assert found["unlearned"][name].value > found["original"][name].value
    assert found["gold"] == {}
    assert against_gold({"original": examined(other)}, 1) == {}
    assert against_gold({"original": examined([]), "gold": examined(gold)}, 1)["original"] == {}
    leak = against_gold({"original": examined([], 0.3), "gold": examined([], 0.5)}, 1)
    assert leak["original"]["priv_leak"].value == pytest.approx(-40)
    assert leak["original"]["priv_leak"].ci95 == pytest.approx((-60, -20))
    assert leak["gold"]["priv_leak"].value == 0


def test_files_are_read_where_they_are(tmp_path):
    assert tofu.load_tofu(tmp_path) is None
    row = {"question": "Who?", "answer": "Ada", "perturbed_answer": ["Bob"]}
    (tmp_path / "forget_perturbed.json").write_text(json.dumps([row]))
    assert list(tofu.load_tofu(tmp_path)) == ["forget"]
    (tmp_path / "retain_perturbed.json").write_text(json.dumps([row | {"perturbed_answer": []}]))
    with pytest.raises(UserError, match=r"retain_perturbed\.json, row 0: perturbed_answer is wrong"):
        tofu.load_tofu(tmp_path)


def test_json_lines_are_read_and_a_broken_line_is_named(tmp_path):
    row = json.dumps({"question": "Who?", "answer": "Ada", "perturbed_answer": ["Bob"]})
    path = tmp_path / "forget_perturbed.json"
    path.write_text(f"{row}\n\n{row}\n")
    assert len(tofu.load_tofu(tmp_path)["forget"]) == 2
    path.write_text(f"{row}\n{row[:-1]}\n")
    with pytest.raises(UserError, match=r"forget_perturbed\.json line 2 is not JSON"):
        tofu.load_tofu(tmp_path)
    path.write_text(row)
    with pytest.raises(UserError, match="holds no JSON list of rows"):
        tofu.load_tofu(tmp_path)
