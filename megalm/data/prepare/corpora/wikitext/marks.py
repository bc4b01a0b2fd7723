"""Control characters that stand for markup that is not text yet; XML allows none of them, so no article holds any.

Whatever a renderer has found to be text is free of them, and nothing looks at it again.
"""

from __future__ import annotations

import html
import re

HEADING = "\x00"
"""Begins a line that is a heading; its level follows."""
QUOTE = "\x01"
"""An apostrophe that may be part of a mark of bold or italics."""
QUOTE_END = "\x12"
"""Ends a run of :data:`QUOTE`: two runs that come to touch stay two."""
STRIP_START, STRIP_END = "\x02", "\x03"
"""Around the number of a tag that was taken out before parsing."""
GAP = "\x04"
"""Where something was left out."""
SPACE, NEWLINE, TAB = "\x05", "\x06", "\x07"
"""White space of text that stays as written."""
BAR_LINE = "\x08"
"""Begins a line whose bar or exclamation mark may be a table's."""
BREAK = "\x0e"
"""A new line within a line of wikitext."""
OPEN_TEMPLATE = "\x0f"
"""Where a template begins that has no end."""
OPEN_PICTURE = "\x11"
"""Where a link to a picture begins that has no end."""
EMPTY = "\x10"
"""Nothing, so that what follows it does not begin a line."""

STRIPPED = re.compile(f"{STRIP_START}(\\d+){STRIP_END}")
_ALL = re.compile("[\x00-\x08\x0b\x0c\x0e-\x1f]")
_KEEP_WHITE_SPACE = str.maketrans({" ": SPACE, "\n": NEWLINE, "\t": TAB, "\u00a0": SPACE})
_RESTORE_WHITE_SPACE = str.maketrans({SPACE: " ", NEWLINE: "\n", TAB: "\t"})
_NUMBER = re.compile(r"&#(?:[xX]([0-9a-fA-F]+)|([0-9]+));")
_ENTITY = re.compile(r"&(?:#[xX]?[0-9a-fA-F]+|[a-zA-Z][a-zA-Z0-9]*);")


def without_marks(text: str) -> str:
    """Text free of marks, as an article is before it is read."""
    return _ALL.sub("", text)


def plain(rendered: str) -> str:
    """What a renderer gave, as one line of plain text: a name or a number."""
    return " ".join(_ALL.sub("", rendered.replace(GAP, " ").translate(_RESTORE_WHITE_SPACE)).split())


def as_written(text: str) -> str:
    """Text whose white space stays."""
    return text.translate(_KEEP_WHITE_SPACE)


def restored(text: str) -> str:
    """White space that stayed, as characters."""
    return text.translate(_RESTORE_WHITE_SPACE)


def unescaped(text: str) -> str:
    """Text with its entities as characters; one that names no character stays as written."""
    return _ENTITY.sub(lambda match: entity(match[0]), text) if "&" in text else text


def entity(written: str) -> str:
    """The character of an entity; itself where it names none (half of a surrogate pair, a control character)."""
    number = _NUMBER.fullmatch(written)
    if number is not None:
        code = int(number[1], 16) if number[1] else int(number[2])
        if not (code in (9, 10, 13) or 32 <= code < 0xD800 or 0xE000 <= code < 0xFFFE or 0x10000 <= code < 0x110000):
            return written
    return html.unescape(written)
