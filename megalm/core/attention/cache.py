"""Keys and values of earlier tokens, so that a new token is all that a pass computes.

Rows are sequences of different lengths, each from position 0 on; nothing is padded on the left, so a row's numbers do
not depend on the others. A *prefill* pass computes whole prompts: what stands after a shorter prompt is computed too,
seen by none of its tokens, and overwritten later. A *decode* pass computes one token per row.

Of a layer with an attention window only as many tokens are kept as it sees: position p is at place p mod C, where C is
the window. A layer without one has a place for each position up to the cache's capacity; the same rule describes both.

Shapes: B rows of a pass, S tokens of the longest prompt, N query heads, K key/value heads, G = N / K, D head dim, R
rows of the cache, C places of a layer, L ≤ C places that a pass looks at.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property

import torch
from torch import Tensor
from torch.nn import functional as F

from megalm.core.device_kind import device_kind
from megalm.core.place import Attention


class KeyValueCache:
    """The keys and values of a rank's layers; memory is taken when a layer first stores something.

    Args:
        rows: R, sequences.
        capacity: most positions of a sequence.
    """

    def __init__(self, rows: int, capacity: int) -> None:
        self.rows, self.capacity = rows, capacity
        self._layers: dict[int, Tensor] = {}  # [2, R, K, C, D]: keys, values

    @property
    def nbytes(self) -> int:
        """Bytes of all layers."""
        return sum(both.nbytes for both in self._layers.values())

    def reserve(self, rows: int, capacity: int) -> None:
        """Make room for more rows or positions; what is stored stays."""
        self.rows, self.capacity = max(rows, self.rows), max(capacity, self.capacity)

    @torch.inference_mode()
    def move(self, sources: Sequence[int]) -> None:
        """Row i becomes what row ``sources[i]`` is; rows after the last source keep nothing of use."""
        moved = [row for row, source in enumerate(sources) if row != source]
        if not moved:
            return
        if len(sources) > self.rows:
            self.reserve(len(sources), self.capacity)
        for layer, both in self._layers.items():
            grown = self._grown(both, both.shape[3])
            grown[:, moved] = grown[:, [sources[row] for row in moved]]
            self._layers[layer] = grown

    def layer(self, layer: int, like: Tensor, window: int) -> Tensor:
        """The places of one layer, [2, R, K, C, D].

        Args:
            layer: its number.
            like: a key, [B, K, S, D].
            window: of its attention; 0: full.
        """
        places = min(window or self.capacity, self.capacity)
        both = self._layers.get(layer)
        if both is None:
            both = like.new_zeros(2, self.rows, like.shape[1], places, like.shape[3])
        elif both.shape[1] < self.rows or both.shape[3] < places:
            both = self._grown(both, places)
        self._layers[layer] = both
        return both

    def _grown(self, both: Tensor, places: int) -> Tensor:
        """The same with more rows or places: no position has wrapped round before its layer has all of its places."""
        _, rows, heads, old, size = both.shape
        if rows >= self.rows and old >= places:
            return both
        grown = both.new_zeros(2, max(rows, self.rows), heads, max(old, places), size)
        grown[:, :rows, :, :old] = both
        return grown


class Prefill:
    """A pass over whole prompts, whose keys and values are stored.

    Args:
        cache: where to.
        first_row: row of the first prompt; the others follow.
        lengths: tokens of each prompt, [B]; its row of the pass is longer where others are.
    """

    def __init__(self, cache: KeyValueCache, first_row: int, lengths: Sequence[int]) -> None:
        self._cache = cache
        self._rows = slice(first_row, first_row + len(lengths))
        self._lengths = lengths

    def attend(self, layer: int, core: Attention, query: Tensor, key: Tensor, value: Tensor, heads: Tensor) -> Tensor:
        """Query [B, N, S, D], key and value [B, K, S, D] ▶ [B, N, S, D]."""
        both = self._cache.layer(layer, key, core.window)
        places, length = both.shape[3], key.shape[2]
        if length <= places:
            both[0, self._rows, :, :length], both[1, self._rows, :, :length] = key, value
        else:
            kept = self._kept(places, key.device)[:, None, :, None].expand(-1, key.shape[1], -1, key.shape[3])
            both[0, self._rows], both[1, self._rows] = key.gather(2, kept), value.gather(2, kept)
        mixed: Tensor = core(query, key, value, heads, None)
        return mixed

    def _kept(self, places: int, device: torch.device) -> Tensor:
        """[B, C]: the position that each place keeps, the latest of those that belong there; 0 where there is none."""
        last = torch.tensor(self._lengths, device=device)[:, None] - 1
        return (last - (last - torch.arange(places, device=device)) % places).clamp_(min=0)


class Decode:
    """A pass over one new token per row.

    Args:
        cache: what is stored of the tokens before them.
        positions: of the new tokens, [B]; their rows are the first ones of the cache.
    """

    def __init__(self, cache: KeyValueCache, positions: Sequence[int], device: torch.device) -> None:
        self._cache, self._positions, self._device = cache, positions, device
        self._masks: dict[int, Tensor | None] = {}

    def attend(
        self,
        layer: int,
        core: Attention,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        heads: Tensor,  # noqa: ARG002 - of dropout masks alone
    ) -> Tensor:
        """Query [B, N, 1, D], key and value [B, K, 1, D] ▶ [B, N, 1, D]."""
        both = self._cache.layer(layer, key, core.window)
        places = both.shape[3]
        self._store(both, key, value)
        rows, kv_heads = key.shape[:2]
        seen = min(max(self._positions) + 1, places)
        # The G query heads of a key head are G rows of one product: its keys are read once.
        grouped = query.reshape(rows, kv_heads, -1, query.shape[-1])
        if query.dtype == torch.bfloat16 and device_kind(query) == "cpu":
            return self._products(grouped, both[:, :rows]).reshape_as(query)
        keys, values = both[0, :rows, :, :seen], both[1, :rows, :, :seen]
        return F.scaled_dot_product_attention(grouped, keys, values, attn_mask=self._mask(seen)).reshape_as(query)

    def _products(self, query: Tensor, both: Tensor) -> Tensor:
        """[B, K, G, D], [2, B, K, C, D] ▶ [B, K, G, D] as two products over all places.

        Measured with one query per row, bf16 products of contiguous operands take a fifth of the time of torch's fused
        attention, so that even many places that hold nothing yet are worth it.
        """
        query = query * query.shape[-1] ** -0.5
        scores = torch.bmm(query.flatten(0, 1), both[0].flatten(0, 1).mT).view(*query.shape[:3], -1)
        if (mask := self._mask(both.shape[3])) is not None:
            scores = scores.masked_fill_(~mask, float("-inf"))
        probabilities = scores.softmax(dim=-1, dtype=torch.float32).to(query.dtype)
        return torch.bmm(probabilities.flatten(0, 1), both[1].flatten(0, 1)).view_as(query)

    def _store(self, both: Tensor, key: Tensor, value: Tensor) -> None:
        rows, places = key.shape[0], both.shape[3]
        if self._alike:
            at = self._positions[0] % places
            both[0, :rows, :, at : at + 1], both[1, :rows, :, at : at + 1] = key, value
        else:
            each, place = self._rows, self._at % places
            both[0, each, :, place], both[1, each, :, place] = key[:, :, 0], value[:, :, 0]

    def _mask(self, seen: int) -> Tensor | None:
        """[B, 1, 1, L] bool: which places hold something that a row sees; None: all of them, for all rows."""
        if seen not in self._masks:
            places = torch.arange(seen, device=self._device)
            whole = min(self._positions) + 1 >= seen
            self._masks[seen] = None if whole else (places <= self._at[:, None])[:, None, None]
        return self._masks[seen]

    @cached_property
    def _alike(self) -> bool:
        return min(self._positions) == max(self._positions)

    @cached_property
    def _at(self) -> Tensor:
        return torch.tensor(self._positions, device=self._device)

    @cached_property
    def _rows(self) -> Tensor:
        return torch.arange(len(self._positions), device=self._device)
