"""A language model as judge, over any OpenAI-style chat-completions endpoint."""

from __future__ import annotations

import json
import re
import time
from collections.abc import Callable, Sequence
from functools import partial

from cluster.errors import JobFailure
from jobs.scoring.chat import Ask, Chat, ChatSettings

ANSWERS_A_PROMPT = 3
_EXCERPT = 200  # characters of an item that are told
_FENCE = re.compile(r"```(?:json)?\s*(.*?)\s*```", re.DOTALL)


class Judge:
    """Asks for named 0 to 100 scores, at temperature 0.

    Args and what it raises: as `Chat`.
    """

    def __init__(
        self,
        settings: ChatSettings,
        sleep: Callable[[float], object] | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._model = settings.model
        self._chat = Chat(settings, "the judge", sleep, clock)

    def score(self, prompts: Sequence[str], names: Sequence[str]) -> list[dict[str, float]]:
        """Scores of each prompt, in order, every one a number in [0, 100] under each of `names`.

        A malformed answer is asked for again, with what was wrong; after `ANSWERS_A_PROMPT` malformed answers the item
        is unscored.

        Raises: JobFailure with the counts and the first of them where any item stays unscored; as `Chat.each`.
        """
        scores = self._chat.each(prompts, partial(_scored, names))
        scored = [score for score in scores if score is not None]
        if len(scored) < len(scores):
            first = prompts[scores.index(None)][-_EXCERPT:]
            raise JobFailure(
                f"The judge {self._model} left {len(scores) - len(scored)} of {len(scores)} items unscored after "
                f"{ANSWERS_A_PROMPT} malformed answers each, and a score over the rest would mislead; take another "
                f"judge. The first item ends: {first!r}"
            )
        return scored


def _scored(names: Sequence[str], ask: Ask, prompt: str) -> dict[str, float] | None:
    form = json.dumps(dict.fromkeys(names, 0)).replace("0", "<number>")
    messages = [{"role": "user", "content": f"{prompt}\n\nAnswer with one JSON object and nothing else: {form}"}]
    for _ in range(ANSWERS_A_PROMPT):
        answer = ask(messages) or ""
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


def parse_scores(text: str, names: Sequence[str]) -> dict[str, float]:
    """Scores of an answer that is one JSON object with a number in [0, 100] under each name and no other.

    Nothing else may stand there but the fence of a code block around it.

    Raises: ValueError that says what is wrong.
    """
    fenced = _FENCE.fullmatch(text.strip())
    try:
        value = json.loads(fenced[1] if fenced else text)
    except json.JSONDecodeError:
        raise ValueError("not a JSON object alone") from None
    if not isinstance(value, dict) or set(value) != set(names):
        raise ValueError(f"not an object with exactly the keys {', '.join(names)}")
    for name in names:
        score = value[name]
        if isinstance(score, bool) or not isinstance(score, int | float) or not 0 <= score <= 100:
            raise ValueError(f"{name} is not a number from 0 to 100")
    return {name: float(value[name]) for name in names}
