"""Files that may be compressed, opened and read to their ends."""

from __future__ import annotations

import hashlib
import io
import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, BinaryIO, cast

from megalm.data.names import shown
from megalm.data.prepare.corpora.compression import DAMAGE, MAGIC_BYTES, compression_of, decompressed
from megalm.data.prepare.corpora.contents import HEAD_BYTES, UTF_8, NotText, as_utf8, encoding_of
from megalm.data.prepare.corpora.find import Found, find_files
from megalm.data.tally import FileTally
from megalm.errors import DataError

__all__ = ["Files", "Stream", "Text", "files_fingerprint", "find_files", "open_stream", "open_text", "size_of"]


@dataclass(frozen=True)
class Stream:
    """An open file, decompressed.

    Attributes:
        content: what it holds.
        raw: the file as it lies on disk.
        compressed: whether these differ.
    """

    content: IO[bytes]
    raw: BinaryIO
    compressed: bool

    @property
    def consumed(self) -> int:
        """Bytes of the file on disk that have been read."""
        return self.raw.tell()


@dataclass(frozen=True)
class Text(Stream):
    """An open file of text.

    Attributes:
        content: the text in UTF-8, behind any byte-order mark.
        encoding: what the file itself is in.
        mark: bytes of its byte-order mark.
    """

    encoding: str
    mark: int

    def head(self) -> bytes:
        """The first bytes of the text, as far as one read gives them; the file stands where it stood."""
        return cast(io.BufferedReader, self.content).peek(HEAD_BYTES)

    @property
    def splittable(self) -> bool:
        """Whether any stretch of the file can be read without what is before it."""
        return not self.compressed and self.encoding == UTF_8


@contextmanager
def open_stream(path: Path) -> Iterator[Stream]:
    """Open a file for reading from its start, decompressed if its first bytes say that it is compressed.

    Raises:
        DataError: it cannot be read, is cut short or damaged, or is some archive; raised wherever it is read.
    """
    with _opened(path) as (raw, content, head, compressed):
        try:
            encoding_of(head, UTF_8)
        except NotText as finding:
            raise DataError(f"{shown(path)}: {finding}") from None
        yield Stream(_again(content, head), raw, compressed)


@contextmanager
def open_text(path: Path, encoding: str | None) -> Iterator[Text]:
    """Open a file of text, whatever it is compressed with and encoded in.

    Args:
        path: the file.
        encoding: of files without a byte-order mark; None: UTF-8.

    Raises:
        NotText: it holds something else; raised wherever that is met.
        DataError: it cannot be read, or is cut short or damaged.
    """
    with _opened(path) as (raw, content, head, compressed):
        found, mark = encoding_of(head, encoding)
        if found == UTF_8:
            yield Text(_again(content, head, mark), raw, compressed, found, mark)
        else:
            yield Text(as_utf8(_again(content, head, mark), found), raw, compressed, found, mark)


@contextmanager
def _opened(path: Path) -> Iterator[tuple[BinaryIO, IO[bytes], bytes, bool]]:
    """(the file, what it holds, the first bytes of that, which are read already, whether it is compressed)."""
    try:
        with path.open("rb", buffering=HEAD_BYTES) as raw:
            kind = compression_of(raw.read(MAGIC_BYTES))
            raw.seek(0)
            content = raw if kind is None else decompressed(raw, kind)
            yield raw, content, content.read(HEAD_BYTES), kind is not None
    except DAMAGE as error:
        raise DataError(f"{shown(path)}: damaged or cut short ({error}); copy the file again") from None
    except OSError as error:
        reason = error.strerror or f"damaged ({error})"  # bzip2 reports damage as an OSError without a code
        raise DataError(f"{shown(path)}: cannot be read: {reason}") from None


def _again(content: IO[bytes], head: bytes, start: int = 0) -> IO[bytes]:
    """A file whose first bytes have been read, from byte ``start`` of them."""
    if content.seekable():
        content.seek(start)
        return content
    return cast(IO[bytes], io.BufferedReader(_Chained(head[start:], content), buffer_size=2**20))


class _Chained(io.RawIOBase):
    """Some bytes, and then a file."""

    def __init__(self, head: bytes, rest: IO[bytes]) -> None:
        self._head, self._rest = head, rest

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        data = self._head[: len(buffer)] or self._rest.read(len(buffer))
        self._head = self._head[len(data) :]
        buffer[: len(data)] = data
        return len(data)


def size_of(path: Path) -> int:
    """Bytes on disk.

    Raises:
        DataError: the file is gone.
    """
    return _status(path).st_size


def files_fingerprint(source: str, files: Iterable[Path]) -> str:
    """Changes when a file is added, removed, renamed, resized or touched."""
    hasher = hashlib.sha256(os.fsencode(source))
    for path in files:
        status = _status(path)
        hasher.update(os.fsencode(f"{path}\0{status.st_size}\0{status.st_mtime_ns}\n"))
    return hasher.hexdigest()


@dataclass(frozen=True)
class Files:
    """What corpora of files have in common.

    Attributes:
        source: where the files come from, in words.
        found: the files, and those that were left out.
    """

    source: str
    found: Found

    @property
    def files(self) -> tuple[Path, ...]:
        """The files that are read, in order."""
        return self.found.files

    @property
    def num_files(self) -> int:
        """How many files are read."""
        return len(self.files)

    @property
    def files_left_out(self) -> FileTally:
        """The files that are not read, known before any is opened."""
        return self.found.left_out

    @property
    def total_bytes(self) -> int:
        """Size of the files."""
        return sum(size_of(path) for path in self.files)

    def fingerprint(self) -> str:
        """Of the files, not of their contents."""
        return files_fingerprint(self.source, self.files)


def _status(path: Path) -> os.stat_result:
    try:
        return path.stat()
    except OSError as error:
        raise DataError(f"{shown(path)}: cannot be read: {error.strerror}") from None
