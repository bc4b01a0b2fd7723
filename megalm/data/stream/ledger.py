"""The data ledger: which documents a step saw, and which steps saw a document. From integers alone: nothing is logged.

The order of a run is a pure function that can be turned round, and each shard names its documents; so a question costs
a few lookups, however long the run is and however large the data are. No torch.
"""

from __future__ import annotations

import bisect
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from megalm.data.shards.documents import DocumentSpan, documents_of_shard
from megalm.data.stream.batch_size import BatchSize
from megalm.data.stream.order import BlendedOrder
from megalm.data.stream.sequences import Corpora
from megalm.errors import DataError


@dataclass(frozen=True)
class SampleSource:
    """What one sample was read from.

    Attributes:
        sample: its number in the run.
        dataset: where the dataset is.
        epoch: how often the dataset had been read before.
        sequence: number of the sequence in the split.
        shard: the tar file.
        chunk: number of the chunk in the shard.
        start: its first token, counted over the split.
        documents: the documents in it, in order.
    """

    sample: int
    dataset: str
    epoch: int
    sequence: int
    shard: str
    chunk: int
    start: int
    documents: tuple[DocumentSpan, ...]


@dataclass(frozen=True)
class Reading:
    """A step that saw a document.

    Attributes:
        step: number of the step.
        sample: number of the sample in the run.
        dataset: where the dataset is.
        epoch: how often the dataset had been read before.
        document: what was seen.
        first: first token of the document that the sample held.
        last: last one.
    """

    step: int
    sample: int
    dataset: str
    epoch: int
    document: DocumentSpan
    first: int
    last: int


@dataclass(frozen=True)
class Steps:
    """Which samples a step took: as recorded, and from there on as the config plans.

    Attributes:
        recorded: samples taken by the end of the steps on record, one after the other.
        planned: the batch size of the steps after that.
        earlier_steps: steps that came before the first on record, of a run that went on from another's checkpoint.
        earlier_samples: samples that those steps took.
    """

    recorded: Sequence[int]
    planned: BatchSize
    earlier_steps: int = 0
    earlier_samples: int = 0

    @property
    def last(self) -> int:
        """The last step on record; 0: none has been taken."""
        return self.earlier_steps + len(self.recorded)

    @property
    def samples(self) -> int:
        """Samples taken by the end of it."""
        return self.recorded[-1] if self.recorded else self.earlier_samples

    def samples_of(self, step: int) -> range:
        """The samples of a step, which counts from 1.

        Raises:
            DataError: the step came before those on record, and its batch size may have been another.
        """
        if step <= self.earlier_steps:
            raise DataError(
                f"--step {step}: the record of this run begins with step {self.earlier_steps + 1}; ask in the folder "
                "of the run that it went on from"
            )
        if step <= self.last:
            number = step - self.earlier_steps - 1
            return range(self.recorded[number - 1] if number else self.earlier_samples, self.recorded[number])
        start = self.samples
        for left in range(step - self.last - 1, 0, -1):
            size = self.planned.at(start)
            if size == self.planned.final:  # which it stays
                start += left * size
                break
            start += size
        return range(start, start + self.planned.at(start))

    def step_of(self, sample: int) -> int:
        """The step that took a sample that a step on record took."""
        return self.earlier_steps + bisect.bisect_right(self.recorded, sample) + 1


class Ledger:
    """Answers questions about one phase of a run.

    Args:
        corpora: the training splits.
        order: of the phase.
        start: samples taken before the phase began.
        end: samples taken when it ended, or so far.
        steps: which samples the steps took.
    """

    def __init__(self, corpora: Corpora, order: BlendedOrder, *, start: int, end: int, steps: Steps) -> None:
        self._corpora = corpora
        self._order = order
        self._start, self._end = start, end
        self._steps = steps
        self._documents = lru_cache(maxsize=64)(self._read_documents)

    def sources_of_step(self, step: int) -> Iterator[SampleSource]:
        """What a step, which counts from 1, saw or will see."""
        for sample in self._steps.samples_of(step):
            yield self.source_of_sample(sample)

    def source_of_sample(self, sample: int) -> SampleSource:
        """What a sample was or will be read from."""
        example, within = divmod(sample - self._start, self._corpora.sequences_per_example)
        corpus, epoch, number = (int(part[0]) for part in self._order(example))
        sequence = number * self._corpora.sequences_per_example + within
        shards = self._corpora.shards[corpus]
        start = sequence * shards.sequence_length
        shard, chunk = divmod(start // shards.index.chunk_tokens, shards.index.chunks_per_shard)
        stop = min(start + shards.sequence_length + 1, shards.index.tokens)
        return SampleSource(
            sample=sample,
            dataset=shards.store.location,
            epoch=epoch,
            sequence=sequence,
            shard=shards.index.shard(shard).name,
            chunk=chunk,
            start=start,
            documents=tuple(self._overlapping(corpus, start, stop)),
        )

    def readings_of_document(self, name: str) -> list[Reading]:
        """The steps so far that saw a document, in order.

        Raises:
            DataError: no dataset has a document of that name.
        """
        found = [(c, d) for c in range(len(self._corpora.shards)) for d in self._all_documents(c) if d.name == name]
        if not found:
            raise DataError(self._no_such_document(name))
        readings = [reading for corpus, document in found for reading in self._readings(corpus, document)]
        return sorted(readings, key=lambda reading: reading.sample)

    def times_read(self, corpus: int, starts: NDArray[np.int64], tokens: int) -> NDArray[np.int64]:
        """How often the phase so far read all of some passages: as often as the least read of their sequences.

        Args:
            corpus: number of the dataset.
            starts: [N], first token of each passage, counted over the split.
            tokens: of each passage, two or more.

        Returns:
            [N].
        """
        first, last = self.sequences_of(starts, tokens)
        counts = self._sequences_read(corpus, first)
        for more in range(1, int((last - first).max(initial=0)) + 1):
            counts = np.minimum(counts, self._sequences_read(corpus, np.minimum(first + more, last)))
        return counts

    def sequences_of(self, starts: NDArray[np.int64], tokens: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """First and last sequence that passages of so many tokens lie in; a sequence's last label is its own, too."""
        length = self._corpora.sequence_length
        return starts // length, (starts + tokens - 2) // length

    def steps_reading(self, corpus: int, token: int) -> list[int]:
        """The steps on record that read the sequence which begins with or before a token, in order."""
        length, each = self._corpora.sequence_length, self._corpora.sequences_per_example
        example, within = divmod(token // length, each)
        if example >= self._corpora.sizes[corpus]:
            return []
        epochs = np.arange(int(self._order.epochs_after((self._end - self._start) // each)[corpus]) + 2)
        samples = self._order.sample_of(corpus, epochs, example) * each + within + self._start
        return sorted(
            self._steps.step_of(sample)
            for sample in samples.tolist()
            if self._steps.earlier_samples <= sample < min(self._end, self._steps.samples)
        )

    def _sequences_read(self, corpus: int, sequences: NDArray[np.int64]) -> NDArray[np.int64]:
        """[N]: how often the phase so far read each of some sequences; a rest that fills no example is never read."""
        each, examples = self._corpora.sequences_per_example, self._corpora.sizes[corpus]
        numbers = sequences // each
        counts = self._order.times_read(corpus, np.minimum(numbers, examples - 1), (self._end - self._start) // each)
        return np.where(numbers < examples, counts, 0)

    def _readings(self, corpus: int, document: DocumentSpan) -> Iterator[Reading]:
        shards = self._corpora.shards[corpus]
        length, each = shards.sequence_length, self._corpora.sequences_per_example
        first, last = max(document.start - 1, 0) // length, (document.end - 1) // length
        epochs = int(self._order.epochs_after((self._end - self._start) // each)[corpus]) + 2
        for sequence in range(first, min(last, self._corpora.sizes[corpus] * each - 1) + 1):
            example, within = divmod(sequence, each)
            for epoch in range(epochs):
                sample = int(self._order.sample_of(corpus, epoch, example)[0]) * each + within + self._start
                if not self._steps.earlier_samples <= sample < self._end:
                    continue
                yield Reading(
                    step=self._steps.step_of(sample),
                    sample=sample,
                    dataset=shards.store.location,
                    epoch=epoch,
                    document=document,
                    first=max(sequence * length - document.start, 0),
                    last=min((sequence + 1) * length, document.end - 1) - document.start,
                )

    def _overlapping(self, corpus: int, start: int, stop: int) -> list[DocumentSpan]:
        """Documents that have a token in a range of a split."""
        shards = self._corpora.shards[corpus]
        tokens_per_shard = shards.index.chunk_tokens * shards.index.chunks_per_shard
        number = start // tokens_per_shard
        documents = list(self._documents(corpus, number))
        while number and (not documents or documents[0].start > start):  # one that began in an earlier shard goes on
            number -= 1
            documents = [*self._documents(corpus, number)[-1:], *documents]
        after = (stop - 1) // tokens_per_shard
        if after > start // tokens_per_shard and after < shards.index.num_shards:
            documents += self._documents(corpus, after)
        return [document for document in documents if document.start < stop and document.end > start]

    def _all_documents(self, corpus: int) -> Iterator[DocumentSpan]:
        for number in range(self._corpora.shards[corpus].index.num_shards):
            yield from self._read_documents(corpus, number)

    def _read_documents(self, corpus: int, number: int) -> tuple[DocumentSpan, ...]:
        """Documents that begin in a shard."""
        shards = self._corpora.shards[corpus]
        return tuple(documents_of_shard(shards.store, shards.index, number))

    def _no_such_document(self, name: str) -> str:
        names = [document.name for c in range(len(self._corpora.shards)) for document in self._all_documents(c)]
        close = [other for other in names if name in other][:3] or get_close_matches(name, names, n=3)
        hint = f"; did you mean {', '.join(close)}?" if close else ""
        return f"--document {name}: none of the {len(names):,} documents has that name{hint}"
