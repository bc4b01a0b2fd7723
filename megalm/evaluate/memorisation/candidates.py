"""Passages of documents, drawn by seed: one of each document, the same one of documents with the same text. No torch.

Where a passage begins in its document follows from the seed and the document's length, so copies of a document give
copies of a passage. Each passage has a hash of the seed and its tokens; where there are too many to keep, those with
the smallest hashes are, so that all copies of a passage are kept or none, and each different one is as likely to be
(Gibbons 2001, "Distinct Sampling for Highly-Accurate Answers to Distinct Values Queries and Event Reports").

Shapes: N passages.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from megalm.data.shards.documents import documents_of_shard
from megalm.data.shards.tokens import SplitTokens
from megalm.data.stream.order import derive_key
from megalm.evaluate.memorisation.settings import Memorisation

MOST_KEPT = 2**18
"""Different passages kept at once: 8 MiB. Of more, a half, a quarter and so on are."""

Ints = NDArray[np.int64]
Hashes = NDArray[np.uint64]
TimesRead = Callable[[int, Ints], Ints]
"""Number of the dataset, first tokens of passages ▶ how often each was read."""


@dataclass(frozen=True)
class Candidates:
    """Different passages of some splits.

    Attributes:
        hashes: [N], ascending, each once.
        dataset: [N], number of the dataset of one of the documents that have the passage.
        starts: [N], its first token there.
        times: [N], how often the run has read it, over the documents that it was drawn of.
    """

    hashes: Hashes
    dataset: Ints
    starts: Ints
    times: Ints

    @classmethod
    def none(cls) -> Candidates:
        """No passage."""
        empty = np.empty(0, np.int64)
        return cls(empty.astype(np.uint64), empty, empty, empty)

    def with_more(self, more: Candidates) -> Candidates:
        """Both; passages with the same text are one, read as often as all of them."""
        hashes = np.concatenate([self.hashes, more.hashes])
        unique, first, inverse = np.unique(hashes, return_index=True, return_inverse=True)
        times = np.zeros(unique.size, np.int64)
        np.add.at(times, inverse, np.concatenate([self.times, more.times]))
        dataset, starts = (
            np.concatenate([getattr(each, name) for each in (self, more)])[first] for name in ("dataset", "starts")
        )
        return Candidates(unique, dataset, starts, times)

    def where(self, chosen: NDArray[np.bool_] | Ints) -> Candidates:
        """Some of them."""
        return Candidates(self.hashes[chosen], self.dataset[chosen], self.starts[chosen], self.times[chosen])


@dataclass
class Drawn:
    """Passages as they are drawn, and what there was to draw from.

    Attributes:
        documents: that were looked at.
        too_short: of them, which are shorter than a passage.
        unnamed: of them, whose names do not hold the text that was asked for.
        share: of the different passages, which are kept: 1, or a power of 1/2.
        kept: the passages.
    """

    documents: int = 0
    too_short: int = 0
    unnamed: int = 0
    share: float = 1.0
    kept: Candidates = field(default_factory=Candidates.none)

    def add(self, more: Candidates) -> None:
        """Keep more passages, as many as there is room for; of those that were let go, no later copy comes back."""
        self.kept = self._below_the_bound(self.kept.with_more(more))
        while self.kept.hashes.size > MOST_KEPT:
            self.share /= 2
            self.kept = self._below_the_bound(self.kept)

    def _below_the_bound(self, candidates: Candidates) -> Candidates:
        """Those whose hashes are in the share of all hashes that is kept."""
        return candidates.where(candidates.hashes <= np.uint64(int(2**64 * self.share) - 1))

    def counts(self) -> dict[str, int | float]:
        """As a result's record has it."""
        return {
            "documents": self.documents,
            "too_short": self.too_short,
            "other_names": self.unnamed,
            "share_of_passages_kept": self.share,
            "passages_kept": self.kept.hashes.size,
        }


def draw(
    splits: Sequence[SplitTokens],
    settings: Memorisation,
    *,
    times_read: TimesRead | None,
    named: str | None,
    progress: Callable[[int], object],
) -> Drawn:
    """Draw a passage of each document.

    Args:
        splits: of the datasets, in order.
        settings: of the task.
        times_read: of the run; None: the run does not read these splits.
        named: text in the names of documents that are wanted; None: all are.
        progress: told how many more documents are done.

    Raises:
        DataError: a shard, or a file that names documents, is missing or damaged.
    """
    drawn = Drawn()
    for number, split in enumerate(splits):
        for shard in range(split.index.num_shards):
            documents = list(documents_of_shard(split.store, split.index, shard))
            wanted = [document for document in documents if named is None or named in document.name]
            spans = np.array([(each.start, each.tokens) for each in wanted], np.int64).reshape(-1, 2)
            starts = _starts(spans, settings)
            times = np.zeros(starts.size, np.int64) if times_read is None else times_read(number, starts)
            drawn.documents += len(documents)
            drawn.unnamed += len(documents) - len(wanted)
            drawn.too_short += len(wanted) - starts.size
            drawn.add(Candidates(_hashes(split, starts, settings), np.full(starts.size, number), starts, times))
            progress(len(documents))
    return drawn


def _starts(spans: Ints, settings: Memorisation) -> Ints:
    """[documents, 2] first tokens and lengths ▶ [N] first tokens of the passages of those that are long enough.

    A document's last token, which ends it, is of no passage.
    """
    places = spans[:, 1] - 1 - settings.passage_tokens + 1
    spans, places = spans[places > 0], places[places > 0]
    drawn = derive_key(settings.seed, spans[:, 1]) % places.astype(np.uint64)
    return spans[:, 0] + drawn.astype(np.int64)


def _hashes(split: SplitTokens, starts: Ints, settings: Memorisation) -> Hashes:
    """[N] of passages."""
    seed = settings.seed.to_bytes(8, "little")
    digests = b"".join(
        hashlib.blake2b(seed + split.at(start, settings.passage_tokens).astype("<u4").tobytes(), digest_size=8).digest()
        for start in starts.tolist()
    )
    return np.frombuffer(digests, "<u8").astype(np.uint64)
