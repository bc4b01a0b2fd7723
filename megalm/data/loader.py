"""Batches of one data-parallel replica. The whole state is the number of samples that the trainer has taken.

Shapes: B rows of this replica, S sequence length. Replica ``r`` of ``n`` takes the samples ``g`` with ``g mod n = r``,
so the union over replicas does not depend on ``n``.
"""

from __future__ import annotations

import queue
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from megalm.config.schema import Data
from megalm.data.batch_size import BatchSize
from megalm.data.objectives import CausalLM
from megalm.data.order import SampleOrder
from megalm.data.shards import TokenShards
from megalm.errors import DataError

STATE_VERSION = 1


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
        dataset: the training split.
        settings: order and prefetching.
        objective: makes inputs, labels and mask.
        batch_size: samples per step over all replicas.
        dp_rank: this replica.
        dp_size: replicas; divides every batch size.
        seed: of the order.
    """

    def __init__(
        self,
        dataset: TokenShards,
        settings: Data,
        *,
        objective: CausalLM,
        batch_size: BatchSize,
        dp_rank: int,
        dp_size: int,
        seed: int,
    ) -> None:
        uneven = [size for size in batch_size.sizes if size % dp_size]
        if uneven:
            raise ValueError(f"global batch of {uneven[0]} does not split over {dp_size} replicas")
        self._dataset = dataset
        self._objective = objective
        self._batch_size = batch_size
        self._dp_rank, self._dp_size = dp_rank, dp_size
        self._prefetch = max(1, settings.prefetch_batches)  # to a queue, 0 means without bound
        self._order = SampleOrder(len(dataset), seed, settings.block_sequences, settings.lanes, settings.window_blocks)
        self._fingerprint: dict[str, Any] = {
            "data.path": dataset.index.fingerprint,
            "model.sequence_length": dataset.sequence_length,
            "run.seed": seed,
            "data.block_sequences": settings.block_sequences,
            "data.lanes": settings.lanes,
            "data.window_blocks": settings.window_blocks,
        }
        self._consumed_samples = 0
        self._worker: _Prefetcher | None = None

    def next(self) -> Batch:
        """The next batch of this replica; it counts as consumed from here on, not when it was prefetched.

        Raises:
            DataError: a shard is corrupt or gone.
        """
        if self._worker is None:
            self._worker = _Prefetcher(self._batches_from(self._consumed_samples), self._prefetch)
        batch = self._worker.take()
        self._consumed_samples += batch.global_size
        return batch

    def state_dict(self) -> dict[str, Any]:
        """Samples consumed by all replicas, and what decides which samples they were."""
        return {"version": STATE_VERSION, "consumed_samples": self._consumed_samples, "fingerprint": self._fingerprint}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue after the samples that a checkpoint counts.

        Raises:
            DataError: data, seed, length or order differ, so the samples would be others; every difference is named.
        """
        if state.get("version") != STATE_VERSION:
            raise DataError(f"data state has version {state.get('version')}; this megalm reads version {STATE_VERSION}")
        saved = state["fingerprint"]
        changed = [
            f"{name}={_shorten(mine)}: the checkpoint was trained with {_shorten(saved.get(name))}"
            for name, mine in self._fingerprint.items()
            if saved.get(name) != mine
        ]
        if changed:
            remedy = "resume with the same data, or start a new run from these weights with checkpoint.init_from"
            raise DataError("\n".join(f"{line}; {remedy}" for line in changed))
        self.close()
        self._consumed_samples = int(state["consumed_samples"])

    def close(self) -> None:
        """End the background thread."""
        if self._worker is not None:
            self._worker.close()
            self._worker = None

    def _batches_from(self, start: int) -> Iterator[Batch]:
        while True:
            size = self._batch_size.at(start)
            offset = (self._dp_rank - start) % self._dp_size
            samples = np.arange(start + offset, start + size, self._dp_size, dtype=np.int64)
            _, sequences = self._order(samples)
            yield _make_batch(self._dataset, self._objective, sequences, samples, size)
            start += size


def validation_batches(
    dataset: TokenShards,
    samples: int | None,
    batch_size: int,
    *,
    dp_rank: int,
    dp_size: int,
    objective: CausalLM | None = None,
) -> Iterator[Batch]:
    """The first ``samples`` sequences (None: all) in file order, each once over all replicas.

    Every replica yields the same number of batches, all of ``batch_size`` rows; rows past the end repeat the last
    sequence with a mask of zeros.
    """
    total = len(dataset) if samples is None else min(samples, len(dataset))
    per_round = batch_size * dp_size
    for start in range(0, total, per_round):
        numbers = np.arange(start + dp_rank, start + per_round, dp_size, dtype=np.int64)
        batch = _make_batch(dataset, objective or CausalLM(), np.minimum(numbers, total - 1), numbers, per_round)
        batch.loss_mask[torch.from_numpy(numbers >= total)] = 0.0
        yield batch


def _make_batch(
    dataset: TokenShards,
    objective: CausalLM,
    sequences: NDArray[np.int64],
    samples: NDArray[np.int64],
    global_size: int,
) -> Batch:
    rows = [dataset.sequence(i) for i in sequences.tolist()]
    tokens, labels, mask = objective(
        np.stack([row for row, _ in rows]), np.array([valid for _, valid in rows], dtype=np.int64)
    )
    return Batch(torch.from_numpy(tokens), torch.from_numpy(labels), torch.from_numpy(mask), samples, global_size)


class _Prefetcher:
    """Runs an iterator in a thread, a few items ahead; its exception is raised where the item would have been taken."""

    def __init__(self, batches: Iterator[Batch], depth: int) -> None:
        self._queue: queue.Queue[Batch | BaseException] = queue.Queue(maxsize=depth)
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._run, args=(batches,), name="megalm-data", daemon=True)
        self._thread.start()

    def take(self) -> Batch:
        item = self._queue.get()
        if isinstance(item, BaseException):
            self._queue.put(item)  # every later call fails alike, instead of waiting for ever
            raise item
        return item

    def close(self) -> None:
        self._stopped.set()
        while self._thread.is_alive():
            try:
                self._queue.get_nowait()
            except queue.Empty:
                self._thread.join(timeout=0.05)

    def _run(self, batches: Iterator[Batch]) -> None:
        try:
            for batch in batches:
                if not self._put(batch):
                    return
        except BaseException as error:  # whatever it is, the trainer must hear of it
            self._put(error)

    def _put(self, item: Batch | BaseException) -> bool:
        while not self._stopped.is_set():
            try:
                self._queue.put(item, timeout=0.1)
            except queue.Full:
                continue
            return True
        return False


def _shorten(value: Any) -> str:
    text = str(value)
    return f"{text[:12]}…" if len(text) > 24 else text
