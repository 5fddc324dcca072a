"""Membership inference against direct numpy computations and brute-force pair counting."""

from __future__ import annotations

import json
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from cluster.errors import UserError
from jobs.rule.mia import (
    AUC_RETRAIN_BOOKS,
    MiaScores,
    auc,
    load_passages,
    mia_report,
    mia_scores,
    min_k,
    min_k_plus_plus,
    priv_leak,
)

TEXTS = ["A first passage about a river.", "Short one", "The third passage is the longest of the three: 12345."]
SHARED = Path(__file__).parents[3] / "shared/data/rule/RWKU/1_Stephen_King"


@pytest.fixture(scope="module")
def scores(tiny_model, tiny_tokenizer) -> MiaScores:
    return mia_scores(tiny_model, tiny_tokenizer, TEXTS, max_batch_tokens=80)


def direct(model, tokenizer, text):
    ids = torch.tensor([tokenizer(text).input_ids])
    with torch.no_grad():
        logp = model(ids).logits[0, :-1].double().log_softmax(-1).numpy()
    taken = np.take_along_axis(logp, ids[0, 1:, None].numpy(), axis=1)[:, 0]
    mean = (np.exp(logp) * logp).sum(-1)
    std = np.sqrt((np.exp(logp) * logp**2).sum(-1) - mean**2)
    return taken, mean, std


def test_every_score_equals_a_direct_computation(tiny_model, tiny_tokenizer, scores):
    for row, text in enumerate(TEXTS):
        taken, mean, std = direct(tiny_model, tiny_tokenizer, text)
        assert scores.loss[row] == pytest.approx(-taken.mean(), abs=1e-5)
        assert scores.zlib[row] == pytest.approx(-taken.mean() / len(zlib.compress(text.encode())), abs=1e-6)
        for k in range(10, 101, 10):
            size = max(1, int(len(taken) * k / 100))
            assert scores.min_k[k][row] == pytest.approx(np.sort(taken)[:size].mean(), abs=1e-5)
            normalised = np.sort((taken - mean) / std)[:size].mean()
            assert scores.min_k_plus_plus[k][row] == pytest.approx(normalised, abs=1e-4)
    assert scores.cut == 0


def test_min_k_by_hand():
    logprobs = np.array([-1.0, -4.0, -2.0, -3.0, -5.0])
    assert min_k(logprobs, 40) == -4.5
    assert min_k(logprobs, 100) == -3.0
    assert min_k(logprobs, 10) == -5.0  # half a token is one token


def test_min_k_plus_plus_by_hand():
    logprobs, mean, std = np.array([-1.0, -4.0, 0.0]), np.array([-2.0, -2.0, 0.0]), np.array([0.5, 4.0, 0.0])
    assert min_k_plus_plus(logprobs, mean, std, 100) == pytest.approx((2.0 - 0.5 + 0.0) / 3)
    assert min_k_plus_plus(logprobs, mean, std, 34) == pytest.approx(-0.5)


@given(st.lists(st.integers(0, 6), min_size=1, max_size=12), st.lists(st.integers(0, 6), min_size=1, max_size=12))
def test_auc_equals_counting_pairs(positives, negatives):
    pairs = [(p > n) + 0.5 * (p == n) for p in positives for n in negatives]
    assert auc(np.array(positives), np.array(negatives)) == pytest.approx(np.mean(pairs))


def test_a_passage_beyond_the_context_is_cut_and_counted(tiny_model, tiny_tokenizer):
    long = "abcdefgh" * 200
    scores = mia_scores(tiny_model, tiny_tokenizer, [long, "short"], max_batch_tokens=2048, percents=[40])
    taken, _, _ = direct(tiny_model, tiny_tokenizer, long[:1024])
    assert scores.cut == 1
    assert scores.loss[0] == pytest.approx(-taken.mean(), abs=1e-5)
    assert scores.zlib[0] == pytest.approx(scores.loss[0] / len(zlib.compress(long[:1024].encode())))


def test_a_passage_of_one_token_is_refused(tiny_model, tiny_tokenizer):
    with pytest.raises(ValueError, match="Passage 1 has 1 tokens"):
        mia_scores(tiny_model, tiny_tokenizer, ["ab", "a"], max_batch_tokens=64)


def fake(losses, cut=0) -> MiaScores:
    losses = np.array(losses)
    return MiaScores(loss=losses, zlib=losses / 10, min_k={40: -losses}, min_k_plus_plus={40: -losses}, cut=cut)


def test_report_means_and_aucs():
    report = mia_report(fake([3.0, 4.0, 5.0], cut=2), fake([1.0, 2.0]), seed=7)
    assert report["fm/loss"].value == 4.0
    assert report["rm/loss"].value == 1.5
    assert report["rm/min_40"].value == -1.5
    # Every forget passage is less likely than every retain passage: none looks more like a member.
    assert {report[f"auc/{name}"].value for name in ("loss", "zlib", "min_40", "min_40_plus_plus")} == {0.0}
    assert (report["fm/truncated"].value, report["rm/truncated"].value) == (2.0, 0.0)
    assert report["auc/loss"].n == 5


def test_priv_leak_signs():
    remembered = priv_leak(fake([1.0, 1.1]), fake([3.0, 4.0]), seed=0)
    assert remembered["priv_leak"].value == -100.0
    unlearned = priv_leak(fake([8.0, 9.0]), fake([3.0, 4.0]), seed=0)
    assert unlearned["priv_leak/auc"].value == 1.0
    assert unlearned["priv_leak"].value == pytest.approx(100 * (1 - AUC_RETRAIN_BOOKS) / AUC_RETRAIN_BOOKS)
    assert priv_leak(fake([1.0, 3.0]), fake([1.0, 3.0]), seed=0, auc_retrain=0.5)["priv_leak"].value == 0.0


def test_loading_passages(tmp_path):
    assert load_passages(tmp_path, "forget") is None
    (tmp_path / "forget_mia.json").write_text(json.dumps([{"text": "one", "ngram": 1}, {"txt": "two"}]))
    with pytest.raises(UserError, match=r"forget_mia\.json, row 1: text is missing"):
        load_passages(tmp_path, "forget")


@pytest.mark.skipif(not SHARED.exists(), reason="../shared/data/rule is absent")
def test_loading_the_published_passages():
    assert len(load_passages(SHARED, "forget")) == 55
    assert len(load_passages(SHARED, "retain")) == 37
