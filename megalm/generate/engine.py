"""Runs requests on the ranks of one model: generation, and scores of given continuations.

Every rank of the model runs this on the same requests and learns the same results, so no rank tells another what to do.

Shapes: B rows of a pass, S tokens of the longest, M tokens that are scored, H hidden.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from megalm.core.place import Place
from megalm.generate.lane import Lane
from megalm.generate.passes import Pass, Passes
from megalm.generate.requests import Score, ScoreRequest
from megalm.generate.units import Unit
from megalm.mesh.groups import ParallelContext
from megalm.models.transformer import Transformer

SCORE_TOKENS = 4096
"""Tokens of a pass that scores, padding included."""


class Engine:
    """A model's part on this rank, ready to be asked.

    Args:
        model: this rank's part, in evaluation mode.
        context: its groups.
        words: tokens below this are text: a model may have more rows than its tokenizer has words.
        batch_size: rows that are computed together.
    """

    def __init__(self, model: Transformer, context: ParallelContext, *, words: int, batch_size: int) -> None:
        self._model, self._words, self._batch_size = model, words, batch_size
        self._passes = Passes(model, context)
        self.cache_bytes = 0

    def generate(self, units: Sequence[Unit]) -> Iterator[Unit]:
        """Run units to their ends; each is given as soon as it is done."""
        if not units:
            return
        queue, under_way = deque(units), deque[Lane]()
        rows = -(-self._batch_size // self._passes.at_once)
        capacity = max(unit.most_tokens for unit in units)
        lanes = [
            Lane(
                self._logits_of,
                rows=min(rows, sum(unit.most_rows for unit in units)),
                capacity=capacity,
                device=self._passes.device,
            )
            for _ in range(self._passes.at_once)
        ]
        idle = deque(lanes)
        while True:
            for _ in range(len(idle)):
                lane = idle.popleft()
                each = lane.next_pass(queue)
                if each is None:
                    continue
                self._passes.start(each)
                under_way.append(lane)
            if not under_way:
                break
            lane = under_way.popleft()
            yield from lane.take(self._passes.result())
            self.cache_bytes = max(self.cache_bytes, sum(each.cache_bytes for each in lanes))
            idle.append(lane)

    def score(self, requests: Sequence[ScoreRequest]) -> Iterator[tuple[int, Score]]:
        """How likely continuations are, with the number of each request, the longest first."""
        waiting, under_way = deque(self._batches(requests)), deque[_Batch]()
        while waiting or under_way:
            while waiting and len(under_way) < self._passes.at_once:
                batch = waiting.popleft()
                self._passes.start(self._scoring(batch))
                under_way.append(batch)
            yield from under_way.popleft().scores(self._passes.result())

    def _batches(self, requests: Sequence[ScoreRequest]) -> Iterator[_Batch]:
        """Requests of similar lengths together; the longest first, so that memory runs out at once or never."""

        def length(number: int) -> int:
            return len(requests[number].context) + len(requests[number].continuation)

        numbers: list[int] = []
        for number in sorted(range(len(requests)), key=lambda number: (-length(number), number)):
            longest = length(numbers[0]) if numbers else length(number)
            if len(numbers) == self._batch_size or ((len(numbers) + 1) * longest > SCORE_TOKENS and numbers):
                yield _Batch(tuple(numbers), tuple(requests[each] for each in numbers))
                numbers = []
            numbers.append(number)
        if numbers:
            yield _Batch(tuple(numbers), tuple(requests[each] for each in numbers))

    def _scoring(self, batch: _Batch) -> Pass:
        tokens, rows, columns, labels = batch.tensors()

        def finish(x: Tensor) -> Tensor:
            return self._model.token_scores(x[rows.to(x.device), columns.to(x.device)], labels.to(x.device))

        place = Place.from_start(tokens.shape[1], self._passes.device)
        return Pass(tokens.to(self._passes.device), place, finish, (len(labels), 2))

    def _logits_of(self, x: Tensor) -> Tensor:
        return self._model.logits(x[:, None])[:, 0, : self._words]


@dataclass(frozen=True)
class _Batch:
    """Requests of one pass, and their numbers."""

    numbers: tuple[int, ...]
    requests: tuple[ScoreRequest, ...]

    def tensors(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Input ids [B, S], and for every token that is scored its row, the column that predicts it, and it: [M]."""
        sequences = [[*request.context, *request.continuation] for request in self.requests]
        tokens = torch.zeros(len(sequences), max(map(len, sequences)) - 1, dtype=torch.int64)
        rows: list[int] = []
        columns: list[int] = []
        labels: list[int] = []
        for row, (request, sequence) in enumerate(zip(self.requests, sequences, strict=True)):
            tokens[row, : len(sequence) - 1] = torch.tensor(sequence[:-1])
            first, count = len(request.context) - 1, len(request.continuation)
            rows += [row] * count
            columns += range(first, first + count)
            labels += request.continuation
        return tokens, torch.tensor(rows), torch.tensor(columns), torch.tensor(labels)

    def scores(self, result: Tensor) -> Iterator[tuple[int, Score]]:
        """[M, 2] ▶ each request's number and score."""
        start = 0
        for number, request in zip(self.numbers, self.requests, strict=True):
            own = result[start : start + len(request.continuation)]
            start += len(own)
            values, likeliest = own[:, 0].tolist(), own[:, 1].bool().tolist()
            yield number, Score(log_probabilities=tuple(values), likeliest=tuple(likeliest))
