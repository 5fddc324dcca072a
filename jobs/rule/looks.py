"""A training's looks at what its model still knows, as Ray Train runs them on every worker."""

from collections.abc import Callable
from itertools import chain
from typing import TYPE_CHECKING

from transformers import TrainerCallback

from cluster import training
from cluster.generation import Generator
from cluster.report import write_json
from jobs.rule.probes import ask
from jobs.rule.trace import LAST_LOOK, Trace, scores

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase, TrainerControl, TrainerState


class Looks(TrainerCallback):
    """Asks the model in training, the probes dealt to the ranks.

    The means go to the recorder and to Ray Train, the scores of the last look stand in the run's folder. `engine` gives
    the engine with the model's present weights; `done` is called when the answers are there.
    """

    def __init__(
        self,
        trace: Trace,
        tokenizer: "PreTrainedTokenizerBase",
        recorder: training.Recorder,
        engine: Callable[[], Generator],
        done: Callable[[], None] = lambda: None,
    ) -> None:
        self.trace, self.tokenizer, self.recorder, self.engine, self.done = trace, tokenizer, recorder, engine, done
        self.last = 0

    def on_step_end(self, args: object, state: "TrainerState", control: "TrainerControl", **_: object) -> None:
        """Told by the trainer."""
        if state.global_step % self.trace.every == 0:
            self._look(state.global_step)

    def on_train_end(self, args: object, state: "TrainerState", control: "TrainerControl", **_: object) -> None:
        """Told by the trainer, also where a stage ends before its last step."""
        if state.global_step != self.last:
            self._look(state.global_step)

    def _look(self, step: int) -> None:
        import ray.train

        self.last = step
        mine = self.trace.probes[training.rank() :: training.world_size()]
        answers = ask(self.engine(), self.tokenizer, mine, self.trace.settings, self.trace.stop) if mine else []
        self.done()
        parts = training.gathered(scores(answers))
        found = {axis: list(chain.from_iterable(part[axis] for part in parts)) for axis in parts[0]}
        means = {axis: sum(values) / len(values) for axis, values in found.items()}
        self.recorder.record(step, means)
        if training.rank() == 0:
            write_json({"step": step, "scores": found}, self.recorder.folder / LAST_LOOK)
        ray.train.report({"step": step} | means)
