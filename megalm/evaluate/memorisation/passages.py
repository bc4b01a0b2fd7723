"""The passages that a model is asked for, and how often its run has read each of them, wherever they stand. No torch.

In two passes over the data. The first draws a passage of each document and, of each group of times read, some. The
second looks for those in the whole training text: also in the middle of other documents, and those of held-out ones.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from megalm.evaluate.memorisation.candidates import Candidates, Drawn, Ints, draw
from megalm.evaluate.memorisation.search import PassageSearch
from megalm.evaluate.memorisation.seen import RunData
from megalm.evaluate.memorisation.settings import Memorisation

MOST_PLACES = 100
"""Of each passage, places that are kept; all are counted."""

HELD_OUT, UNREAD = "held out", "not read yet"


@dataclass(frozen=True, order=True)
class Place:
    """Where a passage stands.

    Attributes:
        dataset: number of the dataset.
        start: its first token, counted over the split.
        times: how often the run has read it there.
    """

    dataset: int
    start: int
    times: int


@dataclass(frozen=True)
class Passage:
    """A passage.

    Attributes:
        tokens: of the longest prompt and the continuation.
        held_out: whether it was drawn of a validation document.
        origin: dataset and first token of the document that it was drawn of.
        times: how often the run has read it.
        whole: how often of these in one sequence; otherwise its parts were in two.
        copies: places in the training text where it stands.
        places: of them, the first.
    """

    tokens: tuple[int, ...]
    held_out: bool
    origin: tuple[int, int]
    times: int
    whole: int
    copies: int
    places: tuple[Place, ...]

    @property
    def group(self) -> str:
        """The name of the group: times read by powers of ten, once apart; or why it was never read."""
        return group_of(self.times) if self.times else HELD_OUT if self.held_out else UNREAD


@dataclass(frozen=True)
class Passages:
    """All passages that are asked for.

    Attributes:
        all: by group, and in it by draw.
        training: what the training documents gave.
        held_out: what the validation documents gave.
    """

    all: tuple[Passage, ...]
    training: Drawn
    held_out: Drawn

    @property
    def leaked(self) -> int:
        """How many of validation documents are in training text that was read."""
        return sum(each.held_out and each.times > 0 for each in self.all)

    def counts(self) -> dict[str, Any]:
        """As a result's record has it."""
        training, held_out = self.training.counts(), self.held_out.counts()
        return {"training": training, "held_out": held_out, "held_out_passages_read_in_training": self.leaked}


def group_of(times: int) -> str:
    """1, 2 to 9, 10 to 99, 100 to 999 and so on."""
    low = 10 ** (len(str(times)) - 1)
    return "1" if times == 1 else f"{max(low, 2):,} to {10 * low - 1:,}"


def draw_all(data: RunData, settings: Memorisation, progress: Callable[[int], object]) -> tuple[Drawn, Drawn]:
    """Draw a passage of each training document and of each validation document.

    Args:
        data: of the run, as far as the checkpoint has read them.
        settings: of the task.
        progress: told how many more documents are done.

    Raises:
        DataError: a shard, or a file that names documents, is missing or damaged.
    """

    def times_read(dataset: int, starts: Ints) -> Ints:
        return data.ledger.times_read(dataset, starts, settings.passage_tokens)

    training = draw(data.train, settings, times_read=times_read, named=settings.documents, progress=progress)
    return training, draw(data.held_out, settings, times_read=None, named=None, progress=progress)


def count_all(
    data: RunData, settings: Memorisation, training: Drawn, held_out: Drawn, progress: Callable[[int], object]
) -> Passages:
    """Choose some of the drawn passages of each group, and count how often the run has read each.

    Args:
        data: of the run.
        settings: of the task.
        training: what the training documents gave.
        held_out: what the validation documents gave.
        progress: told how many more tokens are searched.

    Raises:
        DataError: a shard is missing or damaged.
    """
    origins: dict[tuple[int, ...], tuple[bool, tuple[int, int]]] = {}
    for splits, drawn, is_held_out in ((data.held_out, held_out, True), (data.train, training, False)):
        for origin in _chosen(drawn.kept, settings.limit):
            passage = splits[origin[0]].at(origin[1], settings.passage_tokens)
            origins[tuple(passage.tolist())] = (is_held_out, origin)  # a training document's, where it is of both
    found = _counted(data, list(origins), progress)
    passages = [
        Passage(tokens, is_held_out, origin, **counts)
        for (tokens, (is_held_out, origin)), counts in zip(origins.items(), found, strict=True)
    ]
    return Passages(tuple(sorted(passages, key=_by_group)), training, held_out)


def _by_group(passage: Passage) -> tuple[int, int]:
    group = passage.group
    first = {HELD_OUT: 0, UNREAD: 1}.get(group, 2)
    return first, 0 if first < 2 else len(str(passage.times)) + (passage.times > 1)


def _chosen(candidates: Candidates, limit: int) -> list[tuple[int, int]]:
    """Dataset and first token of at most ``limit`` passages of each group: those with the smallest hashes."""
    groups: dict[str, list[tuple[int, int]]] = {}
    columns = (candidates.times, candidates.dataset, candidates.starts)
    for times, dataset, start in zip(*(column.tolist() for column in columns), strict=True):
        members = groups.setdefault(group_of(times) if times else "", [])
        if len(members) < limit:
            members.append((dataset, start))
    return [origin for members in groups.values() for origin in members]


def _counted(
    data: RunData, passages: Sequence[tuple[int, ...]], progress: Callable[[int], object]
) -> list[dict[str, Any]]:
    """Times, copies and places of each passage in the training text."""
    if not passages:
        return []
    search = PassageSearch(np.array(passages, np.int64))
    times, whole, copies = (np.zeros(len(passages), np.int64) for _ in range(3))
    places: list[list[Place]] = [[] for _ in passages]
    for dataset, split in enumerate(data.train):
        done = 0
        for first, block in split.blocks(search.length - 1):
            starts, which = search.find(block)
            starts += first
            read = data.ledger.times_read(dataset, starts, search.length)
            begin, end = data.ledger.sequences_of(starts, search.length)
            np.add.at(times, which, read)
            np.add.at(whole, which, np.where(begin == end, read, 0))
            np.add.at(copies, which, 1)
            for number, start, count in zip(which.tolist(), starts.tolist(), read.tolist(), strict=True):
                if len(places[number]) < MOST_PLACES:
                    places[number].append(Place(dataset, start, count))
            progress(first + block.size - done)
            done = first + block.size
    return [
        {"times": int(times[n]), "whole": int(whole[n]), "copies": int(copies[n]), "places": tuple(places[n])}
        for n in range(len(passages))
    ]
