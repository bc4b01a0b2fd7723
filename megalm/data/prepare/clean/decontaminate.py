"""Removes documents that contain what a model will be evaluated on (Brown et al. 2020, appendix C)."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import numpy as np
from numpy.typing import NDArray

from megalm.data.names import shown
from megalm.data.prepare.clean.words import ngram_hashes, words_of
from megalm.data.prepare.corpora.contents import UTF_8, NotText, decode
from megalm.data.prepare.corpora.streams import Text, open_text
from megalm.errors import DataError

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
    def of(cls, files: Sequence[str], ngram: int, encoding: str | None = None) -> Contamination:
        """All n-grams of some files; a text of fewer than ``ngram`` words, but at least 8, is one n-gram.

        Raises:
            DataError: a file cannot be read.
        """
        found: dict[int, list[tuple[NDArray[np.uint64], int]]] = {}
        for owner, file in enumerate(files):
            for text in evaluation_texts(file, encoding):
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


def evaluation_texts(file: str, encoding: str | None = None) -> Iterator[str]:
    """Texts of an evaluation file: all texts in each record of JSON or JSON Lines, or else each line.

    Args:
        file: its path; it may be compressed.
        encoding: of a file that is not in UTF-8 and has no byte-order mark.

    Raises:
        DataError: it cannot be read, or is no text in such an encoding.
    """
    try:
        try:
            texts = _texts_of(Path(file), None)
        except NotText:
            if encoding is None:
                raise
            texts = _texts_of(Path(file), encoding)
    except NotText as finding:
        raise DataError(f"--decontaminate {shown(file)}: {finding}") from None
    yield from texts


def _texts_of(path: Path, encoding: str | None) -> list[str]:
    with open_text(path, encoding) as stream:
        return list(_records(stream.content, stream.mark) if ".json" in path.name.lower() else _lines(stream))


def _lines(stream: Text) -> Iterator[str]:
    offset = stream.mark
    for line in stream.content:
        yield decode(line, UTF_8, offset).strip()
        offset += len(line)


def _records(content: IO[bytes], offset: int) -> Iterator[str]:
    """Texts of JSON Lines; or of one JSON value over many lines."""
    lines = []
    for line in content:
        text = decode(line, UTF_8, offset).strip()
        offset += len(line)
        try:
            value = json.loads(text) if text else ""
        except (ValueError, RecursionError):
            lines.append(text)
        else:
            yield from _texts(value)
    if lines:
        try:
            yield from _texts(json.loads("\n".join(lines)))
        except (ValueError, RecursionError):
            yield from lines


def _texts(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict):
        for inner in value.values():
            yield from _texts(inner)
    elif isinstance(value, list):
        for inner in value:
            yield from _texts(inner)
