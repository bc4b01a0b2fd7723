"""Requests that share a cache and take part in the same passes.

A request that ends frees its rows at once and another takes them, so that a batch stays full until the last requests.
Rows of the cache are kept without holes: what ends is replaced by what came last.

Shapes: B rows of a pass, S tokens of its longest prompt, H hidden, V vocabulary.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from megalm.core.attention.cache import Decode, KeyValueCache, Prefill
from megalm.core.place import Place
from megalm.generate.choices import Choice, columns_of
from megalm.generate.choosing import choose
from megalm.generate.passes import Pass
from megalm.generate.units import Unit

LogitsOf = Callable[[Tensor], Tensor]
"""The last block's output, [M, H] ▶ logits of words that are text, [M, V]."""

PREFILL_TOKENS = 4096
"""Tokens of a prefill pass, padding included: enough for full products, few enough to hold their activations."""

_MOST_PADDING = 1.25
_FREE_PADDING = 256
"""A pass may have a quarter more tokens than its prompts, or so many in all: short passes cost more than padding."""


@dataclass
class _Placed:
    """A unit, the row of the cache that is its first, and how many results of the pass under way are its own."""

    unit: Unit
    first: int
    asked: int = 0

    @property
    def stop(self) -> int:
        """The row after its last one."""
        return self.first + len(self.unit.rows)


class Lane:
    """One sequence of passes.

    Args:
        logits_of: the model's; used on the last stage.
        rows: most rows at a time, unless a single request needs more.
        capacity: most positions that a row will need.
        device: where the model computes.
    """

    def __init__(self, logits_of: LogitsOf, *, rows: int, capacity: int, device: torch.device) -> None:
        self._logits_of, self._most_rows, self._device = logits_of, rows, device
        self._cache = KeyValueCache(rows, capacity)
        self._placed: list[_Placed] = []
        self._new: list[Unit] = []
        self._under_way: list[_Placed] = []

    @property
    def cache_bytes(self) -> int:
        """Bytes of its keys and values."""
        return self._cache.nbytes

    def next_pass(self, queue: deque[Unit]) -> Pass | None:
        """The next pass, after units of the queue have taken free rows; None: there is nothing to do."""
        self._slide()
        self._admit(queue)
        if self._new:
            return self._prefill()
        return self._decode() if self._placed else None

    def take(self, result: Tensor) -> list[Unit]:
        """Feed the units of the pass its result, [M, C]; those that are done."""
        rows, done = iter(result.tolist()), []
        sources: dict[int, list[int]] = {}
        for placed in self._under_way:
            parents = placed.unit.accept([next(rows) for _ in range(placed.asked)])
            sources[id(placed)] = [placed.first + parent for parent in parents]
            if not parents:
                done.append(placed.unit)
        for placed in self._placed:
            if id(placed) not in sources:
                sources[id(placed)] = list(range(placed.first, placed.stop))
        everyone = {id(placed): placed for placed in (*self._placed, *self._under_way)}
        self._place([placed for placed in everyone.values() if sources[id(placed)]], sources)
        self._under_way = []
        return done

    def _slide(self) -> None:
        """Units at the end of what the model sees leave the cache; their later part is computed again."""
        sliding = [placed for placed in self._placed if placed.unit.must_slide()]
        if not sliding:
            return
        for placed in sliding:
            placed.unit.slide()
            self._new.append(placed.unit)
        left = [placed for placed in self._placed if placed not in sliding]
        self._place(left, {id(placed): list(range(placed.first, placed.stop)) for placed in left})

    def _admit(self, queue: deque[Unit]) -> None:
        used = sum(placed.unit.most_rows for placed in self._placed) + sum(unit.most_rows for unit in self._new)
        while queue and (used + queue[0].most_rows <= self._most_rows or not used):
            unit = queue.popleft()
            used += unit.most_rows
            self._new.append(unit)

    def _prefill(self) -> Pass:
        """Whole prompts of new units, of similar lengths."""
        units = self._similar()
        self._new = [unit for unit in self._new if unit not in units]
        prompts: list[list[int]] = []
        choices: list[Choice] = []
        rows: list[int] = []
        self._under_way = []
        start = max((placed.stop for placed in self._placed), default=0)
        for unit in units:
            asked, own = unit.choices(), len(unit.rows)
            self._under_way.append(_Placed(unit, start + len(prompts), len(asked)))
            # A prompt of which several texts are drawn is computed once.
            rows += [len(prompts) + (place if own == len(asked) else 0) for place in range(len(asked))]
            prompts += [unit.prompt_of(row) for row in unit.rows]
            choices += asked
        lengths = [len(prompt) for prompt in prompts]
        self._cache.reserve(start + len(prompts), self._cache.capacity)
        tokens = torch.zeros(len(prompts), max(lengths), dtype=torch.int64)
        for row, prompt in enumerate(prompts):
            tokens[row, : len(prompt)] = torch.tensor(prompt)
        place = Place(torch.arange(max(lengths), device=self._device), memory=Prefill(self._cache, start, lengths))
        last = torch.tensor(lengths) - 1

        def finish(x: Tensor) -> Tensor:
            ends = x[torch.arange(len(lengths), device=x.device), last.to(x.device)]
            return self._chosen(ends, choices, rows)

        return Pass(tokens.to(self._device), place, finish, (len(choices), columns_of(choices)))

    def _similar(self) -> list[Unit]:
        """New units whose prompts fill a pass without much padding."""

        def cost(units: Sequence[Unit]) -> tuple[int, int]:
            lengths = [len(unit.prompt_of(row)) for unit in units for row in unit.rows]
            return len(lengths) * max(lengths), sum(lengths)

        waiting = sorted(self._new, key=lambda unit: (-max(map(len, map(unit.prompt_of, unit.rows))), unit.number))
        chosen = waiting[:1]
        for unit in waiting[1:]:
            padded, real = cost([*chosen, unit])
            if padded > PREFILL_TOKENS or padded > max(_MOST_PADDING * real, _FREE_PADDING):
                break
            chosen.append(unit)
        return chosen

    def _decode(self) -> Pass:
        """The newest token of every row."""
        self._under_way = sorted(self._placed, key=lambda placed: placed.first)
        rows = [(placed.unit, row) for placed in self._under_way for row in placed.unit.rows]
        choices: list[Choice] = []
        for placed in self._under_way:
            asked = placed.unit.choices()
            placed.asked = len(asked)
            choices += asked
        tokens = torch.tensor([[unit.newest_of(row)] for unit, row in rows], device=self._device)
        positions = [unit.position_of(row) for unit, row in rows]
        memory = Decode(self._cache, positions, self._device)
        place = Place(torch.tensor(positions, device=self._device)[:, None], memory=memory)

        def finish(x: Tensor) -> Tensor:
            return self._chosen(x[:, 0], choices, None)

        return Pass(tokens, place, finish, (len(choices), columns_of(choices)))

    def _chosen(self, x: Tensor, choices: Sequence[Choice], rows: Sequence[int] | None) -> Tensor:
        logits = self._logits_of(x)
        return choose(logits if rows is None or len(rows) == len(logits) else logits[list(rows)], choices)

    def _place(self, placed: list[_Placed], sources: dict[int, list[int]]) -> None:
        """Give every unit its rows, moving as few as possible, and move what the cache has of them."""
        total = sum(len(sources[id(each)]) for each in placed)
        order: list[int | None] = [None] * total
        homeless = []
        for each in placed:
            wanted = sources[id(each)]
            span = range(each.first, each.first + len(wanted))
            if span.stop <= total and all(order[row] is None for row in span):
                order[span.start : span.stop] = wanted
            else:
                homeless.append(each)
        for each in sorted(homeless, key=lambda each: -len(sources[id(each)])):
            size = len(sources[id(each)])
            starts = (row for row in range(total - size + 1) if order[row : row + size] == [None] * size)
            first = next(starts, None)
            if first is None:  # holes too small: everything in one row
                self._pack(placed, sources)
                return
            each.first = first
            order[first : first + size] = sources[id(each)]
        self._cache.move([source for source in order if source is not None])
        self._placed = placed

    def _pack(self, placed: list[_Placed], sources: dict[int, list[int]]) -> None:
        order: list[int] = []
        for each in sorted(placed, key=lambda each: each.first):
            each.first = len(order)
            order += sources[id(each)]
        self._cache.move(order)
        self._placed = placed
