"""The sizes of a model that memory depends on, read from its directory without loading a weight."""

import json
import math
import re
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path

from cluster.config import Lora
from cluster.errors import UserError


@dataclass(frozen=True)
class ModelShape:
    """What memory depends on. `linears` are name, inputs and outputs of each matrix inside the layers."""

    parameters: int
    layers: int
    hidden: int
    intermediate: int
    heads: int
    kv_heads: int
    head_dim: int
    vocabulary: int
    context: int
    linears: tuple[tuple[str, int, int], ...]

    @classmethod
    def of(cls, directory: Path) -> "ModelShape":
        """The model in a checked Hugging Face directory; only its configuration and safetensors headers are read."""
        from safetensors import safe_open
        from transformers import AutoConfig

        config = AutoConfig.from_pretrained(directory, local_files_only=True, trust_remote_code=False).get_text_config()
        shapes = {}
        for file in _weight_files(directory):
            with safe_open(file, framework="numpy") as tensors:
                shapes |= {name: tensors.get_slice(name).get_shape() for name in tensors.keys()}  # noqa: SIM118
        heads = config.num_attention_heads
        return cls(
            parameters=sum(math.prod(shape) for shape in shapes.values()),
            layers=config.num_hidden_layers,
            hidden=config.hidden_size,
            intermediate=getattr(config, "intermediate_size", None) or 4 * config.hidden_size,
            heads=heads,
            kv_heads=getattr(config, "num_key_value_heads", None) or heads,
            head_dim=getattr(config, "head_dim", None) or config.hidden_size // heads,
            vocabulary=config.vocab_size,
            context=config.max_position_embeddings,
            linears=tuple(
                (name.removesuffix(".weight"), shape[1], shape[0])
                for name, shape in shapes.items()
                if len(shape) == 2 and re.search(r"\.\d+\.", name)
            ),
        )

    def lora_parameters(self, lora: Lora) -> int:
        """Weights of the adapters: rank x (inputs + outputs) of each adapted matrix.

        Raises:
            UserError: no matrix has a name of the given form.
        """
        chosen = [
            inputs + outputs
            for name, inputs, outputs in self.linears
            if lora.target_modules == "all-linear" or re.fullmatch(lora.target_modules, name)
        ]
        if not chosen:
            example = self.linears[0][0] if self.linears else "model.layers.0.mlp.up_proj"
            raise UserError(
                f"train.lora.target_modules = {lora.target_modules} fits the name of no matrix of the model, such as "
                f"{example}; give a regular expression of whole names, or all-linear"
            )
        return lora.rank * sum(chosen)

    def matrices(self, ends: Collection[str]) -> int:
        """Weights of the matrices whose names, without ".weight", end in one of `ends`."""
        return sum(inputs * outputs for name, inputs, outputs in self.linears if name.endswith(tuple(ends)))


def _weight_files(directory: Path) -> list[Path]:
    """Those that transformers reads: some authors put the same weights beside them in another form."""
    index = directory / "model.safetensors.index.json"
    if index.exists():
        return sorted(
            {directory / name for name in json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()}
        )
    return sorted(file for file in directory.glob("*.safetensors") if not file.name.startswith("consolidated"))
