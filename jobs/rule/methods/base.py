"""What a baseline is made of: the texts that it reads, its loss of a step, and the settings of its paper."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Literal, Protocol

from jaxtyping import Float
from torch import Tensor

if TYPE_CHECKING:
    from jobs.rule.config import Baseline

Corpus = Literal["forget", "retain", "fabricated", "refusal"]
RetainTerm = Literal["GDR", "KLR"]


@dataclass(frozen=True)
class Scored:
    """B texts as the model scores them: `logprobs` (B,) sums over a text's tokens, in nats; `tokens` (B,) counts them.

    `original` (B,) is what the model before unlearning gave; None unless the method says that it needs it.
    `token_logprobs` (T,) are those of each token, text after text, T = tokens.sum().
    `share` is what these tokens are of those that a worker has on average: with it, a mean over tokens becomes,
    averaged over the workers, the mean over the tokens of all.
    """

    logprobs: Float[Tensor, " texts"]
    tokens: Float[Tensor, " texts"]
    original: Float[Tensor, " texts"] | None = None
    share: Float[Tensor, ""] | float = 1.0
    token_logprobs: Float[Tensor, " all_tokens"] | None = None


class Step(Protocol):
    """What a method may ask of one optimiser step; nothing is computed before it is asked for."""

    settings: "Baseline"

    def scored(self, corpus: Corpus) -> Scored:
        """The step's texts of a corpus under the model in training."""
        ...

    def divergence(self, corpus: Corpus) -> Float[Tensor, " tokens"]:
        """KL(original || model) over the vocabulary at each token of the texts, in nats, times `Scored.share`."""
        ...

    def activations(self, corpus: Corpus) -> tuple[Float[Tensor, "tokens hidden"], Float[Tensor, "tokens hidden"]]:
        """What the steered block gives at each token of this worker's texts: in training, and in the original."""
        ...

    def share(self, corpus: Corpus) -> Float[Tensor, ""] | float:
        """What the tokens of this worker's texts are of those that a worker has on average (`Scored.share`)."""
        ...

    def direction(self) -> Float[Tensor, " hidden"]:
        """A random unit vector, the same in every step of a run."""
        ...


@dataclass(frozen=True)
class Defaults:
    """What a null in `rule.baseline` stands for: RULE's table of baselines, else the method's own paper."""

    learning_rate: float
    batch_size: int = 8
    beta: float = 0.1


@dataclass(frozen=True)
class Method:
    """A baseline.

    source: where its loss comes from. objective: a step's loss, without the retain term. corpora: what it reads, as
    many texts of each a step. needs_original: log-probabilities before unlearning (`Scored.original`).
    needs_original_model: the model before unlearning, for `Step.divergence` and `Step.activations`. trains: end of the
    names of the matrices that it changes, in the blocks up to the steered one; None changes all.
    """

    name: str
    source: str
    objective: Callable[[Step], Tensor]
    corpora: tuple[Corpus, ...]
    defaults: Defaults
    needs_original: bool = False
    needs_original_model: bool = False
    trains: str | None = None
    takes_retain_term: bool = False
    retain_term: RetainTerm | None = None

    def with_retain_term(self, term: RetainTerm) -> "Method":
        """The same with a term that holds the retain corpus."""
        return replace(
            self,
            name=f"{self.name}+{term}",
            retain_term=term,
            corpora=(*self.corpora, "retain"),
            needs_original_model=self.needs_original_model or term == "KLR",
        )
