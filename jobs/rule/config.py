"""The dials of RULE. Base values are the paper's (RULE, experimental settings); profiles fit them to a machine."""

from typing import Literal

from pydantic import Field, model_validator

from cluster.config import Section, TrainingConfig
from jobs.scoring.chat import ChatSettings
from jobs.scoring.entailment import EntailmentSettings

MOST = 1_000_000  # of anything counted: a slip of the finger ends here, before it fills the memory


class Steering(Section):
    """Stage 1, rejection steering: cross-entropy on refusals of forget questions."""

    learning_rate: float = Field(default=4e-7, gt=0)
    epochs: float = Field(default=3, gt=0, le=MOST)
    stop_after_epochs: float | None = Field(default=2, gt=0, le=MOST)
    batch_size: int = Field(default=8, ge=1, le=MOST)
    warmup_steps: int = Field(default=20, ge=0, le=MOST)
    schedule: Literal["cosine", "constant"] = "cosine"
    max_tokens: int = Field(default=512, ge=16, le=MOST)
    stop_at_refusal: float | None = Field(default=None, gt=0, le=1)
    check_every: int = Field(default=4, ge=1, le=MOST)


class Reward(Section):
    """The rule-based reward of stage 2."""

    design: str = "forget_two_stage_abs_target"
    rouge_threshold: float | None = Field(default=None, ge=0, lt=1)
    target_bonus: float = Field(default=0.5, ge=0, le=1)
    behave_weight: float = Field(default=0.7, ge=0, le=1)


class Boundary(Section):
    """Which boundary questions stage 2 learns from; the defaults leave the data as they are."""

    kind: Literal["near", "far", "none"] = "near"
    ratio: float | None = Field(default=None, ge=0, le=100)
    fill_in: bool = True

    @model_validator(mode="after")
    def _none_has_no_ratio(self) -> "Boundary":
        if self.kind == "none" and self.ratio:
            raise ValueError(f"kind = none has no boundary question; ratio = {self.ratio:g} asks for some; drop one")
        return self


class Rebo(Section):
    """Stage 2, refusal boundary optimisation: on-policy GRPO over forget and boundary questions."""

    start: Literal["steered", "original"] = "steered"
    advantage: Literal["grpo", "rloo", "reinforce_plus_plus"] = "grpo"
    learning_rate: float = Field(default=2e-6, gt=0)
    weight_decay: float = Field(default=1e-2, ge=0)
    max_grad_norm: float = Field(default=1.0, gt=0)
    steps: int = Field(default=20, ge=1, le=MOST)
    stop_at_silent: float | None = Field(default=None, gt=0, le=1)
    prompts_per_step: int = Field(default=32, ge=1, le=MOST)
    completions_per_prompt: int = Field(default=8, le=MOST)
    updates_per_rollout: int = Field(default=1, ge=1, le=MOST)
    kl_coefficient: float = Field(default=1e-2, ge=0)
    reference: Literal["steered", "original"] = "steered"
    clip_low: float = Field(default=0.2, gt=0, lt=1)
    clip_high: float = Field(default=0.3, gt=0)
    dual_clip: float = Field(default=3.0, gt=1)
    temperature: float = Field(default=1.0, gt=0)
    top_p: float = Field(default=1.0, gt=0, le=1)
    max_prompt_tokens: int = Field(default=512, ge=1, le=MOST)
    max_completion_tokens: int = Field(default=1024, ge=1, le=MOST)
    reward: Reward = Reward()

    @model_validator(mode="after")
    def _group_has_a_spread(self) -> "Rebo":
        if self.completions_per_prompt < 2:
            raise ValueError(
                f"completions_per_prompt must be at least 2, got {self.completions_per_prompt}: "
                "the advantage compares the completions of one prompt"
            )
        return self

    @model_validator(mode="after")
    def _reference_exists(self) -> "Rebo":
        if self.start == "original" and self.reference == "steered":
            raise ValueError("start = original makes no steered model to refer to; set rule.rebo.reference=original")
        return self


class Baseline(Section):
    """The other methods; a null stands for the method's own value (`jobs.rule.methods`)."""

    learning_rate: float | None = Field(default=None, gt=0)
    epochs: float = Field(default=3, gt=0, le=MOST)
    batch_size: int | None = Field(default=None, ge=1, le=MOST)
    warmup_steps: int = Field(default=20, ge=0, le=MOST)
    schedule: Literal["cosine", "constant"] = "cosine"
    max_grad_norm: float = Field(default=1.0, gt=0)
    max_tokens: int = Field(default=512, ge=16, le=MOST)
    retain_coefficient: float = Field(default=1.0, ge=0)
    beta: float | None = Field(default=None, gt=0)
    gamma: float = Field(default=2.0, ge=0)
    rmu_layer: int | None = Field(default=None, ge=0)
    rmu_scale: float = Field(default=6.5, gt=0)
    rmu_alpha: float = Field(default=1200.0, ge=0)


class Passages(Section):
    """The texts that `python -m jobs.rule passages` has the original model write for the baselines."""

    count: int = Field(default=582, ge=1, le=MOST)
    max_new_tokens: int = Field(default=512, ge=8, le=MOST)
    temperature: float = Field(default=1.0, gt=0)


class Evaluation(Section):
    """What is asked before, between and after the stages."""

    prompt_form: Literal["rwku", "plain"] = "rwku"
    max_new_tokens: int = Field(default=64, ge=1, le=MOST)
    known_threshold: float = Field(default=0.5, ge=0, le=1)
    neighbors: int | None = Field(default=None, ge=1, le=MOST)
    max_batch_tokens: int = Field(default=4096, ge=64, le=MOST)
    entailment: EntailmentSettings | None = None
    judge: ChatSettings | None = None


class Attack(Section):
    """What `python -m jobs.rule attack` does to a model."""

    samples: int = Field(default=8, ge=1, le=MOST)
    temperature: float = Field(default=1.0, gt=0)
    bits: tuple[Literal[4, 8], ...] = (8, 4)
    relearn_answers: int = Field(default=8, ge=1, le=MOST)
    relearn_steps: int = Field(default=20, ge=1, le=MOST)
    relearn_every: int = Field(default=5, ge=1, le=MOST)
    relearn_learning_rate: float = Field(default=1e-5, gt=0)


class TraceSettings(Section):
    """How often a training is asked what it still knows, which draws its path (`jobs.rule.trace`)."""

    every: int | None = Field(default=None, ge=1, le=MOST)
    probes: int | None = Field(default=None, ge=1, le=MOST)
    naturalness: bool = False


class Rule(Section):
    """What to unlearn from which model."""

    model: str = "embedded:smollm2-135m"
    revision: str | None = None
    data: str = "demo"
    target: str | None = None
    method: str = "RULE"
    chat_template: Literal["model", "in_context"] = "model"
    held_out_share: float = Field(default=0.0, ge=0, lt=1)
    seed: int = Field(default=42, ge=0, lt=2**32)
    boundary: Boundary = Boundary()
    steering: Steering = Steering()
    rebo: Rebo = Rebo()
    baseline: Baseline = Baseline()
    passages: Passages = Passages()
    trace: TraceSettings = TraceSettings()
    attack: Attack = Attack()
    evaluation: Evaluation = Evaluation()

    @property
    def stop(self) -> tuple[str, ...]:
        """What ends a sampled completion beside the end token: a base model would go on with a question of its own."""
        return ("\n",) if self.chat_template == "in_context" else ()

    @model_validator(mode="after")
    def _asked_in_one_form(self) -> "Rule":
        if self.chat_template == "in_context" and self.evaluation.prompt_form == "rwku":
            raise ValueError(
                "chat_template = in_context asks every question in that form; set rule.evaluation.prompt_form=plain"
            )
        return self


class RuleConfig(TrainingConfig):
    """The whole configuration of `python -m jobs.rule`."""

    rule: Rule = Rule()
