"""Entailment by tiny models of both kinds, against their own unbatched passes."""

from __future__ import annotations

import pytest
import torch

from cluster.errors import UserError
from cluster.models import save_directory
from jobs.rule.data import Probe
from jobs.rule.probes import Answer, known, statements
from jobs.scoring.entailment import Entailment, EntailmentSettings, resolve_entailment

PAIRS = [("The cat sat on the mat.", "A cat sat."), ("Rain.", "It is dry, it is warm and it is late."), ("a", "b")]
KEY = "rule.evaluation.entailment"


def classifier(tokenizer, labels):
    from transformers import BertConfig, BertForSequenceClassification

    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=64,
        initializer_range=0.5,
        id2label=dict(enumerate(labels)),
        label2id={name: index for index, name in enumerate(labels)},
    )
    return BertForSequenceClassification(config).eval()


def seq2seq(tokenizer):
    from transformers import T5Config, T5ForConditionalGeneration

    torch.manual_seed(0)
    config = T5Config(
        vocab_size=len(tokenizer),
        d_model=32,
        d_ff=64,
        d_kv=8,
        num_layers=1,
        num_heads=4,
        pad_token_id=tokenizer.pad_token_id,
        eos_token_id=tokenizer.eos_token_id,
        decoder_start_token_id=tokenizer.pad_token_id,
    )
    return T5ForConditionalGeneration(config).eval()


@pytest.fixture
def opened(tmp_path, tiny_tokenizer):
    def make(model, **settings):
        folder = save_directory(model, tiny_tokenizer, tmp_path / "nli")
        chosen = EntailmentSettings(model=str(folder), **settings)
        return Entailment(resolve_entailment(chosen, KEY).path, chosen)

    return make


@pytest.mark.parametrize("labels", [["contradiction", "neutral", "ENTAILMENT"], ["entailment", "not_entailment"]])
def test_a_classifier_gives_the_probability_of_its_entailment_label(opened, tiny_tokenizer, labels):
    model = classifier(tiny_tokenizer, labels)
    entailment = opened(model, max_batch_tokens=100)
    index = [name.lower() for name in labels].index("entailment")
    with torch.no_grad():
        expected = [
            model(**tiny_tokenizer(*pair, return_tensors="pt")).logits.softmax(-1)[0, index].item() for pair in PAIRS
        ]
    assert entailment.probabilities(PAIRS) == pytest.approx(expected, abs=1e-5)
    assert len({round(value, 3) for value in expected}) == 3
    threshold = sorted(expected)[1] - 1e-4
    strict = opened(model, threshold=threshold)
    assert strict.entails(PAIRS) == [value >= threshold for value in expected]


def test_a_premise_too_long_loses_its_beginning_and_the_hypothesis_stays(opened, tiny_tokenizer):
    entailment = opened(classifier(tiny_tokenizer, ["entailment", "other"]))
    end, hypothesis = "abcdefghij" * 5, "y" * 20
    assert entailment.probabilities([("x" * 500 + end, hypothesis)]) == pytest.approx(
        entailment.probabilities([(end[-44:], hypothesis)])
    )
    assert 0 <= entailment.probabilities([("x" * 500, "y" * 500)])[0] <= 1


def test_a_sequence_to_sequence_model_keeps_the_claim_of_a_long_pair(opened, tiny_tokenizer):
    entailment = opened(seq2seq(tiny_tokenizer))
    entailment.max_tokens = 60
    ids = entailment._encoded("x" * 500, "a claim")["input_ids"]
    text = tiny_tokenizer.decode(ids)
    assert len(ids) == 60
    assert text.startswith("premise:x")
    assert text.endswith(" hypothesis: a claim")


@pytest.mark.parametrize(("written", "value"), [("1", 1.0), ("0", 0.0), ("1 0", 0.0)])
def test_a_sequence_to_sequence_model_says_one(opened, tiny_tokenizer, monkeypatch, written, value):
    entailment = opened(seq2seq(tiny_tokenizer))
    asked = []

    def generate(input_ids, attention_mask, **options):
        asked.extend(
            tiny_tokenizer.decode(ids[mask.bool()]) for ids, mask in zip(input_ids, attention_mask, strict=True)
        )
        return torch.tensor([tiny_tokenizer(written).input_ids] * len(input_ids))

    monkeypatch.setattr(entailment.model, "generate", generate)
    assert entailment.probabilities(PAIRS) == [value] * 3
    assert f"premise: {PAIRS[0][0]} hypothesis: {PAIRS[0][1]}" in asked


def test_a_sequence_to_sequence_model_really_writes(opened, tiny_tokenizer):
    assert set(opened(seq2seq(tiny_tokenizer)).probabilities(PAIRS)) <= {0.0, 1.0}


def test_models_of_another_kind_are_told(tmp_path, tiny_model, tiny_tokenizer):
    causal = save_directory(tiny_model, tiny_tokenizer, tmp_path / "causal")
    labels = save_directory(classifier(tiny_tokenizer, ["good", "bad"]), tiny_tokenizer, tmp_path / "sentiment")
    for folder in (causal, labels):
        with pytest.raises(UserError, match="no classifier with an entailment label"):
            resolve_entailment(EntailmentSettings(model=str(folder)), KEY)
    with pytest.raises(UserError, match="writes text; name a natural language inference model"):
        resolve_entailment(EntailmentSettings(model="embedded:smollm2-135m"), KEY)
    with pytest.raises(UserError, match=rf"set {KEY}\.revision to its commit"):
        resolve_entailment(EntailmentSettings(model="owner/name"), KEY)


def answer(query: str, said: str, true: str, recall: float = 0.0, **fields) -> Answer:
    return Answer(
        Probe(query, true, "neighbor_qa", "", ""), said, fields.pop("refusal", False), False, recall, **fields
    )


def test_a_statement_holds_its_question():
    assert statements(answer("Who?", "Ada.", "Ada Lovelace")) == ("Who? Ada.", "Who? Ada Lovelace")
    assert statements(answer("The ___ of \\1.", "sea", "land")) == ("The sea of \\1.", "The land of \\1.")


def test_an_entailed_answer_is_known_unless_it_refuses():
    answers = [
        answer("q", "a", "b", entailed=True),
        answer("q", "a", "b", recall=0.6),
        answer("q", "a", "b", recall=0.4),
        answer("q", "a", "b", entailed=True, refusal=True),
    ]
    assert known(answers, 0.5) == [True, True, False, False]
