"""The judge's client against a real HTTP server on the loopback interface."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from datetime import UTC, datetime

import pytest

from cluster.errors import JobFailure, UserError
from jobs.scoring.chat import Chat, ChatSettings, retry_after_s
from jobs.scoring.judge import Judge, parse_scores
from tests.chat_endpoint import Endpoint, completion, serving

NAMES = ("clarity", "truth")
GOOD = '{"clarity": 80, "truth": 12.5}'
TOKEN = "a-token-that-nobody-may-see"


@pytest.fixture
def endpoint() -> Iterator[Endpoint]:
    with serving() as endpoint:
        endpoint.replies = [(200, {}, completion(GOOD))]
        yield endpoint


@pytest.fixture
def waits() -> list[float]:
    return []


@pytest.fixture
def make_judge(endpoint, waits):
    def make(**dials) -> Judge:
        return Judge(ChatSettings(**{"base_url": endpoint.base_url, "model": "judge-1"} | dials), sleep=waits.append)

    return make


def test_scores_come_in_order_with_temperature_zero_and_the_token(endpoint, make_judge, monkeypatch):
    monkeypatch.setenv("JUDGE_TOKEN", TOKEN)
    endpoint.replies = [(200, {}, completion(f'{{"clarity": {i}, "truth": 1}}')) for i in range(3)]
    scores = make_judge(token_env="JUDGE_TOKEN", concurrency=1).score(["one", "two", "three"], NAMES)
    assert [score["clarity"] for score in scores] == [0.0, 1.0, 2.0]
    path, headers, body = endpoint.requests[1]
    assert path == "/v1/chat/completions"
    assert headers["Authorization"] == f"Bearer {TOKEN}"
    assert (body["model"], body["temperature"]) == ("judge-1", 0)
    assert body["messages"][0]["content"].startswith("two\n\nAnswer with one JSON object")


def test_no_token_is_sent_where_none_is_configured(endpoint, make_judge):
    make_judge().score(["x"], NAMES)
    assert "Authorization" not in endpoint.requests[0][1]


def test_many_prompts_at_once(endpoint, make_judge):
    endpoint.delay_s = 0.05
    started = time.monotonic()
    assert len(make_judge(concurrency=8).score(["x"] * 16, NAMES)) == 16
    assert time.monotonic() - started < 16 * 0.05


def test_429_waits_as_long_as_it_is_told(endpoint, waits):
    endpoint.replies = [(429, {"Retry-After": "1"}, ""), (200, {}, completion(GOOD))]
    started = time.monotonic()
    scores = Judge(ChatSettings(base_url=endpoint.base_url, model="m")).score(["x"], NAMES)
    assert scores == [{"clarity": 80.0, "truth": 12.5}]
    assert time.monotonic() - started >= 1.0


def test_server_errors_are_retried_with_growing_waits(endpoint, make_judge, waits):
    endpoint.replies = [(503, {}, ""), (500, {}, ""), (503, {"Retry-After": "3"}, ""), (200, {}, completion(GOOD))]
    make_judge().score(["x"], NAMES)
    assert waits == [0.5, 1.0, 3.0]


def test_a_damaged_body_is_asked_for_again(endpoint, make_judge, waits):
    endpoint.replies = [(200, {"Content-Encoding": "gzip"}, "no gzip"), (200, {}, completion(GOOD))]
    assert make_judge().score(["x"], NAMES) == [{"clarity": 80.0, "truth": 12.5}]
    assert waits == [0.5]


def test_a_moment_in_the_past_is_no_invitation_to_hammer(endpoint, make_judge, waits):
    endpoint.replies = [(429, {"Retry-After": "0"}, ""), (529, {}, ""), (200, {}, completion(GOOD))]
    make_judge().score(["x"], NAMES)
    assert waits == [0.5, 1.0]


def test_loopback_does_not_go_through_a_proxy(endpoint, make_judge, monkeypatch):
    for name in ("HTTP_PROXY", "http_proxy", "ALL_PROXY"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")
    for name in ("NO_PROXY", "no_proxy"):
        monkeypatch.delenv(name, raising=False)
    endpoint.replies = [(200, {}, completion(GOOD))]
    assert make_judge(deadline_s=2).score(["x"], NAMES)


def test_an_address_that_is_none_is_told(make_judge):
    with pytest.raises(UserError, match=r"The base_url of the judge, http://\[::1/v1, is no address"):
        make_judge(base_url="http://[::1/v1")


def test_a_cut_excerpt_shows_no_part_of_the_token(endpoint, make_judge, monkeypatch):
    monkeypatch.setenv("JUDGE_TOKEN", TOKEN)
    endpoint.replies = [(404, {}, "x" * 190 + TOKEN)]
    with pytest.raises(UserError) as caught:
        make_judge(token_env="JUDGE_TOKEN").score(["x"], NAMES)
    assert TOKEN[:10] not in str(caught.value)


def test_a_wait_beyond_the_deadline_fails_at_once(endpoint, make_judge, waits):
    endpoint.replies = [(429, {"Retry-After": "3600"}, "")]
    with pytest.raises(JobFailure, match=r"127\.0\.0\.1.* gave no answer within 20 s: the last answer was HTTP 429"):
        make_judge(deadline_s=20).score(["x"] * 5, NAMES)
    assert waits == []


def test_an_unreachable_endpoint_fails_within_the_deadline(endpoint):
    endpoint.server.shutdown()
    endpoint.server.server_close()
    judge = Judge(ChatSettings(base_url=endpoint.base_url, model="m", deadline_s=0.8))
    with pytest.raises(JobFailure, match="the last attempt failed with ConnectError"):
        judge.score(["x"], NAMES)


def test_a_silent_endpoint_fails_within_the_deadline(endpoint):
    endpoint.delay_s = 6.0
    judge = Judge(ChatSettings(base_url=endpoint.base_url, model="m", timeout_s=0.2, deadline_s=0.6))
    started = time.monotonic()
    with pytest.raises(JobFailure, match="ReadTimeout"):
        judge.score(["x"], NAMES)
    # far below what the whole answer would take, far above what a busy machine adds
    assert time.monotonic() - started < 3.0


def test_a_body_that_trickles_in_fails_within_the_deadline(endpoint):
    endpoint.trickle_s = 0.05
    judge = Judge(ChatSettings(base_url=endpoint.base_url, model="m", timeout_s=0.2, deadline_s=0.6))
    started = time.monotonic()
    with pytest.raises(JobFailure, match="ReadTimeout"):
        judge.score(["x"], NAMES)
    # far below what the whole answer would take, far above what a busy machine adds
    assert time.monotonic() - started < 3.0


def test_one_failure_ends_the_waits_of_the_others(endpoint):
    endpoint.replies = [(429, {"Retry-After": "30"}, ""), (404, {}, "")]
    started = time.monotonic()
    with pytest.raises(UserError, match="HTTP 404"):
        Judge(ChatSettings(base_url=endpoint.base_url, model="m", concurrency=2)).score(["x", "y", "z"], NAMES)
    assert time.monotonic() - started < 5.0


def test_a_malformed_answer_is_asked_for_again_with_what_was_wrong(endpoint, make_judge):
    endpoint.replies = [
        (200, {}, completion("Clarity is 80.")),
        (200, {}, completion('{"clarity": 80}')),
        (200, {}, completion(GOOD)),
    ]
    assert make_judge().score(["x"], NAMES) == [{"clarity": 80.0, "truth": 12.5}]
    asked = endpoint.requests[2][2]["messages"]
    assert [message["role"] for message in asked] == ["user", "assistant", "user"]
    assert asked[1]["content"] == '{"clarity": 80}'
    assert "exactly the keys clarity, truth" in asked[2]["content"]


@pytest.mark.parametrize("reply", [completion("no"), "not JSON", "{}", '{"choices": [{"message": {"content": null}}]}'])
def test_three_malformed_answers_refuse_the_score(endpoint, make_judge, reply):
    endpoint.replies = [(200, {}, completion(GOOD)), (200, {}, reply)]
    with pytest.raises(JobFailure, match=r"left 2 of 3 items unscored after 3 malformed answers .* item ends: 'b'"):
        make_judge(concurrency=1).score(["a", "b", "c"], NAMES)
    assert len(endpoint.requests) == 1 + 2 * 3


@pytest.mark.parametrize(("status", "message"), [(401, "correct the one in JUDGE_TOKEN"), (404, "base_url or model")])
def test_a_refused_request_is_the_users_to_mend(endpoint, make_judge, status, message, monkeypatch, caplog):
    monkeypatch.setenv("JUDGE_TOKEN", TOKEN)
    endpoint.replies = [(status, {}, "")]
    caplog.set_level("DEBUG")
    with pytest.raises(UserError, match=message) as caught:
        make_judge(token_env="JUDGE_TOKEN").score(["x"], NAMES)
    assert len(endpoint.requests) == 1
    assert TOKEN not in str(caught.value) + caplog.text


def test_what_a_model_does_not_take_is_sent_otherwise_from_then_on(endpoint, make_judge, waits):
    said = {
        "max_tokens": "Unsupported parameter: 'max_tokens' is not supported with this model. Use "
        "'max_completion_tokens' instead.",
        "temperature": "Unsupported value: 'temperature' does not support 0 with this model. Only the default (1) "
        "value is supported.",
    }

    def answer(body: dict) -> tuple[int, dict[str, str], str]:
        wrong = next((name for name in said if name in body), None)
        error = wrong and json.dumps({"error": {"message": said[wrong], "type": "invalid_request_error"}})
        return (400, {}, error) if wrong else (200, {}, completion(GOOD))

    endpoint.answer = answer
    assert len(make_judge(concurrency=1, max_tokens=77).score(["x", "y"], NAMES)) == 2
    bodies = [body for _, _, body in endpoint.requests]
    assert [sorted(set(body) - {"model", "messages"}) for body in bodies] == [
        ["max_tokens", "temperature"],
        ["max_completion_tokens", "temperature"],
        ["max_completion_tokens"],
        ["max_completion_tokens"],
    ]
    assert bodies[-1]["max_completion_tokens"] == 77
    assert waits == []


@pytest.mark.parametrize(
    "told", ["max_tokens is too large: 200", "'temperature' is above 2", "'max_completion_tokens' is not supported"]
)
def test_another_fault_of_a_parameter_is_told(endpoint, make_judge, told):
    endpoint.replies = [(400, {}, told)]
    with pytest.raises(UserError, match="HTTP 400"):
        make_judge().score(["x"], NAMES)
    assert len(endpoint.requests) == 1


@pytest.mark.parametrize(
    ("status", "told"),
    [
        (400, '{"error": {"code": "content_filter", "message": "The response was filtered"}}'),
        (
            403,
            '{"error": {"code": 403, "message": "m requires moderation. Your input was flagged for \\"violence\\"."}}',
        ),
        (422, '{"error": {"code": "content_policy_violation"}}'),
    ],
)
def test_a_moderated_question_has_no_answer_and_ends_nothing(endpoint, status, told):
    endpoint.replies = [(status, {}, told), (200, {}, completion("yes"))]
    chat = Chat(ChatSettings(base_url=endpoint.base_url, model="m", concurrency=1), "the model")
    ask = [{"role": "user", "content": "?"}]
    assert chat.each([1, 2], lambda one, _: one(ask)) == ["", "yes"]


@pytest.mark.parametrize(
    "told",
    [
        "Your account has been flagged; see our safety practices",
        "<html>Blocked by the content filter of this network</html>",
    ],
)
def test_a_refused_account_or_a_proxys_page_is_no_moderation(endpoint, make_judge, told):
    endpoint.replies = [(403, {}, told)]
    with pytest.raises(UserError, match="refused the token"):
        make_judge().score(["x"], NAMES)


def test_an_unset_token_variable_is_named(make_judge, monkeypatch):
    monkeypatch.delenv("JUDGE_TOKEN", raising=False)
    with pytest.raises(UserError, match="JUDGE_TOKEN"):
        make_judge(token_env="JUDGE_TOKEN")


@pytest.mark.parametrize(
    "text",
    [
        "",
        "80",
        "[80, 1]",
        '{"clarity": 80}',
        '{"clarity": 80, "truth": 1, "more": 2}',
        '{"clarity": 101, "truth": 1}',
        '{"clarity": -1, "truth": 1}',
        '{"clarity": "80", "truth": 1}',
        '{"clarity": true, "truth": 1}',
        '{"clarity": NaN, "truth": 1}',
        f"So: ```json\n{GOOD}\n```",
        f"{GOOD} So.",
    ],
)
def test_answers_that_are_not_exactly_the_object(text):
    with pytest.raises(ValueError, match=r"not a"):
        parse_scores(text, NAMES)


def test_the_fence_of_a_code_block_is_no_fault():
    assert parse_scores(f"```json\n{GOOD}\n```", NAMES) == parse_scores(GOOD, NAMES)


def test_a_token_with_a_line_end_is_sent_without_and_a_strange_one_is_told(endpoint, make_judge, monkeypatch):
    endpoint.replies = [(200, {}, completion(GOOD))]
    monkeypatch.setenv("JUDGE_TOKEN", f"{TOKEN}\n")
    make_judge(token_env="JUDGE_TOKEN").score(["x"], NAMES)
    [(_, headers, _)] = endpoint.requests
    assert headers["Authorization"] == f"Bearer {TOKEN}"
    monkeypatch.setenv("JUDGE_TOKEN", "t\u00f6ken")
    with pytest.raises(UserError, match=r"JUDGE_TOKEN.*characters that no header can carry"):
        make_judge(token_env="JUDGE_TOKEN")


def test_retry_after_forms():
    now = datetime(2030, 1, 1, 12, 0, 0, tzinfo=UTC)
    assert retry_after_s("7", now) == 7.0
    assert retry_after_s("Tue, 01 Jan 2030 12:00:09 GMT", now) == 9.0
    assert retry_after_s("Tue, 01 Jan 2030 11:00:00 GMT", now) == 0.0
    assert retry_after_s(None, now) is None
    assert retry_after_s("soon", now) is None
