"""Files that hold many documents, one after the other: blocks are stretches of a file that begin and end with one.

Uncompressed files are only looked into where one block ends; the worker reads its own stretch. Compressed ones have to
be decompressed from the start, so the process that lists blocks does it, and hands the bytes on.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from megalm.data.corpora.streams import Files, is_compressed, open_stream, size_of
from megalm.data.document import Block, Document, Rejected


class Reader(Protocol):
    """Bytes of one record ▶ a document; picklable."""

    def __call__(self, name: str, data: bytes) -> Document | Rejected:
        """Read a record; ``name`` says where it is."""


@dataclass(frozen=True)
class PlainText:
    """A record is its text."""

    def __call__(self, name: str, data: bytes) -> Document:
        """All of it."""
        return Document.plain(name, data)


@dataclass(frozen=True)
class Stretch:
    """Whole records of an uncompressed file.

    Attributes:
        path: the file.
        start: first byte.
        end: the one after the last.
        blank_lines: records end at blank lines, not at every line.
        reader: makes documents of records.
    """

    path: Path
    start: int
    end: int
    blank_lines: bool
    reader: Reader

    @property
    def bytes(self) -> int:
        """Its length."""
        return self.end - self.start

    def documents(self) -> Iterator[Document | Rejected]:
        """Read the stretch."""
        with open_stream(self.path) as stream:
            stream.content.seek(self.start)
            data = stream.content.read(self.end - self.start)
        yield from _documents(str(self.path), data, self.start, self.blank_lines, self.reader)


@dataclass(frozen=True)
class Excerpt:
    """Whole records of a compressed file.

    Attributes:
        path: the file.
        start: first byte, of what the file holds.
        data: the records.
        bytes: what it took on disk.
        blank_lines: records end at blank lines, not at every line.
        reader: makes documents of records.
    """

    path: Path
    start: int
    data: bytes
    bytes: int
    blank_lines: bool
    reader: Reader

    def documents(self) -> Iterator[Document | Rejected]:
        """Read the records."""
        yield from _documents(str(self.path), self.data, self.start, self.blank_lines, self.reader)


@dataclass(frozen=True)
class RecordCorpus(Files):
    """Files of records.

    Attributes:
        reader: makes documents of records.
        blank_lines: records end at blank lines, not at every line.
    """

    reader: Reader
    blank_lines: bool = False

    def blocks(self, block_bytes: int) -> Iterator[Block]:
        """Stretches of each file, of about ``block_bytes``."""
        for path in self.files:
            yield from (self._excerpts if is_compressed(path) else self._stretches)(path, block_bytes)

    def _stretches(self, path: Path, block_bytes: int) -> Iterator[Stretch]:
        with open_stream(path) as stream:
            file, size, start = stream.content, size_of(path), 0
            while start < size:
                file.seek(min(start + block_bytes, size))
                file.readline()  # most likely the rest of a line
                while self.blank_lines and (line := file.readline()):
                    if not line.strip():
                        break
                end = file.tell()
                yield Stretch(path, start, end, self.blank_lines, self.reader)
                start = end

    def _excerpts(self, path: Path, block_bytes: int) -> Iterator[Excerpt]:
        with open_stream(path) as stream:
            start = consumed = size = 0
            lines: list[bytes] = []
            for line in stream.content:
                lines.append(line)
                size += len(line)
                if size >= block_bytes and (not self.blank_lines or not line.strip()):
                    yield self._excerpt(path, start, lines, stream.consumed - consumed)
                    start, consumed = start + size, stream.consumed
                    lines, size = [], 0
            if lines:
                yield self._excerpt(path, start, lines, stream.consumed - consumed)

    def _excerpt(self, path: Path, start: int, lines: list[bytes], on_disk: int) -> Excerpt:
        return Excerpt(path, start, b"".join(lines), on_disk, self.blank_lines, self.reader)


def _documents(name: str, data: bytes, start: int, blank_lines: bool, reader: Reader) -> Iterator[Document | Rejected]:
    """Records of a stretch that begins at byte ``start`` of the file; lines without any text are none."""
    offset = begin = start
    record: list[bytes] = []
    for line in data.splitlines(keepends=True) if b"\r" not in data else _lines(data):
        if line.strip():
            if not record:
                begin = offset
            record.append(line)
        if record and not (blank_lines and line.strip()):
            yield reader(f"{name}@{begin}", b"".join(record).rstrip(b"\r\n"))
            record = []
        offset += len(line)
    if record:
        yield reader(f"{name}@{begin}", b"".join(record).rstrip(b"\r\n"))


def _lines(data: bytes) -> Iterator[bytes]:
    """Lines that end with a line feed, as files yield them: a lone carriage return is part of its line."""
    start = 0
    while start < len(data):
        end = data.find(b"\n", start) + 1 or len(data)
        yield data[start:end]
        start = end
