"""A language model as judge, over any OpenAI-style chat-completions endpoint."""

from __future__ import annotations

import json
import os
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from typing import TYPE_CHECKING, Annotated

from pydantic import Field

from cluster.config import Section
from cluster.errors import JobFailure, UserError

if TYPE_CHECKING:
    import httpx

ANSWERS_A_PROMPT = 3
_MAX_RESPONSE_BYTES = 2**20
_RETRIED_STATUS = frozenset({408, 409, 425, 429, 500, 502, 503, 504})
_FIRST_BACKOFF_S = 0.5


class JudgeSettings(Section):
    """Where the judge is and how long to wait for it.

    base_url: of the API, up to and without "/chat/completions", for example "https://host/v1".
    model: the name that the endpoint serves.
    token_env: environment variable that holds the bearer token; none where the endpoint asks for none.
    timeout_s: of one HTTP request.
    deadline_s: of one prompt with all its retries and waits.
    max_tokens: of one answer.
    concurrency: prompts in flight at once.
    """

    base_url: Annotated[str, Field(pattern=r"^https?://[^@\s]+$")]
    model: Annotated[str, Field(min_length=1)]
    token_env: str | None = None
    timeout_s: Annotated[float, Field(gt=0)] = 60.0
    deadline_s: Annotated[float, Field(gt=0)] = 300.0
    max_tokens: Annotated[int, Field(ge=1)] = 200
    concurrency: Annotated[int, Field(ge=1)] = 8


class Judge:
    """Asks for named 0 to 100 scores, at temperature 0.

    Args:
        settings: the endpoint; its token is read from the environment here and appears in no message or log.
        sleep: of waits between attempts; the default ends early once another prompt has failed.
        clock: that the deadlines are measured by, seconds.
    Raises: UserError where `token_env` names an unset variable.
    """

    def __init__(
        self,
        settings: JudgeSettings,
        sleep: Callable[[float], object] | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._settings = settings
        self._url = f"{settings.base_url.rstrip('/')}/chat/completions"
        self._sleep = sleep
        self._clock = clock
        self._headers = {}
        if settings.token_env is not None:
            token = os.environ.get(settings.token_env)
            if not token:
                raise UserError(
                    f"The environment variable {settings.token_env}, which the judge's token_env names, is not set; "
                    "set it to the bearer token or leave token_env out."
                )
            self._headers = {"Authorization": f"Bearer {token}"}

    def score(self, prompts: Sequence[str], names: Sequence[str]) -> list[dict[str, float]]:
        """Scores of each prompt, in order, every one a number in [0, 100] under each of `names`.

        A malformed answer is asked for again, with what was wrong; after `ANSWERS_A_PROMPT` malformed answers the item
        is unscored. Busy or failing endpoints are retried with growing waits, a 429 or 503 after the time it names,
        all within `deadline_s` a prompt.

        Raises: RuntimeError with the counts where any item stays unscored; JobFailure where the endpoint stays
            unreachable or busy beyond the deadline; UserError where it refuses the request or the token.
        """
        import httpx

        stop = threading.Event()
        with (
            httpx.Client(headers=self._headers) as client,
            ThreadPoolExecutor(self._settings.concurrency) as pool,
        ):
            futures = [pool.submit(self._score_one, client, stop, prompt, names) for prompt in prompts]
            try:
                ended, _ = wait(futures, return_when=FIRST_EXCEPTION)
                # What failed first is told, not what was given up because of it.
                for future in ended:
                    future.result()
                scores = [future.result() for future in futures]
            finally:
                stop.set()
                pool.shutdown(wait=False, cancel_futures=True)
        scored = [score for score in scores if score is not None]
        if len(scored) < len(scores):
            raise RuntimeError(
                f"The judge {self._settings.model} left {len(scores) - len(scored)} of {len(scores)} items unscored "
                f"after {ANSWERS_A_PROMPT} malformed answers each; a score over the rest would mislead."
            )
        return scored

    def _score_one(
        self, client: httpx.Client, stop: threading.Event, prompt: str, names: Sequence[str]
    ) -> dict[str, float] | None:
        form = json.dumps(dict.fromkeys(names, 0)).replace("0", "<number>")
        messages = [{"role": "user", "content": f"{prompt}\n\nAnswer with one JSON object and nothing else: {form}"}]
        deadline = self._clock() + self._settings.deadline_s
        for _ in range(ANSWERS_A_PROMPT):
            answer = self._ask(client, stop, messages, deadline)
            try:
                return parse_scores(answer, names)
            except ValueError as error:
                correction = f"That answer is malformed ({error}). Answer with the JSON object alone: {form}"
                messages = [
                    messages[0],
                    {"role": "assistant", "content": answer},
                    {"role": "user", "content": correction},
                ]
        return None

    def _ask(self, client: httpx.Client, stop: threading.Event, messages: list[dict[str, str]], deadline: float) -> str:
        """Text of one answer, "" where the response holds none; retries until the deadline."""
        import httpx

        body = {
            "model": self._settings.model,
            "messages": messages,
            "temperature": 0,
            "max_tokens": self._settings.max_tokens,
        }
        backoff = _FIRST_BACKOFF_S
        while not stop.is_set():
            pause = None
            try:
                status, headers, content = self._post(client, body, deadline)
            except httpx.TransportError as error:
                trouble = f"the last attempt failed with {type(error).__name__}"
            else:
                if 200 <= status < 300:
                    return _text_of(content)
                if status not in _RETRIED_STATUS:
                    raise UserError(self._refusal(status))
                trouble = f"the last answer was HTTP {status}"
                pause = retry_after_s(headers.get("Retry-After"), datetime.now(UTC))
            if pause is None:
                pause, backoff = backoff, 2 * backoff
            if self._clock() + pause >= deadline:
                raise JobFailure(
                    f"The judge at {self._url} gave no answer within {self._settings.deadline_s:g} s: {trouble}."
                )
            (self._sleep or stop.wait)(pause)
        raise JobFailure(f"The judge at {self._url} was given up after another prompt had failed.")

    def _post(self, client: httpx.Client, body: dict, deadline: float) -> tuple[int, httpx.Headers, bytes]:
        """Status, headers and body of one request, within `timeout_s` and the deadline.

        A client's own timeout bounds each read, not their sum, so a body that trickles in is watched as well.
        """
        import httpx

        end = min(deadline, self._clock() + self._settings.timeout_s)
        content = bytearray()
        with client.stream("POST", self._url, json=body, timeout=max(end - self._clock(), 0.001)) as response:
            for chunk in response.iter_bytes():
                content += chunk
                if self._clock() > end:
                    raise httpx.ReadTimeout("the body trickled in")
                if len(content) > _MAX_RESPONSE_BYTES:
                    return response.status_code, response.headers, b""
        return response.status_code, response.headers, bytes(content)

    def _refusal(self, status: int) -> str:
        if status in (401, 403):
            named = self._settings.token_env or "token_env, which is not configured"
            return f"The judge at {self._url} refused the token (HTTP {status}); correct the one in {named}."
        return (
            f"The judge at {self._url} refused the request for model {self._settings.model} (HTTP {status}); "
            "correct base_url or model."
        )


def parse_scores(text: str, names: Sequence[str]) -> dict[str, float]:
    """Scores of an answer that is exactly one JSON object with a number in [0, 100] under each name and no other.

    Raises: ValueError that says what is wrong.
    """
    try:
        value = json.loads(text)
    except json.JSONDecodeError:
        raise ValueError("not a JSON object alone") from None
    if not isinstance(value, dict) or set(value) != set(names):
        raise ValueError(f"not an object with exactly the keys {', '.join(names)}")
    for name in names:
        score = value[name]
        if isinstance(score, bool) or not isinstance(score, int | float) or not 0 <= score <= 100:
            raise ValueError(f"{name} is not a number from 0 to 100")
    return {name: float(value[name]) for name in names}


def retry_after_s(header: str | None, now: datetime) -> float | None:
    """Seconds that a Retry-After header (seconds or an HTTP date) asks to wait, >= 0; None for none or a wrong one."""
    if header is None:
        return None
    if header.isascii() and header.isdecimal():
        return float(header)
    try:
        moment = parsedate_to_datetime(header)
    except ValueError:
        return None
    # A date in "-0000" is in UTC but comes back without a zone.
    moment = moment if moment.tzinfo else moment.replace(tzinfo=UTC)
    return max(0.0, (moment - now).total_seconds())


def _text_of(body: bytes) -> str:
    """Text of the first choice; "" where the body is not a chat completion, which then counts as malformed."""
    try:
        text = json.loads(body)["choices"][0]["message"]["content"]
    except (ValueError, KeyError, IndexError, TypeError):
        return ""
    return text if isinstance(text, str) else ""
