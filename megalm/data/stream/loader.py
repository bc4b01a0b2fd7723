"""Batches of one data-parallel replica. What changes is the number of samples that the trainer has taken, nothing else.

Shapes: B rows of this replica, S sequence length, V vocabulary. Replica ``r`` of ``n`` takes the samples ``g`` with
``g mod n = r``, so the union over replicas does not depend on ``n``.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from megalm.config.schema import Data
from megalm.data.objectives import DataObjective
from megalm.data.stream.batch_size import BatchSize
from megalm.data.stream.phases import DataState, fingerprint_of, new_state, order_of
from megalm.data.stream.prefetch import Prefetcher
from megalm.data.stream.sequences import Corpora


@dataclass(frozen=True)
class Batch:
    """What one replica sees in one step.

    Attributes:
        tokens: [B, S] int64.
        labels: [B, S] int64.
        loss_mask: [B, S] fp32, 1 where the label counts.
        samples: [B], global sample numbers of the rows.
        global_size: rows of all replicas together.
    """

    tokens: Tensor
    labels: Tensor
    loss_mask: Tensor
    samples: NDArray[np.int64]
    global_size: int


class TrainLoader:
    """An endless stream of batches, prepared by one background thread.

    Which samples a step takes follows from how many came before: the batch that begins at sample ``n`` holds the next
    ``batch_size.at(n)``. Which sequence a sample is follows from its number alone, so another batch size, or another
    ramp, cuts the same stream differently, and the saved state does not hold them.

    Args:
        corpora: the training splits.
        settings: blend, order and prefetching.
        objective: makes inputs, labels and mask.
        batch_size: samples per step over all replicas.
        dp_rank: this replica.
        dp_size: replicas; divides every batch size.
        seed: of the order.

    Raises:
        DataError: a weight of the blend is too small.
    """

    def __init__(
        self,
        corpora: Corpora,
        settings: Data,
        *,
        objective: DataObjective,
        batch_size: BatchSize,
        dp_rank: int,
        dp_size: int,
        seed: int,
    ) -> None:
        uneven = [size for size in batch_size.sizes if size % dp_size]
        if uneven:
            raise ValueError(f"global batch of {uneven[0]} does not split over {dp_size} replicas")
        self._corpora = corpora
        self._objective = objective
        self._batch_size = batch_size
        self._dp_rank, self._dp_size = dp_rank, dp_size
        self._prefetch = max(1, settings.prefetch_batches)  # to a queue, 0 means without bound
        self._phase = settings.phase
        self._order = order_of(corpora, settings, seed)
        self._fingerprint = fingerprint_of(corpora, self._order, settings, seed)
        self._state = new_state(settings.phase, self._fingerprint)
        self._earlier: list[dict[str, Any]] = []
        self._worker: Prefetcher[Batch] | None = None

    @property
    def state(self) -> DataState:
        """Samples consumed by all replicas, and what decides which samples they were."""
        return self._state

    def next(self) -> Batch:
        """The next batch of this replica; it counts as consumed from here on, not when it was prefetched.

        Raises:
            DataError: a shard is corrupt or gone.
        """
        if self._worker is None:
            self._worker = Prefetcher(self._batches_from(self._state.consumed_samples), self._prefetch)
        batch = self._worker.take()
        self._state = replace(self._state, consumed_samples=self._state.consumed_samples + batch.global_size)
        return batch

    def state_dict(self) -> dict[str, Any]:
        """:attr:`state` as a checkpoint stores it, and in plain numbers what was read of each corpus in each phase."""
        return {
            **self._state.to_dict(),
            "consumed_tokens": self._state.consumed_tokens,
            "corpora": [*self._earlier, *self._read_in_phase()],
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue after the samples that a checkpoint counts, in its phase or in a new one.

        Raises:
            DataError: the phase is the same but data, weights, seed, length or order differ, so the samples would be
                others; every difference is named.
        """
        continued = DataState.from_dict(state).continued(self._phase, self._fingerprint)
        self.close()
        self._state = continued
        self._batch_size = self._batch_size.resumed(continued.consumed_samples, continued.consumed_tokens)
        self._earlier = [entry for entry in state.get("corpora", ()) if entry["phase"] != self._phase]

    def _read_in_phase(self) -> list[dict[str, Any]]:
        phase = self._state.current
        samples = self._state.consumed_samples - phase.start
        return [
            {
                "phase": phase.number,
                "path": shards.store.location,
                "contents": contents,
                "samples": count,
                "tokens": count * phase.sequence_length,
                "epochs": count / size,
            }
            for shards, (contents, count), size in zip(
                self._corpora.shards, phase.samples_by_contents(samples), self._corpora.sizes, strict=True
            )
        ]

    def close(self) -> None:
        """End the background thread."""
        if self._worker is not None:
            self._worker.close()
            self._worker = None

    def _batches_from(self, start: int) -> Iterator[Batch]:
        phase_start = self._state.current.start
        while True:
            size = self._batch_size.at(start)
            offset = (self._dp_rank - start) % self._dp_size
            samples = np.arange(start + offset, start + size, self._dp_size, dtype=np.int64)
            corpus, _, sequences = self._order(samples - phase_start)
            yield _make_batch(self._corpora, self._objective, corpus, sequences, samples, size)
            start += size


def validation_batches(
    corpora: Corpora,
    samples: int | None,
    batch_size: int,
    *,
    dp_rank: int,
    dp_size: int,
    objective: DataObjective,
) -> Iterator[Batch]:
    """The first ``samples`` sequences (None: all), each once over all replicas; of each corpus its share.

    Every replica yields the same number of batches, all of ``batch_size`` rows; rows past the end repeat the last
    sequence with a mask of zeros.
    """
    corpus, sequences = corpora.first(samples)
    per_round = batch_size * dp_size
    for start in range(0, sequences.size, per_round):
        numbers = np.arange(start + dp_rank, start + per_round, dp_size, dtype=np.int64)
        real = np.minimum(numbers, sequences.size - 1)
        batch = _make_batch(corpora, objective, corpus[real], sequences[real], numbers, per_round)
        inside = torch.from_numpy(numbers < sequences.size)
        yield replace(batch, loss_mask=batch.loss_mask * inside[:, None])


def label_counts(batch: Batch, vocab_size: int) -> Tensor:
    """[V] fp64: how often each word is a label that carries loss."""
    return torch.bincount(batch.labels.flatten(), batch.loss_mask.flatten().double(), minlength=vocab_size)


def _make_batch(
    corpora: Corpora,
    objective: DataObjective,
    corpus: NDArray[np.int64],
    sequences: NDArray[np.int64],
    samples: NDArray[np.int64],
    global_size: int,
) -> Batch:
    rows = corpora.read(corpus, sequences)
    example = objective(rows.tokens, rows.mask, rows.valid, samples)
    tokens, labels, mask = (torch.from_numpy(part) for part in (example.tokens, example.labels, example.loss_mask))
    return Batch(tokens, labels, mask, samples, global_size)
