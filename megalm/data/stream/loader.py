"""Batches of one data-parallel replica. Its only state is the number of samples that the trainer has taken. No torch.

Replica ``r`` of ``n`` takes the examples ``g`` with ``g mod n = r``, so the union over replicas does not depend on
``n``. An example is one sample, which is a sequence; or several, where an objective needs sequences that belong
together.

Shapes: B rows of this replica, E examples, S sequence length.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import numpy as np

from megalm.config.schema import Data
from megalm.data.stream.batch import Batch, Ints, MakeBatch, Rows, document_starts
from megalm.data.stream.batch_size import BatchSize
from megalm.data.stream.phases import DataState, fingerprint_of, new_state, order_of
from megalm.data.stream.prefetch import Prefetcher
from megalm.data.stream.sequences import Corpora


class TrainLoader:
    """An endless stream of batches, prepared by one background thread.

    Which samples a step takes follows from how many came before: the batch that begins at sample ``n`` holds the next
    ``batch_size.at(n)``. Which sequence a sample is follows from its number alone, so another batch size, or another
    ramp, cuts the same stream differently, and the saved state does not hold them.

    Args:
        corpora: the training splits.
        settings: blend, order and prefetching.
        make_batch: makes inputs, labels and mask of rows.
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
        make_batch: MakeBatch,
        batch_size: BatchSize,
        dp_rank: int,
        dp_size: int,
        seed: int,
    ) -> None:
        each = corpora.sequences_per_example
        uneven = [size for size in batch_size.sizes if size % (dp_size * each)]
        if uneven:
            what = f"{dp_size} replicas" + (f" in groups of {each} sequences" if each > 1 else "")
            raise ValueError(f"global batch of {uneven[0]} does not split over {what}")
        self._corpora = corpora
        self._make_batch = make_batch
        self._reset_at_documents = settings.reset_at_documents
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
        """The next batch of this replica. Taking it counts its samples as consumed; prefetching does not.

        Raises:
            DataError: a shard is corrupt or gone.
        """
        if self._worker is None:
            self._worker = Prefetcher(self._batches_from(self._state.consumed_samples), self._prefetch)
        batch = self._worker.take()
        self._count(len(batch.tokens))
        return batch

    def skip(self) -> int:
        """Count the next batch of this replica as consumed without reading it, as another rank does that.

        Returns:
            Its rows.
        """
        rows = self._batch_size.at(self._state.consumed_samples) // self._dp_size
        self._count(rows)
        return rows

    def _count(self, rows: int) -> None:
        taken = self._state.consumed_samples + rows * self._dp_size
        self._state = replace(self._state, consumed_samples=taken)

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
        phase, each = self._state.current, self._corpora.sequences_per_example
        samples = self._state.consumed_samples - phase.start
        return [
            {
                "phase": phase.number,
                "path": shards.store.location,
                "contents": contents,
                "samples": count,
                "tokens": count * phase.sequence_length,
                "epochs": count / (size * each),
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
        each, reset = self._corpora.sequences_per_example, self._reset_at_documents
        phase_start = self._state.current.start // each
        while True:
            size = self._batch_size.at(start)
            first, stop = start // each, (start + size) // each
            offset = (self._dp_rank - first) % self._dp_size
            numbers = np.arange(first + offset, stop, self._dp_size, dtype=np.int64)
            corpus, _, examples = self._order(numbers - phase_start)
            yield _read(self._corpora, self._make_batch, corpus, examples, numbers, reset_at_documents=reset)
            start += size


def validation_batches(
    corpora: Corpora,
    samples: int | None,
    batch_size: int,
    *,
    make_batch: MakeBatch,
    dp_rank: int,
    dp_size: int,
    reset_at_documents: bool = False,
) -> Iterator[Batch]:
    """The first ``samples`` sequences (None: all), each once over all replicas; of each corpus its share.

    Every replica yields the same number of batches, all of ``batch_size`` rows; rows past the end repeat the last
    sequence with a mask of zeros.
    """
    each = corpora.sequences_per_example
    corpus, examples = corpora.first(_examples_of(samples, each))
    per_round = batch_size // each * dp_size
    for start in range(0, examples.size, per_round):
        numbers = np.arange(start + dp_rank, start + per_round, dp_size, dtype=np.int64)
        real = np.minimum(numbers, examples.size - 1)
        batch = _read(corpora, make_batch, corpus[real], examples[real], numbers, reset_at_documents=reset_at_documents)
        inside = np.repeat(numbers < examples.size, each)  # [B]
        yield replace(batch, loss_mask=batch.loss_mask * inside.reshape(-1, *[1] * (batch.loss_mask.ndim - 1)))


def num_validation_batches(corpora: Corpora, samples: int | None, batch_size: int, dp_size: int) -> int:
    """How many batches :func:`validation_batches` yields; nothing is read."""
    each, total = corpora.sequences_per_example, sum(corpora.sizes)
    wanted = _examples_of(samples, each)
    return -(-(total if wanted is None else min(wanted, total)) // (batch_size // each * dp_size))


def example_batch(corpora: Corpora, make_batch: MakeBatch, *, reset_at_documents: bool) -> Batch:
    """What an objective makes of one example of made-up rows: the arrays of any batch, for as many rows as it has."""
    rows, length = corpora.sequences_per_example, corpora.sequence_length
    tokens = np.zeros((rows, length + 1), dtype=np.int64)
    mask = np.ones_like(tokens, dtype=np.uint8) if corpora.masked else None
    batch = make_batch(Rows(tokens, mask, np.full(rows, length, dtype=np.int64)), np.arange(rows, dtype=np.int64))
    if not reset_at_documents:
        return batch
    return replace(batch, document_starts=document_starts(tokens[:, :-1], corpora.eos_id))


def _examples_of(samples: int | None, each: int) -> int | None:
    return None if samples is None else -(-samples // each)


def _read(
    corpora: Corpora,
    make_batch: MakeBatch,
    corpus: Ints,
    examples: Ints,
    numbers: Ints,
    *,
    reset_at_documents: bool,
) -> Batch:
    """A batch of the given examples of each corpus, which have the given numbers in the run: [E] each."""
    rows = corpora.read(corpus, examples)
    batch = make_batch(rows, corpora.rows_of(numbers))
    if not reset_at_documents:
        return batch
    return replace(batch, document_starts=document_starts(rows.tokens[:, :-1], corpora.eos_id))
