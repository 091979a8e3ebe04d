"""`MoaiState`: everything a pure-Mamba model remembers of the tokens it has read.

Its size does not depend on their number. The model never changes a state that it is given; it returns a new one, so
that a state can be kept, branched and saved. `get_seq_length` and `reorder_cache` are the two methods that
transformers' `generate` expects of a cache.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor


class MoaiState:
    """State of a model after some tokens.

    layers: one pair a layer, (conv (B, I, K-1): the last K-1 inputs of the causal convolution, oldest first; ssm (B, I,
    N) fp32). seen: (B,) int64, how many real tokens each row has read.
    """

    def __init__(self, layers: list[tuple[Tensor, Tensor]], seen: Tensor) -> None:
        self.layers = layers
        self.seen = seen

    @property
    def batch_size(self) -> int:
        """Number of rows, B."""
        return self.seen.shape[0]

    def _map(self, change) -> MoaiState:
        return MoaiState([(change(conv), change(ssm)) for conv, ssm in self.layers], change(self.seen))

    def select(self, rows: Tensor) -> MoaiState:
        """The state of the given rows (int64 indices or a boolean mask), in that order."""
        return self._map(lambda t: t[rows.to(t.device)])

    def clone(self) -> MoaiState:
        """A copy that shares no memory with this one."""
        return self._map(torch.Tensor.clone)

    def detach(self) -> MoaiState:
        """The same values cut from the autograd graph: what truncated backpropagation carries from chunk to chunk."""
        return self._map(torch.Tensor.detach)

    def to(self, device: torch.device | str) -> MoaiState:
        """The state on another device."""
        return self._map(lambda t: t.to(device))

    def tensors(self) -> dict[str, Tensor]:
        """Flat names to contiguous tensors, ready for safetensors: `seen`, `layers.0.conv`, `layers.0.ssm`, …"""
        flat = {"seen": self.seen.contiguous()}
        for index, (conv, ssm) in enumerate(self.layers):
            flat[f"layers.{index}.conv"] = conv.contiguous()
            flat[f"layers.{index}.ssm"] = ssm.contiguous()
        return flat

    @classmethod
    def from_tensors(cls, flat: Mapping[str, Tensor]) -> MoaiState:
        """The inverse of `tensors`; other names in `flat` are left alone. Raises KeyError naming the first missing
        tensor.
        """
        count = sum(1 for name in flat if name.startswith("layers.") and name.endswith(".ssm"))
        return cls([(flat[f"layers.{i}.conv"], flat[f"layers.{i}.ssm"]) for i in range(count)], flat["seen"])

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Tokens read by the longest row (transformers' name)."""
        return int(self.seen.max())

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Rearranges the rows in place (transformers' beam search)."""
        chosen = self.select(beam_idx)
        self.layers, self.seen = chosen.layers, chosen.seen
