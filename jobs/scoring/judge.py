"""A language model as judge, over any OpenAI-style chat-completions endpoint."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Sequence
from functools import partial

from jobs.scoring.chat import Ask, Chat, ChatSettings

ANSWERS_A_PROMPT = 3


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

        Raises: RuntimeError with the counts where any item stays unscored; as `Chat.each`.
        """
        scores = self._chat.each(prompts, partial(_scored, names))
        scored = [score for score in scores if score is not None]
        if len(scored) < len(scores):
            raise RuntimeError(
                f"The judge {self._model} left {len(scores) - len(scored)} of {len(scores)} items unscored "
                f"after {ANSWERS_A_PROMPT} malformed answers each; a score over the rest would mislead."
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
