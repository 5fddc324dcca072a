"""A key-value cache with room to grow: transformers' own is copied whole for each token that it takes in."""

from typing import Any

import torch
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer


class RoomyLayer(DynamicLayer):
    """One layer's keys and values (B, heads, L, width): views into buffers that hold `room` tokens more."""

    def __init__(self, room: int) -> None:
        super().__init__()
        self.room = room
        self._buffers: list[torch.Tensor] = []

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Adds the states of the newest tokens (B, heads, new, width); returns those of all tokens."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        past, length = self.get_seq_length(), self.get_seq_length() + key_states.shape[-2]
        if not self._buffers or self._buffers[0].shape[-2] < length:
            pairs = zip((self.keys, self.values), (key_states, value_states), strict=True)
            self._buffers = [self._roomy(old, new, past) for old, new in pairs]
        for buffer, new in zip(self._buffers, (key_states, value_states), strict=True):
            buffer[:, :, past:length] = new
        self.keys, self.values = (buffer[:, :, :length] for buffer in self._buffers)
        return self.keys, self.values

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Each sequence `repeats` times."""
        self._buffers = []
        super().batch_repeat_interleave(repeats)

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        """Only the sequences `indices`."""
        self._buffers = []
        super().batch_select_indices(indices)

    def _roomy(self, old: torch.Tensor, new: torch.Tensor, past: int) -> torch.Tensor:
        batch, heads, added, width = new.shape
        buffer = new.new_empty(batch, heads, past + added + self.room, width)
        if past:
            buffer[:, :, :past] = old
        return buffer


def roomy_cache(config: Any, room: int) -> DynamicCache:
    """A cache for a model of `config`; layers of full attention take `room` tokens without being copied.

    Layers of other kinds (sliding windows, recurrent states) stay what transformers makes them.
    """
    cache = DynamicCache(config=config)
    cache.layers = [RoomyLayer(room) if type(layer) is DynamicLayer else layer for layer in cache.layers]
    return cache
