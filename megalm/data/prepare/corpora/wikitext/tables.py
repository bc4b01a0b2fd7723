"""Tables of wikitext, taken out line by line, as MediaWiki finds them: nothing open inside one gets out of it."""

from __future__ import annotations

import re
from collections.abc import Callable

_OPENS = re.compile(r"^[ \t:*#]*\{\|(?!\})|(?<=[=>|}])[ \t]*\{\|(?=[ \t]*(?:\n|\w+=|$))", re.MULTILINE)
_LINE = re.compile(r"[^\n]*\n?")
_OPENS_HERE = re.compile(r"[ \t:*#]*\{\|(?!\})")
_CLOSES_HERE = re.compile(r"[ \t]*\|\}(?!\})|[ \t]*\|\}\}\}")
_IN_TABLE = re.compile(r"[ \t]*[|!{}]")


def take_out_tables(wikitext: str, left_out: Callable[[str], str]) -> str:
    """A section without its tables; ``left_out`` is given each, and says what stands for it."""
    if "{|" not in wikitext:
        return wikitext
    kept: list[str] = []
    position = 0
    while (opening := _OPENS.search(wikitext, position)) is not None:
        start = opening.end() - 2
        kept.append(wikitext[position:start].rstrip(" \t:*#"))
        position = _end(wikitext, start)
        kept.append(left_out(wikitext[start:position]))
    kept.append(wikitext[position:])
    return "".join(kept)


def _end(wikitext: str, start: int) -> int:
    """Where a table ends; one without an end goes up to the first paragraph that is no part of a table."""
    depth = 0
    position = start
    unclosed = -1
    blank = False
    while position < len(wikitext):
        line = _LINE.match(wikitext, position)
        assert line is not None
        closes = _CLOSES_HERE.match(wikitext, position)
        if position == start or _OPENS_HERE.match(wikitext, position):
            depth += 1
        elif closes:
            depth -= 1
            if depth == 0:
                return wikitext.index("|}", position) + 2
        elif blank and line[0].strip() and not _IN_TABLE.match(line[0]) and unclosed < 0:
            unclosed = position
        blank = not line[0].strip()
        position = line.end()
    return unclosed if unclosed >= 0 else len(wikitext)
