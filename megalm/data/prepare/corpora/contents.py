"""What a file holds, told by its bytes: text in some encoding, or something that is no text."""

from __future__ import annotations

import codecs
import io
from typing import IO, Any, cast

HEAD_BYTES = 2**16
"""How much of a file is looked at before it is taken for text."""
UTF_8 = "utf-8"

_BYTE_ORDER_MARKS = (  # the longer ones first: UTF-32's begins with UTF-16's
    (codecs.BOM_UTF32_LE, "utf-32-le"),
    (codecs.BOM_UTF32_BE, "utf-32-be"),
    (codecs.BOM_UTF8, UTF_8),
    (codecs.BOM_UTF16_LE, "utf-16-le"),
    (codecs.BOM_UTF16_BE, "utf-16-be"),
)
_BINARY = (
    (0, b"\x89PNG\r\n\x1a\n", "PNG image"),
    (0, b"\xff\xd8\xff", "JPEG image"),
    (0, b"GIF8", "GIF image"),
    (0, b"II*\0", "TIFF image"),
    (0, b"MM\0*", "TIFF image"),
    (0, b"%PDF-", "PDF"),
    (0, b"\x7fELF", "ELF program"),
    (0, b"PK\x03\x04", "zip archive"),
    (0, b"PK\x05\x06", "zip archive"),
    (0, b"7z\xbc\xaf\x27\x1c", "7z archive"),
    (0, b"Rar!\x1a\x07", "RAR archive"),
    (257, b"ustar\0", "tar archive"),
    (257, b"ustar  \0", "tar archive"),
    (0, b"SQLite format 3\0", "SQLite database"),
    (0, b"PAR1", "Parquet file"),
    (0, b"ARROW1\0\0", "Arrow file"),
    (0, b"Obj\x01", "Avro file"),
    (0, b"\x89HDF\r\n", "HDF5 file"),
    (0, b"\x93NUMPY", "NumPy array"),
    (0, b"\xca\xfe\xba\xbe", "compiled program"),
    (0, b"\xcf\xfa\xed\xfe", "compiled program"),
    (0, b"\0asm", "compiled program"),
    (0, b"\xd0\xcf\x11\xe0\xa1\xb1\x1a\xe1", "old Office document"),
    (0, b"OggS", "sound or film"),
    (0, b"ID3\x03", "sound or film"),
    (0, b"ID3\x04", "sound or film"),
    (0, b"\x04\x22\x4d\x18", "lz4 file"),
    (0, b"LZIP\x01", "lzip file"),
    (0, b"\x1f\x9d", "compress (.Z) file"),
    (0, b"\x5d\x00\x00", "lzma file of the old format"),
)
_ADVICE = {
    "Parquet file": "--corpus hf reads it",
    "zip archive": "unpack it",
    "7z archive": "unpack it",
    "RAR archive": "unpack it",
    "tar archive": "unpack it",
    "lz4 file": "gzip, bzip2, xz and zstd are read",
    "lzip file": "gzip, bzip2, xz and zstd are read",
    "compress (.Z) file": "gzip, bzip2, xz and zstd are read",
    "lzma file of the old format": "gzip, bzip2, xz and zstd are read",
}


class NotText(Exception):  # noqa: N818 - a finding, not an error: corpora count it
    """A file's contents cannot be read as text.

    Attributes:
        reason: in a few words that reports count by.
        advice: what would have it read; may be empty.
    """

    def __init__(self, reason: str, advice: str = "") -> None:
        super().__init__(f"{reason}; {advice}" if advice else reason)
        self.reason, self.advice = reason, advice


def encoding_of(head: bytes, encoding: str | None) -> tuple[str, int]:
    """How a file is encoded: by its byte-order mark, or as the user says, or in UTF-8.

    Args:
        head: its first bytes, decompressed.
        encoding: what the user says of files without a mark.

    Returns:
        (name of the encoding, bytes of the mark)

    Raises:
        NotText: the bytes are those of something else.
    """
    for mark, name in _BYTE_ORDER_MARKS:
        if head.startswith(mark):
            return name, len(mark)
    for offset, magic, reason in _BINARY:
        if head[offset : offset + len(magic)] == magic:
            raise NotText(reason, _ADVICE.get(reason, ""))
    if encoding is not None:
        return normal_name(encoding), 0
    if b"\0" in head:
        raise NotText("binary (has NUL bytes)", _advice_on_nuls(head))
    return UTF_8, 0


def decode(data: bytes, encoding: str, offset: int = 0) -> str:
    """All of some bytes as text.

    Args:
        data: what to decode.
        encoding: its encoding.
        offset: where in the file it begins, for the message.

    Raises:
        NotText: they are not in that encoding, or hold a NUL.
    """
    try:
        text = data.decode(encoding)
    except UnicodeDecodeError as error:
        raise undecodable(error, offset) from None
    if "\0" in text:
        raise NotText("binary (has NUL bytes)", f"the first at character {text.index(chr(0)):,}")
    return text


def undecodable(error: UnicodeDecodeError, offset: int) -> NotText:
    """What to say of bytes that are not in an encoding; ``offset`` is where in the file the decoded bytes begin."""
    at = offset + error.start
    shown = " ".join(f"0x{byte:02x}" for byte in error.object[error.start : error.start + 1])
    name = display_name(error.encoding)
    right = "--encoding names another, such as latin-1 or cp1252" if name == "UTF-8" else "--encoding names another"
    return NotText(f"not {name}", f"byte {at:,} is {shown}; {right}")


def normal_name(encoding: str) -> str:
    """Python's own name of an encoding; LookupError: there is none, or it is none of text."""
    return codecs.lookup(encoding).name


def display_name(encoding: str) -> str:
    """As people write it."""
    return encoding.upper() if encoding.lower().startswith("utf") else encoding


def is_text_encoding(encoding: str) -> bool:
    """Whether Python knows a text encoding of this name."""
    try:
        return bool("a".encode(encoding).decode(encoding) == "a")
    except (LookupError, UnicodeError, TypeError, ValueError):
        return False


class _Utf8(io.RawIOBase):
    """A file in another encoding, as UTF-8."""

    def __init__(self, content: IO[bytes], encoding: str) -> None:
        self._content, self._read = content, 0
        self._decoder = codecs.getincrementaldecoder(encoding)()
        self._plain = b""
        self._ended = False

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        while not self._plain and not self._ended:
            data = self._content.read(2**18)
            held = len(self._decoder.getstate()[0])
            try:
                text = self._decoder.decode(data, final=not data)
            except UnicodeDecodeError as error:
                raise undecodable(error, self._read - held) from None
            if "\0" in text:
                raise NotText("binary (has NUL bytes)", f"as {display_name(self._decoder_name())}")
            self._read += len(data)
            self._plain, self._ended = text.encode("utf-8", "surrogatepass"), not data
        size = min(len(buffer), len(self._plain))
        buffer[:size], self._plain = self._plain[:size], self._plain[size:]
        return size

    def _decoder_name(self) -> str:
        return type(self._decoder).__module__.rpartition(".")[2].replace("_", "-")


def as_utf8(content: IO[bytes], encoding: str) -> IO[bytes]:
    """A file in another encoding as one in UTF-8, from where it stands; NotText wherever it is not in that encoding."""
    return cast(IO[bytes], io.BufferedReader(_Utf8(content, encoding), buffer_size=2**18))


def _advice_on_nuls(head: bytes) -> str:
    """Text in UTF-16 without a mark has a NUL in every second byte, wherever the letters are Latin."""
    even, odd = head[0::2], head[1::2]
    for zeros, letters, name in ((odd, even, "utf-16-le"), (even, odd, "utf-16-be")):
        if len(head) >= 4 and zeros.count(0) > 0.4 * len(zeros) and letters.count(0) < 0.01 * len(letters):
            return f"if it is text, --encoding {name} reads it"
    return ""
