"""Whether one text entails another, by a natural language inference model of either usual kind.

A sequence classifier with an entailment label (any MNLI cross-encoder), or a sequence-to-sequence model in the manner
of TRUE, which reads "premise: ... hypothesis: ..." and writes "1" or "0".
Source: Honovich et al. 2022, TRUE; its use: Shen et al. 2025, arXiv 2504.14856, citation metrics (phi).
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from pydantic import Field

from cluster import models
from cluster.config import Section
from cluster.errors import UserError

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PretrainedConfig

SEQ2SEQ_TOKENS = 10  # TRUE's answer is one


class EntailmentSettings(Section):
    """Which model says it.

    model: a local directory, or a hub id owner/name with its `revision`.
    revision: commit of a hub id, 40 hexadecimal digits.
    threshold: probability of entailment, 0 to 1, from which on a pair counts.
    max_batch_tokens: most tokens, padding included, of one pass; a longer pair has a pass to itself.
    """

    model: Annotated[str, Field(min_length=1)]
    revision: str | None = None
    threshold: Annotated[float, Field(gt=0, le=1)] = 0.5
    max_batch_tokens: Annotated[int, Field(ge=64, le=1_000_000)] = 4096


def resolve_entailment(settings: EntailmentSettings, key: str) -> models.ModelSource:
    """Finds the model, as `cluster.models.resolve` does; `key` is the dotted key of `settings`.

    Raises:
        UserError: as there, and where the model is of neither kind.
    """
    if settings.model.startswith("embedded:"):
        raise UserError(f"{key}.model = {settings.model} writes text; name a natural language inference model")
    return models.resolve(settings.model, settings.revision, check=_check, key=f"{key}.revision")


class Entailment:
    """The model in `path` on `device`; pairs are (premise, hypothesis).

    A premise too long for it loses its beginning: what it says last is nearer to its claim. Where the hypothesis alone
    fills more than half of what the model takes, the longer of the two is cut.
    """

    def __init__(self, path: Path, settings: EntailmentSettings, device: str = "cpu") -> None:
        from transformers import AutoConfig, AutoTokenizer

        config = AutoConfig.from_pretrained(path, local_files_only=True, trust_remote_code=False)
        self.model = models.load_model(path, auto=_auto_class(path, config)).to(device)
        # Positions of a classifier count from the left, padding included.
        self.tokenizer = AutoTokenizer.from_pretrained(
            path, padding_side="right", truncation_side="left", local_files_only=True, trust_remote_code=False
        )
        self.settings = settings
        self.seq2seq = config.is_encoder_decoder and _label(config) is None
        self.label = _label(config)
        longest = getattr(config, "max_position_embeddings", None) or self.tokenizer.model_max_length
        if "roberta" in config.model_type:
            longest -= config.pad_token_id + 1  # its positions begin behind that of padding
        self.max_tokens = min(longest, self.tokenizer.model_max_length)

    def entails(self, pairs: Sequence[tuple[str, str]]) -> list[bool]:
        """phi(premise, hypothesis) of each pair."""
        return [value >= self.settings.threshold for value in self.probabilities(pairs)]

    def probabilities(self, pairs: Sequence[tuple[str, str]]) -> list[float]:
        """Probability of entailment of each pair, in [0, 1]; of a sequence-to-sequence model 0 or 1."""
        import torch

        encoded = [self._encoded(premise, hypothesis) for premise, hypothesis in pairs]
        lengths = [len(ids["input_ids"]) for ids in encoded]
        order = sorted(range(len(pairs)), key=lambda index: -lengths[index])
        values = [0.0] * len(pairs)
        with torch.inference_mode():
            while order:
                count = max(1, self.settings.max_batch_tokens // max(1, lengths[order[0]]))
                rows, order = order[:count], order[count:]
                batch = self.tokenizer.pad([encoded[row] for row in rows], return_tensors="pt").to(self.model.device)
                for row, value in zip(rows, self._scored(batch), strict=True):
                    values[row] = value
        return values

    def _encoded(self, premise: str, hypothesis: str) -> dict[str, list[int]]:
        if not self.seq2seq:
            long = 2 * len(self.tokenizer(hypothesis).input_ids) > self.max_tokens
            cut = "longest_first" if long else "only_first"
            return dict(self.tokenizer(premise, hypothesis, truncation=cut, max_length=self.max_tokens))
        ids = self.tokenizer(f"premise: {premise} hypothesis: {hypothesis}").input_ids
        if len(ids) > self.max_tokens:
            opening = self.tokenizer("premise:", add_special_tokens=False).input_ids[: self.max_tokens // 2]
            ids = [*opening, *ids[len(ids) - self.max_tokens + len(opening) :]]
        return {"input_ids": ids, "attention_mask": [1] * len(ids)}

    def _scored(self, batch: dict[str, Tensor]) -> list[float]:
        if not self.seq2seq:
            return self.model(**batch).logits.float().softmax(-1)[:, self.label].tolist()
        written = self.model.generate(**batch, max_new_tokens=SEQ2SEQ_TOKENS, do_sample=False)
        texts = self.tokenizer.batch_decode(written, skip_special_tokens=True)
        return [float(text.strip() == "1") for text in texts]


def _check(directory: Path) -> None:
    from transformers import AutoConfig

    models.require_files(directory)
    with models.foreign(directory, "config.json"):
        config = AutoConfig.from_pretrained(directory, local_files_only=True, trust_remote_code=False)
    models.check_directory(directory, auto=_auto_class(directory, config))


def _auto_class(directory: Path, config: PretrainedConfig) -> str:
    if _label(config) is not None:
        return "AutoModelForSequenceClassification"
    if config.is_encoder_decoder:
        return "AutoModelForSeq2SeqLM"
    raise UserError(
        f"model {directory} is no classifier with an entailment label and no sequence-to-sequence model; "
        "name a natural language inference model"
    )


def _label(config: PretrainedConfig) -> int | None:
    """Index of the label "entailment" of a sequence classifier."""
    if not any(name.endswith("ForSequenceClassification") for name in config.architectures or ()):
        return None
    found = [int(index) for index, name in config.id2label.items() if name.lower().startswith("entail")]
    return found[0] if found else None
