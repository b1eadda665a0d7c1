"""Keys and values of a search: each image's prefix once, and behind it the tree of tokens that its beams have written.

Beams of one image are slots of one row, and a mask says which slots are a beam's own past. So nothing is repeated per beam and nothing is
copied when beams change places; slots that no beam looks back to are cleared out now and then.

Shape letters: B images, H heads, K beams, P prefix slots, S slots, d head width.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache, CacheLayerMixin

_CLEAR_FROM_SLOTS = 32
_CLEAR_GROWTH = 1.5


class _Layer(CacheLayerMixin):  # type: ignore[misc]
    """Keys and values of one block, in memory that is there from the start (untouched pages cost nothing)."""

    def __init__(self, num_slots: int) -> None:
        super().__init__()
        self._num_slots, self.num_rows, self.used = num_slots, 0, 0

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        rows, heads, _, width = key_states.shape
        self.num_rows = rows
        self.keys = key_states.new_empty(rows, heads, self._num_slots, width)
        self.values = value_states.new_empty(rows, value_states.shape[1], self._num_slots, value_states.shape[3])
        self.is_initialized = True

    def update(self, key_states: Tensor, value_states: Tensor, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        start, self.used = self.used, self.used + key_states.shape[2]
        keys, values = self.keys[: self.num_rows, :, : self.used], self.values[: self.num_rows, :, : self.used]
        keys[:, :, start:], values[:, :, start:] = key_states, value_states
        return keys, values

    def move_row(self, source: int, target: int) -> None:
        for each in (self.keys, self.values):
            each[target, :, : self.used] = each[source, :, : self.used]

    def gather_slots(self, first: int, slots_BS: Tensor) -> None:
        """Put these slots (counted from `first`) side by side, from `first` on."""
        index = slots_BS[:, None, :, None]
        for each in (self.keys, self.values):
            tail = each[: self.num_rows, :, first : self.used]
            each[: self.num_rows, :, first : first + slots_BS.shape[1]] = tail.gather(2, index.expand(-1, tail.shape[1], -1, tail.shape[3]))
        self.used = first + slots_BS.shape[1]

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.used + query_length, 0

    def get_seq_length(self) -> int:
        return self.used

    def get_max_length(self) -> int:
        return self._num_slots


class TreeCache:
    """See the module.

    Parameters
    ----------
    present_BP
        bool: the prefix' slots that hold something.
    num_beams, num_steps
        K, and how many steps will be taken at most.
    num_layers
        Blocks of the model.
    """

    def __init__(self, present_BP: Tensor, num_beams: int, num_steps: int, num_layers: int) -> None:
        self._num_prefix = present_BP.shape[1]
        num_slots = self._num_prefix + num_beams * num_steps
        self._layers = [_Layer(num_slots) for _ in range(num_layers)]
        self.states = Cache(layers=self._layers)
        """What the model is given as `past_key_values`."""
        self._seen_BKS = present_BP[:, None].expand(-1, num_beams, -1)
        self._cleared = 0

    def prefix_mask(self, dtype: torch.dtype) -> Tensor:
        """[B, 1, P, P], added to attention scores: what the prefix' slots look at."""
        seen_BP = self._seen_BKS[:, 0]
        causal = torch.ones(self._num_prefix, self._num_prefix, dtype=torch.bool, device=seen_BP.device).tril()
        return _added((causal & seen_BP[:, None])[:, None], dtype)

    def branch(self, parents_BK: Tensor, dtype: torch.dtype) -> Tensor:
        """Each beam goes on from one of the last step's with a token of its own: the mask [B, 1, K, S] of the model's next call."""
        rows, num_beams = parents_BK.shape
        seen = self._seen_BKS.gather(1, parents_BK[..., None].expand(-1, -1, self._seen_BKS.shape[2]))
        seen = self._clear(seen)
        own = torch.eye(num_beams, dtype=torch.bool, device=seen.device).expand(rows, -1, -1)
        self._seen_BKS = torch.cat([seen, own], 2)
        return _added(self._seen_BKS[:, None], dtype)

    def keep(self, rows: list[int]) -> None:
        """Go on with these images. Rows that are kept in their place cost nothing."""
        for target, source in enumerate(rows):
            if target != source:
                for layer in self._layers:
                    layer.move_row(source, target)
        for layer in self._layers:
            layer.num_rows = len(rows)
        self._seen_BKS = self._seen_BKS[torch.tensor(rows, device=self._seen_BKS.device)]

    def _clear(self, seen_BKS: Tensor) -> Tensor:
        """Drop slots that no beam sees, once enough have gathered."""
        first = self._num_prefix
        num_tree = seen_BKS.shape[2] - first
        if num_tree < max(_CLEAR_FROM_SLOTS, _CLEAR_GROWTH * self._cleared):
            return seen_BKS
        live_BS = seen_BKS[:, :, first:].any(1)
        num_live = int(live_BS.sum(1).max())
        self._cleared = num_live
        slots = (~live_BS).to(torch.uint8).argsort(dim=1, stable=True)[:, :num_live]
        for layer in self._layers:
            layer.gather_slots(first, slots)
        index = slots[:, None].expand(-1, seen_BKS.shape[1], -1)
        return torch.cat([seen_BKS[:, :, :first], seen_BKS[:, :, first:].gather(2, index)], 2)


def _added(seen: Tensor, dtype: torch.dtype) -> Tensor:
    return torch.zeros(seen.shape, dtype=dtype, device=seen.device).masked_fill_(~seen, torch.finfo(dtype).min)
