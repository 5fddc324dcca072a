"""Representation misdirection: activations on forget texts are driven to a random direction (Li et al. 2024, WMDP)."""

from jaxtyping import Float
from torch import Tensor

from jobs.rule.methods.base import Defaults, Method, Step


def rmu_loss(
    forget: Float[Tensor, "tokens hidden"],
    target: Float[Tensor, " hidden"],
    retain: Float[Tensor, "kept hidden"],
    original: Float[Tensor, "kept hidden"],
    alpha: float,
    shares: tuple[Float[Tensor, ""] | float, Float[Tensor, ""] | float] = (1.0, 1.0),
) -> Float[Tensor, ""]:
    """mean (h_forget - c u)^2 + alpha mean (h_retain - h_original)^2, means over tokens and coordinates.

    `shares`: of the two corpora, as in `Step.share`.
    """
    away = (forget.float() - target).square().mean()
    kept = (retain.float() - original.float()).square().mean()
    return shares[0] * away + alpha * shares[1] * kept


def _objective(step: Step) -> Tensor:
    forget, _ = step.activations("forget")
    retain, original = step.activations("retain")
    settings = step.settings
    shares = step.share("forget"), step.share("retain")
    return rmu_loss(forget, settings.rmu_scale * step.direction(), retain, original, settings.rmu_alpha, shares)


METHOD = Method(
    name="RMU",
    source="Li et al. 2024, The WMDP Benchmark, section 4 and its published settings",
    objective=_objective,
    corpora=("forget", "retain"),
    defaults=Defaults(learning_rate=5e-5, batch_size=4),
    needs_original_model=True,
    trains="mlp.down_proj",
)
