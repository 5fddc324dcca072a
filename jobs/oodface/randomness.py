"""Random numbers that depend on an image's key and nothing else: not on the batch, its order, the worker or the device.

A counter-based generator in 32-bit integer arithmetic, which wraps alike everywhere: element i of call s of a sample is
a hash of (i, s, key). Generators of torch draw other numbers on a GPU than on a CPU, and in another order in another
batch. Floating-point functions of the bits (logarithm, cosine) agree between devices to about 1e-6.
"""

import hashlib
import math
from collections.abc import Sequence

import torch
from jaxtyping import Float, Int
from torch import Tensor

GOLDEN = 0x9E3779B9  # 2^32 / golden ratio: steps that spread over all keys
FIRST, SECOND = 0x21F0AAAD, 0x735A2D97  # multipliers of a two-round finaliser (C. Wellons, "hash prospector")
WORD = 1 << 32


def key(image_id: str, scenario: str, severity: int, seed: int = 0) -> int:
    """A sample's 64-bit key, from -2^63 to 2^63 - 1."""
    text = f"{seed}\0{scenario}\0{severity}\0{image_id}".encode()
    return int.from_bytes(hashlib.blake2b(text, digest_size=8).digest(), "little", signed=True)


def keys(image_ids: Sequence[str], scenario: str, severity: int, seed: int = 0) -> Int[Tensor, " batch"]:
    """The keys of several images, as int64."""
    return torch.tensor([key(one, scenario, severity, seed) for one in image_ids], dtype=torch.int64)


class Random:
    """Draws for a batch of samples; every call gives new numbers, the same ones for the same keys and order of calls.

    Args:
        keys: (batch,) int64, one a sample.
        device: where the numbers are wanted.
    """

    def __init__(self, keys: Int[Tensor, " batch"], device: torch.device | str = "cpu") -> None:
        self.low, self.high = (keys & (WORD - 1)).cpu(), ((keys >> 32) & (WORD - 1)).cpu()
        self.device = torch.device(device)
        self.calls = 0

    def __len__(self) -> int:
        return len(self.low)

    def bits(self, *shape: int) -> Int[Tensor, "batch ..."]:
        """(batch, *shape) int32, each of the 2^32 values as likely as another."""
        self.calls += 1
        # on int64 and for one number a sample only: the two halves of the key, spread by the number of the call
        before = _spread(self.low + self.calls * GOLDEN)
        between = _spread(self.high ^ _spread(before + self.calls))
        count = math.prod(shape)
        steps = torch.arange(count, dtype=torch.int32, device=self.device)
        word = steps + _signed(before).to(self.device)[:, None]
        shifted = torch.empty_like(word)
        _fold(word, 16, shifted).mul_(_wrapped(FIRST)).bitwise_xor_(_signed(between).to(self.device)[:, None])
        _fold(word, 15, shifted).mul_(_wrapped(SECOND))
        _fold(word, 15, shifted)
        return word.view(len(self), *shape)

    def uniform(self, *shape: int, low: float = 0.0, high: float = 1.0) -> Float[Tensor, "batch ..."]:
        """(batch, *shape) float32, uniform in [low, high), in steps of 2^-23 of the range."""
        return unit(self.bits(*shape)).mul_(high - low).add_(low)

    def integers(self, low: int, high: int, *shape: int) -> Int[Tensor, "batch ..."]:
        """(batch, *shape) int64, uniform in [low, high), at most 2^31 values, each to 2^-32."""
        return (self.bits(*shape).to(torch.int64) & (WORD - 1)).mul_(high - low).bitwise_right_shift_(32).add_(low)

    def normal(self, *shape: int) -> Float[Tensor, "batch ..."]:
        """(batch, *shape) float32, standard normal by Box and Muller; no value lies beyond 5.7."""
        count = math.prod(shape)
        half = (count + 1) // 2
        drawn = unit(self.bits(2, half))
        radius = drawn[:, 0].neg().add_(1).log_().mul_(-2).sqrt_()
        angle = drawn[:, 1].mul_(2 * math.pi)
        pair = torch.empty_like(drawn)
        torch.cos(angle, out=pair[:, 0]).mul_(radius)
        torch.sin(angle, out=pair[:, 1]).mul_(radius)
        return pair.view(len(self), -1)[:, :count].reshape(len(self), *shape)


def unit(bits: Int[Tensor, "..."]) -> Float[Tensor, "..."]:
    """Floats in [0, 1) from the lower 23 bits of int32 words, overwritten: those become the mantissa of [1, 2)."""
    return bits.bitwise_and_(0x7FFFFF).bitwise_or_(0x3F800000).view(torch.float32).sub_(1)


def remixed(bits: Int[Tensor, "batch ..."]) -> Int[Tensor, "batch ..."]:
    """Other words, one from each, for a second draw of an element that seldom needs one."""
    word = bits * _wrapped(FIRST)
    return _fold(word, 16, torch.empty_like(word)).mul_(_wrapped(SECOND)).bitwise_xor_(bits)


def _fold(word: Int[Tensor, "batch count"], by: int, shifted: Int[Tensor, "batch count"]) -> Int[Tensor, "batch count"]:
    """word ^= word >>> by, in place; `shifted` is scratch, for allocating costs as much as computing."""
    torch.bitwise_right_shift(word, by, out=shifted)
    shifted.bitwise_and_((1 << (32 - by)) - 1)  # makes the shift a logical one
    return word.bitwise_xor_(shifted)


def _spread(word: Int[Tensor, " batch"]) -> Int[Tensor, " batch"]:
    """A bijection of 32 bits, on int64: the finaliser that `bits` uses on int32."""
    word = word & (WORD - 1)
    word = ((word ^ (word >> 16)) * FIRST) & (WORD - 1)
    word = ((word ^ (word >> 15)) * SECOND) & (WORD - 1)
    return word ^ (word >> 15)


def _signed(word: Int[Tensor, " batch"]) -> Int[Tensor, " batch"]:
    return torch.where(word >= WORD // 2, word - WORD, word).to(torch.int32)


def _wrapped(constant: int) -> int:
    return constant - WORD if constant >= WORD // 2 else constant
