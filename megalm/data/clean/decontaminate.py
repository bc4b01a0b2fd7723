"""Removes documents that contain what a model will be evaluated on (Brown et al. 2020, appendix C)."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from megalm.data.clean.words import ngram_hashes, words_of
from megalm.data.corpora.streams import open_stream

DEFAULT_NGRAM = 13
SHORTEST = 8
"""Evaluation texts of fewer words are not looked for: they are phrases that any document may hold."""


@dataclass(frozen=True)
class Contamination:
    """N-grams of evaluation files.

    Attributes:
        sources: names of the files.
        hashes: by number of words, the sorted hashes of n-grams.
        owners: by number of words, the file of each hash.
    """

    sources: tuple[str, ...]
    hashes: dict[int, NDArray[np.uint64]]
    owners: dict[int, NDArray[np.int64]]

    @classmethod
    def of(cls, files: Sequence[str], ngram: int) -> Contamination:
        """All n-grams of some files; a text of fewer than ``ngram`` words, but at least 8, is one n-gram.

        Raises:
            DataError: a file cannot be read.
        """
        found: dict[int, list[tuple[NDArray[np.uint64], int]]] = {}
        for owner, file in enumerate(files):
            for text in evaluation_texts(file):
                words = words_of(text)
                n = min(len(words), ngram)
                if n >= min(SHORTEST, ngram):
                    found.setdefault(n, []).append((ngram_hashes(words, n), owner))
        hashes, owners = {}, {}
        for n, parts in found.items():
            values = np.concatenate([part for part, _ in parts])
            files_of = np.repeat([owner for _, owner in parts], [part.size for part, _ in parts])
            hashes[n], first = np.unique(values, return_index=True)
            owners[n] = files_of[first]
        return cls(tuple(files), hashes, owners)

    def source_of(self, text: str) -> str | None:
        """The evaluation file that a document shares an n-gram with; None if there is none."""
        words = words_of(text)
        for n, known in self.hashes.items():
            own = ngram_hashes(words, n)
            if not own.size:
                continue
            place = np.minimum(np.searchsorted(known, own), known.size - 1)
            hits = np.flatnonzero(known[place] == own)
            if hits.size:
                return self.sources[int(self.owners[n][place[hits[0]]])]
        return None


def evaluation_texts(file: str) -> Iterator[str]:
    """Texts of an evaluation file: all texts in each record of JSON Lines, or else each line.

    Raises:
        DataError: it cannot be read.
    """
    path = Path(file)
    is_json = ".json" in path.name
    with open_stream(path) as stream:
        for line in stream.content:
            text = line.decode("utf-8", errors="replace").strip()
            if not is_json:
                yield text
                continue
            try:
                yield from _texts(json.loads(text))
            except ValueError:
                yield text


def _texts(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict):
        for inner in value.values():
            yield from _texts(inner)
    elif isinstance(value, list):
        for inner in value:
            yield from _texts(inner)
