"""Compressed files, told by their first bytes whatever their names; every stream of a file, or an error."""

from __future__ import annotations

import bz2
import io
import lzma
import zlib
from collections.abc import Callable
from typing import IO, Any, BinaryIO, cast

import zstandard

SUFFIXES = (".gz", ".gzip", ".bz2", ".zst", ".zstd", ".xz")
"""Endings that compressing programs add to a name; what a file is follows from its bytes."""
DAMAGE = (EOFError, zlib.error, lzma.LZMAError, zstandard.ZstdError)
"""What reading a damaged file raises, besides an OSError without a code (bzip2)."""
MAGIC_BYTES = 10
"""As many first bytes as :func:`compression_of` looks at."""
_PACKED_BYTES = 2**16
_PLAIN_BYTES = 2**20


def compression_of(head: bytes) -> str | None:
    """``gzip``, ``bzip2``, ``xz`` or ``zstd``; None: a file that begins so is none of them."""
    if head[:3] == b"\x1f\x8b\x08":
        return "gzip"
    if head[:3] == b"BZh" and head[4:10] in (b"1AY&SY", b"\x17rE8P\x90"):  # a block, or the end of an empty file
        return "bzip2"
    if head[:6] == b"\xfd7zXZ\x00":
        return "xz"
    # RFC 8878: a frame, or a frame that readers skip (its last four bits are free).
    if head[:4] == b"\x28\xb5\x2f\xfd" or (head[1:4] == b"\x2a\x4d\x18" and head[0] & 0xF0 == 0x50):
        return "zstd"
    return None


def decompressed(raw: BinaryIO, kind: str) -> IO[bytes]:
    """What a file of this kind holds, from where it stands; all of its streams, one after the other.

    Raises:
        One of :data:`DAMAGE`, or OSError, wherever a stream is damaged, cut short, or followed by something else.
    """
    return cast(IO[bytes], io.BufferedReader(_Streams(raw, kind), buffer_size=_PLAIN_BYTES))


_DECOMPRESSORS: dict[str, Callable[[], Any]] = {
    "gzip": lambda: zlib.decompressobj(wbits=31),
    "bzip2": bz2.BZ2Decompressor,
    "xz": lambda: lzma.LZMADecompressor(format=lzma.FORMAT_XZ),
    "zstd": lambda: zstandard.ZstdDecompressor().decompressobj(),
}


class _Streams(io.RawIOBase):
    """All streams of a file.

    The libraries' own readers take a zstd file that ends within a frame for a whole one, and leave out whatever they do
    not understand behind the first stream of a bzip2 or xz file.
    """

    def __init__(self, raw: BinaryIO, kind: str) -> None:
        self._raw, self._kind = raw, kind
        self._stream: Any = None
        self._packed = b""
        self._plain = memoryview(b"")

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        while not self._plain:
            if not self._packed:
                self._packed = self._raw.read(_PACKED_BYTES)
                if not self._packed:
                    if self._stream is not None:
                        raise EOFError(f"it ends within a {self._kind} stream")
                    return 0
            self._plain = memoryview(self._decompress())
        size = min(len(buffer), len(self._plain))
        buffer[:size] = self._plain[:size]
        self._plain = self._plain[size:]
        return size

    def _decompress(self) -> bytes:
        """The next stretch; it may be empty."""
        if self._stream is None:
            self._packed = self._packed.lstrip(b"\0")  # padding between and behind streams, as tapes and xz have it
            if not self._packed:
                return b""
            self._stream = _DECOMPRESSORS[self._kind]()
        plain: bytes = self._stream.decompress(self._packed)
        self._packed = b""
        if self._stream.eof:
            self._packed, self._stream = self._stream.unused_data, None
        return plain
