"""Fixtures shared by all tests: a random model and a byte-level tokenizer, both made on the spot."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import pytest
from hypothesis import settings

if TYPE_CHECKING:
    from cluster.generation import Completion, Sampling

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
# A shell starts what it puts in the background with Ctrl-C ignored, and the commands that the tests start inherit that.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)
# A busy machine is no failure of a property.
settings.register_profile("rayward", deadline=None)
settings.load_profile("rayward")


@pytest.fixture(scope="session")
def tiny_tokenizer():
    """One token a byte, plus <pad>, <bos> and <eos>; no text is unknown to it."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    specials = ["<pad>", "<bos>", "<eos>"]
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={token: i for i, token in enumerate(specials + alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", bos_token="<bos>", eos_token="<eos>", padding_side="left"
    )


@pytest.fixture(scope="session")
def tiny_model(tiny_tokenizer):
    """A random Llama of 2 layers, in float32 and evaluation mode; do not train it, it is shared."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tiny_tokenizer),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=1024,
        pad_token_id=tiny_tokenizer.pad_token_id,
        bos_token_id=tiny_tokenizer.bos_token_id,
        eos_token_id=tiny_tokenizer.eos_token_id,
        # The default of 0.02 leaves every distribution nearly uniform, which hides mistakes.
        initializer_range=0.3,
    )
    return LlamaForCausalLM(config).eval()


class FakeGenerator:
    """A Generator that says the given texts in turn, ending each before a stop string, and keeps what it was asked."""

    def __init__(self, tokenizer, texts: Sequence[str]) -> None:
        self.tokenizer = tokenizer
        self.texts = list(texts)
        self.prompts: list[str] = []
        self.sampling: Sampling | None = None

    def generate(self, prompts: Sequence[Sequence[int]], sampling: Sampling) -> list[list[Completion]]:
        from cluster.generation import Completion

        self.sampling = sampling
        self.prompts += [self.tokenizer.decode(prompt) for prompt in prompts]
        answers = []
        for text, _ in zip(self.texts, prompts, strict=True):
            cut = min([text.find(stop) for stop in sampling.stop if stop in text], default=len(text))
            answers.append([Completion(self.tokenizer(text[:cut]).input_ids, text[:cut], "stop")])
        return answers


@pytest.fixture
def fake_generator(tiny_tokenizer) -> Callable[..., FakeGenerator]:
    """Makes a Generator of fixed texts, over the tiny tokenizer unless another is given."""
    return lambda texts, tokenizer=tiny_tokenizer: FakeGenerator(tokenizer, texts)
