"""Files that may be compressed, and which files a user means."""

from __future__ import annotations

import bz2
import gzip
import hashlib
import io
import os
import zlib
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, BinaryIO, cast

import zstandard

from megalm.errors import DataError

COMPRESSED = (".gz", ".bz2", ".zst")


@dataclass(frozen=True)
class Stream:
    """An open file, decompressed.

    Attributes:
        content: what it holds.
        raw: the file as it lies on disk.
    """

    content: IO[bytes]
    raw: BinaryIO

    @property
    def consumed(self) -> int:
        """Bytes of the file on disk that have been read."""
        return self.raw.tell()


def is_compressed(path: Path) -> bool:
    """Whether the name says so."""
    return path.suffix in COMPRESSED


@contextmanager
def open_stream(path: Path) -> Iterator[Stream]:
    """Open a file for reading from its start, decompressed if its name says that it is compressed.

    Raises:
        DataError: it cannot be read, or is cut short or damaged; raised wherever it is read.
    """
    try:
        with path.open("rb") as raw:
            yield Stream(_decompressed(raw, path.suffix), raw)
    except (EOFError, zlib.error, zstandard.ZstdError, gzip.BadGzipFile) as error:
        raise DataError(f"{path}: damaged or cut short ({error}); copy the file again") from None
    except OSError as error:
        reason = error.strerror or str(error)  # bz2 reports damage as an OSError without a code
        raise DataError(f"{path}: cannot be read: {reason}") from None


def find_files(inputs: Sequence[str], suffixes: Sequence[str] = ()) -> tuple[Path, ...]:
    """Files, and all files below folders, in the order given and then by name; hidden files and folders are left out.

    Args:
        inputs: what the user named.
        suffixes: of folders take only files with these endings, compressed or not; empty: all.

    Raises:
        DataError: an input does not exist, or is a folder without such files.
    """
    files: list[Path] = []
    for name in inputs:
        path = Path(name)
        if path.is_file():
            files.append(path)
            continue
        if not path.is_dir():
            raise DataError(f"--input {name}: no such file or folder")
        below = (p for p in path.rglob("*") if p.is_file() and not _is_hidden(p.relative_to(path)))
        found = sorted(p for p in below if not suffixes or _plain_suffix(p) in suffixes)
        if not found:
            wanted = f" ending in {', '.join(suffixes)}" if suffixes else ""
            raise DataError(f"--input {name}: the folder holds no files{wanted}")
        files += found
    return tuple(files)


def size_of(path: Path) -> int:
    """Bytes on disk.

    Raises:
        DataError: the file is gone.
    """
    return _status(path).st_size


def files_fingerprint(source: str, files: Iterable[Path]) -> str:
    """Changes when a file is added, removed, renamed, resized or touched."""
    hasher = hashlib.sha256(source.encode())
    for path in files:
        status = _status(path)
        hasher.update(f"{path}\0{status.st_size}\0{status.st_mtime_ns}\n".encode())
    return hasher.hexdigest()


@dataclass(frozen=True)
class Files:
    """What corpora of files have in common.

    Attributes:
        source: where the files come from, in words.
        files: in order.
    """

    source: str
    files: tuple[Path, ...]

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
        raise DataError(f"{path}: cannot be read: {error.strerror}") from None


def _decompressed(raw: BinaryIO, suffix: str) -> IO[bytes]:
    if suffix == ".gz":
        return cast(IO[bytes], gzip.GzipFile(fileobj=raw))
    if suffix == ".bz2":
        return cast(IO[bytes], bz2.BZ2File(raw))
    if suffix == ".zst":
        return io.BufferedReader(_ZstdReader(raw), buffer_size=2**20)
    return raw


class _ZstdReader(io.RawIOBase):
    """All frames of a file; the library's own reader takes a file that ends within a frame for a whole one."""

    def __init__(self, raw: BinaryIO) -> None:
        self._raw = raw
        self._frame: Any = None
        self._packed = self._plain = b""

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        while not self._plain:
            if not self._packed:
                self._packed = self._raw.read(2**18)
                if not self._packed:
                    if self._frame is not None:
                        raise EOFError("it ends within a zstd frame")
                    return 0
            if self._frame is None:
                self._frame = zstandard.ZstdDecompressor().decompressobj()
            self._plain = self._frame.decompress(self._packed)
            self._packed = b""
            if self._frame.eof:
                self._packed, self._frame = self._frame.unused_data, None
        size = min(len(buffer), len(self._plain))
        buffer[:size], self._plain = self._plain[:size], self._plain[size:]
        return size


def _plain_suffix(path: Path) -> str:
    return path.with_suffix("").suffix if is_compressed(path) else path.suffix


def _is_hidden(path: Path) -> bool:
    return any(part.startswith(".") for part in path.parts)
