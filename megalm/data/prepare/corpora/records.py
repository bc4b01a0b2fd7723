"""Files that hold many documents, one after the other: blocks are stretches of a file that begin and end with one.

Uncompressed files in UTF-8 are only looked into where one block ends; the worker reads its own stretch. Others have to
be decompressed or decoded from the start, so the process that lists blocks does it, and hands the text on.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn, Protocol

from megalm.data.document import Block, Document, Rejected
from megalm.data.names import shown
from megalm.data.prepare.corpora.contents import UTF_8, NotText, undecodable
from megalm.data.prepare.corpora.options import Reading
from megalm.data.prepare.corpora.streams import Files, Text, open_stream, open_text, size_of
from megalm.data.tally import RejectedFile
from megalm.errors import DataError


class Reader(Protocol):
    """Bytes of one record ▶ a document; picklable."""

    def __call__(self, name: str, data: bytes) -> Document | Rejected:
        """Read a record; ``name`` says where it is."""


@dataclass(frozen=True)
class PlainText:
    """A record is its text."""

    def __call__(self, name: str, data: bytes) -> Document | Rejected:
        """All of it."""
        return Rejected(name, "has NUL bytes") if b"\0" in data else Document.plain(name, data)


class Check(Protocol):
    """First bytes of a file's text ▶ nothing, or NotText if records cannot be read from such a file."""

    def __call__(self, head: bytes) -> None:
        """Look at them."""


@dataclass(frozen=True)
class Records:
    """How the bytes of a file are cut into records, and read.

    Attributes:
        reader: makes documents of records.
        reading: how files are decoded.
        blank_lines: records end at blank lines, not at every line.
    """

    reader: Reader
    reading: Reading
    blank_lines: bool

    def documents(self, path: Path, data: bytes, start: int) -> Iterator[Document | Rejected]:
        """Records of a stretch that begins at byte ``start`` of a file; lines without any text are none.

        Raises:
            DataError: the stretch is not in UTF-8, and such records are not to be rejected one by one.
        """
        whole = True
        try:
            data.decode(UTF_8)
        except UnicodeDecodeError as error:
            if not self.reading.reject:
                self.refuse(path, undecodable(error, start))
            whole = False
        for name, record in _records(shown(path), data, start, self.blank_lines):
            yield self.reader(name, record) if whole or _is_utf8(record) else Rejected(name, "not UTF-8")

    @staticmethod
    def refuse(path: Path, finding: NotText) -> NoReturn:
        """Say that a file of records is in another encoding."""
        reject = "--undecodable reject leaves such records out and counts them"
        raise DataError(f"{shown(path)}: {finding}; {reject}") from None


@dataclass(frozen=True)
class Stretch:
    """Whole records of an uncompressed file in UTF-8.

    Attributes:
        path: the file.
        start: first byte.
        end: the one after the last.
        records: what they are.
    """

    path: Path
    start: int
    end: int
    records: Records

    @property
    def bytes(self) -> int:
        """Its length."""
        return self.end - self.start

    def documents(self) -> Iterator[Document | Rejected]:
        """Read the stretch."""
        with open_stream(self.path) as stream:
            stream.content.seek(self.start)
            data = stream.content.read(self.end - self.start)
        yield from self.records.documents(self.path, data, self.start)


@dataclass(frozen=True)
class Excerpt:
    """Whole records of a file that is compressed, or in another encoding.

    Attributes:
        path: the file.
        start: first byte, of what the file holds.
        data: the records, in UTF-8.
        bytes: what it took on disk.
        records: what they are.
    """

    path: Path
    start: int
    data: bytes
    bytes: int
    records: Records

    def documents(self) -> Iterator[Document | Rejected]:
        """Read the records."""
        yield from self.records.documents(self.path, self.data, self.start)


@dataclass(frozen=True)
class Unread:
    """A file without a record that can be read.

    Attributes:
        file: which, and why.
        bytes: nothing of it counts as progress.
    """

    file: RejectedFile
    bytes: int = 0

    def documents(self) -> Iterator[RejectedFile]:
        """The finding."""
        yield self.file


@dataclass(frozen=True)
class RecordCorpus(Files):
    """Files of records.

    Attributes:
        reader: makes documents of records.
        reading: how files are decoded.
        blank_lines: records end at blank lines, not at every line.
        check: looks at the beginning of each file; None: any will do.
    """

    reader: Reader
    reading: Reading = Reading()  # noqa: RUF009 - frozen
    blank_lines: bool = False
    check: Check | None = None

    def blocks(self, block_bytes: int) -> Iterator[Block]:
        """Stretches of each file, of about ``block_bytes``; of a file that cannot be read, the reason."""
        for path in self.files:
            blocks = 0
            try:
                with open_text(path, self.reading.encoding) as text:
                    self._look(path, text)
                    for block in (self._stretches if text.splittable else self._excerpts)(path, text, block_bytes):
                        blocks += 1
                        yield block
            except NotText as finding:
                if blocks and not self.reading.reject:
                    Records.refuse(path, finding)
                rest = ", from there on" if blocks else ""
                yield Unread(RejectedFile(shown(path), f"{finding.reason}{rest}", size_of(path), finding.advice))
            else:
                if not blocks:
                    yield Unread(RejectedFile(shown(path), "empty", size_of(path)))

    @property
    def _records(self) -> Records:
        return Records(self.reader, self.reading, self.blank_lines)

    def _look(self, path: Path, text: Text) -> None:
        """Refuse a file that begins in another encoding before hours are spent on others; NotText: no records."""
        head = text.head()
        try:
            head.decode(UTF_8)
        except UnicodeDecodeError as error:
            if error.start < len(head) - 4 and not self.reading.reject:  # else it may be cut within a character
                Records.refuse(path, undecodable(error, text.mark))
        if self.check is not None:
            self.check(head)

    def _stretches(self, path: Path, text: Text, block_bytes: int) -> Iterator[Stretch]:
        file, size, start = text.content, size_of(path), text.mark
        while start < size:
            file.seek(min(start + block_bytes, size))
            file.readline()  # most likely the rest of a line
            while self.blank_lines and (line := file.readline()):
                if not line.strip():
                    break
            end = file.tell()
            yield Stretch(path, start, end, self._records)
            start = end

    def _excerpts(self, path: Path, text: Text, block_bytes: int) -> Iterator[Excerpt]:
        start = consumed = size = 0
        lines: list[bytes] = []
        for line in text.content:
            lines.append(line)
            size += len(line)
            if size >= block_bytes and (not self.blank_lines or not line.strip()):
                yield Excerpt(path, start, b"".join(lines), text.consumed - consumed, self._records)
                start, consumed = start + size, text.consumed
                lines, size = [], 0
        if lines:
            yield Excerpt(path, start, b"".join(lines), text.consumed - consumed, self._records)


def _is_utf8(data: bytes) -> bool:
    try:
        data.decode(UTF_8)
    except UnicodeDecodeError:
        return False
    return True


def _records(name: str, data: bytes, start: int, blank_lines: bool) -> Iterator[tuple[str, bytes]]:
    """(name, bytes) of each record of a stretch that begins at byte ``start`` of the file."""
    offset = begin = start
    record: list[bytes] = []
    for line in data.splitlines(keepends=True) if b"\r" not in data else _lines(data):
        if line.strip():
            if not record:
                begin = offset
            record.append(line)
        if record and not (blank_lines and line.strip()):
            yield f"{name}@{begin}", b"".join(record).rstrip(b"\r\n")
            record = []
        offset += len(line)
    if record:
        yield f"{name}@{begin}", b"".join(record).rstrip(b"\r\n")


def _lines(data: bytes) -> Iterator[bytes]:
    """Lines that end with a line feed, as files yield them: a lone carriage return is part of its line."""
    start = 0
    while start < len(data):
        end = data.find(b"\n", start) + 1 or len(data)
        yield data[start:end]
        start = end
