"""The documents that passages stand in, and the steps that read them. No torch."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from itertools import islice
from typing import Any

from megalm.data.shards.documents import DocumentSpan
from megalm.data.shards.tokens import SplitTokens
from megalm.evaluate.memorisation.passages import Passage, Place
from megalm.evaluate.memorisation.seen import RunData

MOST_STEPS = 100
"""Of each passage, steps that are told."""


@dataclass(frozen=True)
class Source:
    """A document that a passage stands in.

    Attributes:
        document: its name.
        dataset: where the dataset is.
        split: ``train`` or ``val``.
        shard: the tar file that the passage begins in.
        first: the passage's first token in the document.
        times: how often the run has read the passage there.
    """

    document: str
    dataset: str
    split: str
    shard: str
    first: int
    times: int

    def as_json(self) -> dict[str, Any]:
        """Plain values."""
        return asdict(self)


class Sources:
    """Where passages stand.

    Args:
        data: of the run.
        passages: that are asked about.

    Raises:
        DataError: a file that names documents is missing or damaged.
    """

    def __init__(self, data: RunData, passages: Sequence[Passage]) -> None:
        self._data = data
        train = {(place.dataset, place.start) for passage in passages for place in passage.places}
        held_out = {passage.origin for passage in passages if passage.held_out and not passage.places}
        self._train, self._held_out = _documents(data.train, train), _documents(data.held_out, held_out)

    def of(self, passage: Passage) -> list[Source]:
        """The training documents that a passage stands in; of one in none, the validation document it was drawn of."""
        if passage.places:
            return [self._source(self._data.train, self._train, place, "train") for place in passage.places]
        return [self._source(self._data.held_out, self._held_out, Place(*passage.origin, times=0), "val")]

    def steps(self, passage: Passage) -> tuple[list[int], bool]:
        """The first steps on record that read it, and whether there are more."""
        first = [self._data.ledger.steps_reading(place.dataset, place.start) for place in passage.places if place.times]
        steps = sorted({step for part in first for step in part})
        return list(islice(steps, MOST_STEPS)), len(steps) > MOST_STEPS or passage.copies > len(passage.places)

    @staticmethod
    def _source(
        splits: Sequence[SplitTokens], documents: dict[tuple[int, int], DocumentSpan], place: Place, split: str
    ) -> Source:
        document, found = documents[place.dataset, place.start], splits[place.dataset]
        return Source(
            document=document.name,
            dataset=found.store.location.removesuffix(f"/{split}"),
            split=split,
            shard=found.shard_name(place.start),
            first=place.start - document.start,
            times=place.times,
        )


def _documents(splits: Sequence[SplitTokens], places: Iterable[tuple[int, int]]) -> dict[tuple[int, int], DocumentSpan]:
    """(dataset, token) ▶ the document that it lies in."""
    ordered = sorted(places)
    found: dict[tuple[int, int], DocumentSpan] = {}
    for dataset, split in enumerate(splits):
        own = [start for number, start in ordered if number == dataset]
        found |= {(dataset, start): each for start, each in zip(own, split.documents_at(own), strict=True)}
    return found
