"""A training's looks at what its model still knows, as Ray Train runs them on every worker."""

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from transformers import TrainerCallback

from cluster import training
from cluster.config import Train
from cluster.generation import Generator
from cluster.models import scoring_model
from cluster.recorder import Recorder, rank
from cluster.report import write_json
from jobs.rule.data import FORGET_KINDS
from jobs.rule.probes import Answer, as_asked, ask, leaked, probe_ids
from jobs.rule.trace import Trace, look_file, scores

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase, TrainerControl, TrainerState, TrainingArguments


class Looks(TrainerCallback):
    """Asks the model in training, the probes dealt to the ranks.

    The means go to the recorder and to Ray Train, the scores of each look into the run's folder. `engine` gives the
    engine with the model's present weights; `done` is called when the answers are there.
    """

    def __init__(
        self,
        trace: Trace,
        train: Train,
        tokenizer: "PreTrainedTokenizerBase",
        recorder: Recorder,
        engine: Callable[[], Generator],
        done: Callable[[], None] = lambda: None,
    ) -> None:
        self.trace, self.train, self.tokenizer, self.recorder = trace, train, tokenizer, recorder
        self.engine, self.done = engine, done
        self.last = 0

    def on_step_end(
        self, args: "TrainingArguments", state: "TrainerState", control: "TrainerControl", **_: object
    ) -> None:
        """Told by the trainer."""
        if state.global_step % self.trace.every == 0:
            self._look(state.global_step)

    def on_train_end(
        self, args: "TrainingArguments", state: "TrainerState", control: "TrainerControl", **_: object
    ) -> None:
        """Told by the trainer, also where a stage ends before its last step."""
        if state.global_step != self.last:
            self._look(state.global_step)

    def _look(self, step: int) -> None:
        import ray.train

        self.last = step
        probes, world = self.trace.probes, training.world_size()
        mine = probes[rank() :: world]
        engine = self.engine()  # by every rank, also one without a probe: bringing in the weights may take all
        answers = ask(engine, self.tokenizer, mine, self.trace.settings, self.trace.stop) if mine else []
        self.done()
        recalls = [leaked(a.completion, a.probe.answer) if self.trace.attacks else a.rouge_l_recall for a in answers]
        mine_scored = list(zip(recalls, self._natural(answers), strict=True))
        scored = [(0.0, 0.0)] * len(probes)
        for place, part in enumerate(training.gathered(mine_scored)):
            scored[place::world] = part
        recalls, natural = zip(*scored, strict=True)
        found = scores(probes, recalls, natural if self.trace.original is not None else None)
        means = {axis: sum(values) / len(values) for axis, values in found.items()}
        self.recorder.record(step, means)
        if rank() == 0:
            write_json(found, look_file(self.recorder.folder, step))
        ray.train.report({"step": step} | means)

    def _natural(self, answers: Sequence[Answer]) -> list[float]:
        """Naturalness of each answer, 0 to 1; 0 where it is not asked for, and of all but forget ones."""
        from jobs.rule.naturalness import Answered, dictionary_of, naturalness, perplexities

        found = [0.0] * len(answers)
        chosen = [index for index, answer in enumerate(answers) if answer.probe.kind in FORGET_KINDS]
        if self.trace.original is None or not chosen:
            return found
        original = scoring_model(self.trace.original, self.train)
        settings = self.trace.settings
        prompts = [probe_ids(self.tokenizer, answers[i].probe, settings.prompt_form) for i in chosen]
        texts = [answers[i].completion for i in chosen]
        openings = [as_asked(answers[i].probe, settings.prompt_form)[1] for i in chosen]
        fluency = perplexities(original, self.tokenizer, prompts, texts, openings, settings.max_batch_tokens)
        asked = [
            Answered(answers[i].probe.query, answers[i].completion, self.trace.target, answers[i].probe.answer)
            for i in chosen
        ]
        for index, score in zip(chosen, naturalness(asked, fluency, dictionary_of(self.tokenizer)), strict=True):
            found[index] = score.all / 100
        return found
