"""A training's looks at what its model still knows, as Ray Train runs them on every worker."""

from collections.abc import Callable
from typing import TYPE_CHECKING

from transformers import TrainerCallback

from cluster import training
from cluster.generation import Generator
from cluster.report import write_json
from jobs.rule.probes import ask
from jobs.rule.trace import Trace, look_file, scores

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase, TrainerControl, TrainerState


class Looks(TrainerCallback):
    """Asks the model in training, the probes dealt to the ranks.

    The means go to the recorder and to Ray Train, the scores of each look into the run's folder. `engine` gives the
    engine with the model's present weights; `done` is called when the answers are there.
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
        probes, world = self.trace.probes, training.world_size()
        mine = probes[training.rank() :: world]
        engine = self.engine()  # by every rank, also one without a probe: bringing in the weights may take all
        answers = ask(engine, self.tokenizer, mine, self.trace.settings, self.trace.stop) if mine else []
        self.done()
        recalls = [0.0] * len(probes)
        for rank, part in enumerate(training.gathered([answer.rouge_l_recall for answer in answers])):
            recalls[rank::world] = part
        found = scores(probes, recalls)
        means = {axis: sum(values) / len(values) for axis, values in found.items()}
        self.recorder.record(step, means)
        if training.rank() == 0:
            write_json(found, look_file(self.recorder.folder, step))
        ray.train.report({"step": step} | means)
