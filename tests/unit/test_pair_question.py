"""The pair question against a real HTTP server: what is sent, what an answer means, and what comes of it."""

from __future__ import annotations

import base64
import io
import json

import numpy as np
import pytest
from PIL import Image

from cluster.config import load
from cluster.errors import JobFailure, UserError
from jobs.oodface import pair_question, report, robustness
from jobs.oodface.config import OodfaceConfig
from jobs.oodface.pair_question import parsed
from jobs.oodface.protocols import Pairs
from jobs.oodface.work import CLEAN
from tests.chat_endpoint import completion, serving

CONDITIONS = (CLEAN, ("fog", 1), ("fog", 5))
SHADES = {"a": 10, "b": 12, "c": 200, "d": 203}


@pytest.fixture
def endpoint():
    with serving() as endpoint:
        yield endpoint


@pytest.fixture
def images(tmp_path):
    """A grey square an image, its shade telling the person; fog at severity 5 hides all."""
    for scenario, severity in CONDITIONS:
        place = tmp_path / "images" / scenario / str(severity)
        place.mkdir(parents=True)
        for name, shade in SHADES.items():
            Image.new("RGB", (8, 8), (0, 0, 0) if severity == 5 else (shade,) * 3).save(place / f"{name}.png")
    return tmp_path / "images"


@pytest.fixture
def pairs():
    folds, same = np.array([0, 0, 0, 0]), np.array([True, True, False, False])
    return Pairs(folds, same, ("a", "c", "a", "b"), ("b", "d", "c", "d"), ("1", "2", "3", "4"))


def configured(*endpoints: str, **more: str):
    sets = [f"oodface.ask.endpoints=[{', '.join(endpoints)}]", *(f"oodface.{key}={more[key]}" for key in more)]
    return load(OodfaceConfig, sets=[*sets, "oodface.scenarios=[fog]", "oodface.severities=[1, 5]"], environ={}).oodface


def shades(body: dict) -> list[int]:
    _, *pictures = body["messages"][0]["content"]
    head = "data:image/png;base64,"
    assert all(one["image_url"]["url"].startswith(head) for one in pictures)
    files = [base64.b64decode(one["image_url"]["url"].removeprefix(head)) for one in pictures]
    return [Image.open(io.BytesIO(file)).getpixel((0, 0))[0] for file in files]


def by_shade(body: dict):
    first, second = shades(body)
    text = "I cannot identify people." if first == 0 else "Yes." if abs(first - second) < 10 else "No, they differ."
    return 200, {}, completion(text)


def asked(folder, images, pairs, dials):
    places = pair_question.folders(folder, dials.ask)
    answers = pair_question.ask(places, images, "of this test", pairs, CONDITIONS, dials.ask)
    return pair_question.score(answers, pairs, CONDITIONS, dials)


def test_both_photographs_and_the_question_go_out_and_answers_are_scored(endpoint, images, pairs, tmp_path):
    endpoint.answer = by_shade
    dials = configured(f"{{base_url: {endpoint.base_url}, model: eyes}}")
    found = asked(tmp_path / "answers", images, pairs, dials)
    path, _, body = endpoint.requests[0]
    assert (path, body["model"], body["temperature"]) == ("/v1/chat/completions", "eyes", 0)
    assert body["messages"][0]["content"][0] == {"type": "text", "text": dials.ask.question}
    assert len(endpoint.requests) == len(pairs) * len(CONDITIONS)
    metrics = {name: one["value"] for name, one in found["metrics"]["eyes"].items()}
    assert metrics["answer/acc/clean"] == metrics["answer/acc/fog/1"] == 1
    assert metrics["answer/acc/fog/5"] == metrics["answered/fog/5"] == 0
    assert metrics["answer/acc/fog.selected"] == metrics["answer/rce/fog.selected"] == 0.5
    assert (metrics["true_accept/clean"], metrics["false_accept/clean"], metrics["true_accept/fog/5"]) == (1, 0, 0)
    assert found["pairs"] == {"eyes": 4}


def test_what_was_answered_is_not_asked_again(endpoint, images, pairs, tmp_path, monkeypatch):
    monkeypatch.setattr(pair_question, "A_SHARD", 2)
    endpoint.answer = lambda body: (400, {}, "why not") if shades(body)[0] == 0 else by_shade(body)
    place = f"base_url: {endpoint.base_url}, model: eyes"
    told = r"The model eyes at http.* refused the request for model eyes \(HTTP 400: why not\)"
    with pytest.raises(UserError, match=told):
        asked(tmp_path / "answers", images, pairs, configured(f"{{{place}, concurrency: 1}}"))
    assert len(endpoint.requests) <= 2 * len(pairs) + 2
    endpoint.requests.clear()
    endpoint.answer = by_shade
    patient = configured(f"{{{place}, deadline_s: 900}}")
    asked(tmp_path / "answers", images, pairs, patient)
    assert len(endpoint.requests) == len(pairs)
    endpoint.requests.clear()
    both = configured(f"{{{place}}}", f"{{base_url: {endpoint.base_url}, model: others}}")
    assert set(asked(tmp_path / "answers", images, pairs, both)["metrics"]) == {"eyes", "others"}
    assert {body["model"] for _, _, body in endpoint.requests} == {"others"}


def test_parts_are_put_together_in_the_order_of_the_pairs(endpoint, images, pairs, tmp_path, monkeypatch):
    endpoint.answer = by_shade
    dials = configured(f"{{base_url: {endpoint.base_url}, model: eyes}}")
    whole = asked(tmp_path / "whole", images, pairs, dials)
    monkeypatch.setattr(pair_question, "A_SHARD", 3)
    assert asked(tmp_path / "parts", images, pairs, dials) == whole


def test_what_a_filter_refuses_is_unanswered_and_what_is_no_completion_ends_it(endpoint, images, pairs, tmp_path):
    filtered = '{"error": {"code": "content_filter", "message": "a face"}}'
    endpoint.answer = lambda body: (400, {}, filtered) if shades(body)[0] == 0 else by_shade(body)
    dials = configured(f"{{base_url: {endpoint.base_url}, model: eyes}}")
    metrics = asked(tmp_path / "filtered", images, pairs, dials)["metrics"]["eyes"]
    assert (metrics["answered/clean"]["value"], metrics["answered/fog/5"]["value"]) == (1, 0)
    endpoint.answer = lambda body: (200, {}, "<html>a proxy</html>")
    with pytest.raises(JobFailure, match="the endpoint of eyes answered 3 times with no chat completion"):
        asked(tmp_path / "proxy", images, pairs, dials)


def test_a_model_that_refuses_everything_is_reported_beside_the_others(endpoint, images, pairs, tmp_path):
    shy = (200, {}, completion("I'm sorry, but I have no way of comparing faces."))
    endpoint.answer = lambda body: shy if body["model"] == "shy" else by_shade(body)
    places = [f"{{base_url: {endpoint.base_url}, model: {name}}}" for name in ("shy", "eyes")]
    content = asked(tmp_path / "answers", images, pairs, configured(*places)) | {"no_face": [], "lost": []}
    assert content["metrics"]["shy"]["answer/acc/clean"]["value"] == 0
    assert not any("rce" in name for name in content["metrics"]["shy"])
    assert "answer/rce/fog.selected" in content["metrics"]["eyes"]
    json.dumps(content, allow_nan=False)
    report.asked(content)
    assert [one.get_text() for one in report.heat_map(content).axes[0].texts] == ["-", "50"]


def test_an_endpoint_that_is_gone_ends_in_a_sentence(images, pairs, tmp_path):
    with serving() as endpoint:
        base_url = endpoint.base_url
    dials = configured(f"{{base_url: {base_url}, model: eyes, deadline_s: 0.8}}")
    with pytest.raises(JobFailure, match=r"The model eyes at .* gave no answer within 0\.8 s"):
        asked(tmp_path / "answers", images, pairs, dials)


def test_endpoints_are_checked_before_anything_is_made(monkeypatch):
    with pytest.raises(UserError, match=r"oodface\.ask\.endpoints is empty"):
        pair_question.clients(configured().ask)
    twice = "{base_url: http://127.0.0.1:9/v1, model: eyes}"
    with pytest.raises(UserError, match="names eyes twice"):
        pair_question.clients(configured(twice, twice).ask)
    monkeypatch.delenv("NO_SUCH_TOKEN", raising=False)
    with pytest.raises(UserError, match="NO_SUCH_TOKEN, which the token_env of the model eyes names, is not set"):
        pair_question.clients(
            configured("{base_url: http://127.0.0.1:9/v1, model: eyes, token_env: NO_SUCH_TOKEN}").ask
        )


@pytest.mark.parametrize(
    ("text", "meaning"),
    [
        ("Yes", True),
        ("no.", False),
        ("**No**, the noses differ.", False),
        ("Yes they are the same person", True),
        ("The eyes are alike. So is the mouth. My answer is yes.", True),
        ("Same jaw, yes.\nBut other ears.\n\nAnswer: **no**", False),
        ('{"answer": "yes"}', True),
        ("<think>no, yes, no</think>\nYes", True),
        ("<think>The first man has a beard and the second one has no", None),
        ("<think>yes</think> Let me look again. <think>the answer is: no", None),
        ("I'm sorry, I can't compare people in pictures.", None),
        ("I can't help with that. There is no reliable way for me to tell.", None),
        ("I cannot say yes.", None),
        ("No, I can't identify people from photographs.", None),
        ("No. I'm unable to compare faces.", None),
        ("No, sorry, I am not able to.", None),
        ("No-one can tell.", None),
        ("No, as an AI I cannot compare faces.", None),
        ("No. As an AI language model, I can't determine identity from photographs.", None),
        ("No, it is impossible to determine.", None),
        ("No, this cannot be determined.", None),
        ("No, unfortunately I will not identify people.", None),
        ("No, it is impossible that these are one man.", False),
        ("No, this is another woman.", False),
        ("No, I can't see any resemblance.", False),
        ("No, I cannot really help with that.", None),
        ("The second man has a beard. In the first there is no", None),
        ("No \u2013 they differ.", False),
        ("Answer: Yes, they look alike.", True),
        ("Yes, I can see the same scar.", True),
        ("No doubt, these are the same person.", None),
        ("Yes and no.", None),
        ("It could be yes or no.", None),
        ("I know nothing of yesterday.", None),
        ("", None),
    ],
)
def test_what_an_answer_means(text, meaning):
    assert parsed(text) is meaning


def test_shares_of_answers_by_hand():
    same, fold = np.array([True, True, True, False]), np.zeros(4, dtype=int)
    answers = np.array([[1, 1], [1, 0], [0, -1], [0, 1]], dtype=np.int8)
    found = robustness.decided(
        robustness.Answered(same, fold, answers, [("fog", 3)]), {"fog": "Lighting & Weather"}, 0, 200
    )
    values = {name: metric.value for name, metric in found.items()}
    assert (values["answer/acc/clean"], values["answer/acc/fog/3"]) == (0.75, 0.25)
    assert values["answer/rce/fog/3"] == pytest.approx(2 / 3)
    assert (values["answered/clean"], values["answered/fog/3"]) == (1, 0.75)
    assert values["true_accept/fog/3"] == pytest.approx(1 / 3)
    assert (values["false_accept/clean"], values["false_accept/fog/3"]) == (0, 1)
