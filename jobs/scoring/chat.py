"""A client for any OpenAI-style chat-completions endpoint, many questions at once, patient within a deadline."""

from __future__ import annotations

import ipaddress
import json
import os
import re
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from typing import TYPE_CHECKING, Annotated, Any, TypeVar

from pydantic import Field

from cluster.config import Section
from cluster.errors import JobFailure, UserError

if TYPE_CHECKING:
    import httpx

_MAX_RESPONSE_BYTES = 2**20
_RETRIED_STATUS = frozenset({408, 409, 425, 429})  # and whatever a server says of itself, from 500 on
_FIRST_BACKOFF_S = 0.5
_EXCERPT = 200  # characters of a refusal that are told
_MODERATED = (
    r"content.?(filter|policy|management)|moderation|(input|prompt|content|image)\w* (was|were|is|has been) flagged"
)
# a 403 may also speak of an account
_FILTERED = {status: re.compile(_MODERATED, re.IGNORECASE) for status in (403, 422)}
_FILTERED[400] = re.compile(f"{_MODERATED}|flagged|safety", re.IGNORECASE)
_UNSUPPORTED = re.compile(r"unsupported|not support|only the default", re.IGNORECASE)

Message = dict[str, Any]
Ask = Callable[[Sequence[Message]], str | None]
Item = TypeVar("Item")
Result = TypeVar("Result")


class ChatSettings(Section):
    """Where an endpoint is and how long to wait for it.

    base_url: of the API, up to and without "/chat/completions", for example "https://host/v1"; without secrets, for
        it stands in reports.
    model: the name that the endpoint serves.
    token_env: environment variable that holds the bearer token; none where the endpoint asks for none.
    timeout_s: of one HTTP request.
    deadline_s: of one item with all its requests, retries and waits.
    max_tokens: of one answer.
    concurrency: items in flight at once.
    """

    base_url: Annotated[str, Field(pattern=r"^https?://[^@?#\s]+$")]
    model: Annotated[str, Field(min_length=1)]
    token_env: str | None = None
    timeout_s: Annotated[float, Field(gt=0)] = 60.0
    deadline_s: Annotated[float, Field(gt=0)] = 300.0
    max_tokens: Annotated[int, Field(ge=1)] = 200
    concurrency: Annotated[int, Field(ge=1)] = 8


class Chat:
    """Asks at temperature 0, or at the endpoint's own where it takes no other, as OpenAI's reasoning models do.

    Args:
        settings: the endpoint; its token is read from the environment here and appears in no message or log.
        role: what messages call the endpoint, as "the judge".
        sleep: of waits between attempts; the default ends early once another item has failed.
        clock: that the deadlines are measured by, seconds.
    Raises: UserError where `token_env` names an unset variable, or `base_url` is no address.
    """

    def __init__(
        self,
        settings: ChatSettings,
        role: str,
        sleep: Callable[[float], object] | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        import httpx

        self._settings = settings
        self._url = f"{settings.base_url.rstrip('/')}/chat/completions"
        self._who = f"{role[:1].upper()}{role[1:]} at {self._url}"
        self._sleep = sleep
        self._clock = clock
        self._dials: dict[str, Any] = {"temperature": 0, "max_tokens": settings.max_tokens}
        try:
            host = httpx.URL(self._url).host
        except httpx.InvalidURL as error:
            raise UserError(f"The base_url of {role}, {settings.base_url}, is no address ({error}).") from None
        self._proxied = host != "localhost" and not _is_loopback(host)
        self._headers = {}
        if settings.token_env is not None:
            token = os.environ.get(settings.token_env)
            if not token:
                raise UserError(
                    f"The environment variable {settings.token_env}, which the token_env of {role} names, is not set; "
                    "set it to the bearer token or leave token_env out."
                )
            token = token.strip()
            if not (token.isascii() and token.isprintable()):
                raise UserError(
                    f"The environment variable {settings.token_env}, which the token_env of {role} names, holds no "
                    "token: it has characters that no header can carry; set it to the bearer token alone."
                )
            self._headers = {"Authorization": f"Bearer {token}"}

    def each(self, items: Sequence[Item], talk: Callable[[Ask, Item], Result]) -> list[Result]:
        """What `talk(ask, item)` gives for each item, in order, several at once.

        `ask(messages)` is the text of one completion: "" where it has none or a filter of the endpoint refused it (by a
        400, 403 or 422 that says so), None where the response is no completion at all. Busy or failing endpoints are
        retried with growing waits, a 429 or 503 after the time it names, all within `deadline_s` an item.

        Raises: JobFailure where the endpoint stays unreachable or busy beyond the deadline; UserError where it refuses
            the request or the token; whatever `talk` raises.
        """
        import httpx

        stop = threading.Event()
        try:
            # Loopback never goes through the proxy that the environment may name.
            connection = httpx.Client(headers=self._headers, trust_env=self._proxied)
        except (ImportError, ValueError, OSError, httpx.InvalidURL) as error:
            told = "the proxy or certificates that the environment names cannot be used"
            raise UserError(f"{self._who} cannot be asked: {told} ({str(error).splitlines()[0]}).") from None
        with (
            connection as client,
            ThreadPoolExecutor(self._settings.concurrency) as pool,
        ):

            def one(item: Item) -> Result:
                deadline = self._clock() + self._settings.deadline_s
                return talk(lambda messages: self._ask(client, stop, messages, deadline), item)

            futures = [pool.submit(one, item) for item in items]
            try:
                ended, _ = wait(futures, return_when=FIRST_EXCEPTION)
                # What failed first is told, not what was given up because of it.
                for future in ended:
                    future.result()
                return [future.result() for future in futures]
            finally:
                stop.set()
                pool.shutdown(wait=False, cancel_futures=True)

    def _ask(
        self, client: httpx.Client, stop: threading.Event, messages: Sequence[Message], deadline: float
    ) -> str | None:
        import httpx

        body = {"model": self._settings.model, "messages": list(messages)}
        dials = self._dials
        backoff = _FIRST_BACKOFF_S
        while not stop.is_set():
            pause = None
            try:
                status, headers, content = self._post(client, body | dials, deadline)
            except httpx.RequestError as error:
                trouble = f"the last attempt failed with {type(error).__name__}"
            else:
                if 200 <= status < 300:
                    return _text_of(content)
                said = content.decode(errors="replace")
                if status == 400 and (accepted := _accepted(dials, said)) != dials:
                    dials = self._dials = accepted
                    continue
                if _filtered(status, said):
                    return ""
                if status not in _RETRIED_STATUS and status < 500:
                    raise UserError(self._refusal(status, content))
                trouble = f"the last answer was HTTP {status}"
                pause = retry_after_s(headers.get("Retry-After"), datetime.now(UTC))
            if not pause:  # a moment in the past is no invitation to hammer
                pause, backoff = backoff, 2 * backoff
            if self._clock() + pause >= deadline:
                raise JobFailure(f"{self._who} gave no answer within {self._settings.deadline_s:g} s: {trouble}.")
            (self._sleep or stop.wait)(pause)
        raise JobFailure(f"{self._who} was given up after another question had failed.")

    def _post(
        self, client: httpx.Client, body: dict[str, Any], deadline: float
    ) -> tuple[int, httpx.Headers, bytes | bytearray]:
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
        return response.status_code, response.headers, content

    def _refusal(self, status: int, content: bytes | bytearray) -> str:
        if status in (401, 403):
            named = self._settings.token_env or "token_env, which is not configured"
            return f"{self._who} refused the token (HTTP {status}); correct the one in {named}."
        said = content.decode(errors="replace")
        for secret in self._headers.values():
            said = said.replace(secret.removeprefix("Bearer "), "***")
        said = " ".join(said.split())[:_EXCERPT]
        return (
            f"{self._who} refused the request for model {self._settings.model} (HTTP {status}"
            f"{f': {said}' if said else ''}); correct base_url or model."
        )


def _accepted(dials: dict[str, Any], said: str) -> dict[str, Any]:
    """The dials as an endpoint takes them that refused some: OpenAI's reasoning models have another limit of tokens."""
    if not _UNSUPPORTED.search(said):
        return dials
    taken = dict(dials)
    if re.search(r"\bmax_tokens\b", said) and "max_tokens" in taken:
        taken["max_completion_tokens"] = taken.pop("max_tokens")
    if re.search(r"\btemperature\b", said):
        taken.pop("temperature", None)
    return taken


def _filtered(status: int, said: str) -> bool:
    """Whether an endpoint says that its filter refused a question; a page of a proxy is no such saying."""
    if status not in _FILTERED or not _FILTERED[status].search(said):
        return False
    try:
        return status == 400 or isinstance(json.loads(said), dict)
    except ValueError:
        return False


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


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def _text_of(body: bytes | bytearray) -> str | None:
    """Text of the first choice, "" where it has none; None where the body is no chat completion."""
    try:
        text = json.loads(body)["choices"][0]["message"]["content"]
    except (ValueError, KeyError, IndexError, TypeError):
        return None
    return text if isinstance(text, str) else ""
