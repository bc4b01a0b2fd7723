"""Removes the traces of what was left out: marks say where that was, so nothing else is touched."""

from __future__ import annotations

import re
from collections.abc import Callable

from megalm.data.prepare.corpora.wikitext.marks import (
    BAR_LINE,
    BREAK,
    EMPTY,
    GAP,
    HEADING,
    OPEN_PICTURE,
    OPEN_TEMPLATE,
    restored,
)
from megalm.data.prepare.corpora.wikitext.quotes import without_quotes

_SPACES = re.compile(r"[ \t\u00a0]+")
_GAPS = re.compile(rf"{GAP}(?: *{GAP})+")
_GAP_LINE = re.compile(rf"^[ ,;:.·•–—()\[\]/-]*{GAP}[ ,;:.·•–—()\[\]/{GAP}-]*(?:\n|\Z)", re.MULTILINE)
"""A line on which nothing but punctuation is left."""
_EMPTY_BRACKETS = re.compile(rf" ?\((?=[^()]*{GAP})[ ,;:–—-]*(?:{GAP}[ ,;:–—-]*)+\)| ?\[ *{GAP}[ {GAP}]*\]")
_BRACKET_START = re.compile(rf"([(\[])(?: *{GAP}[ ,;:]*)+")
_BRACKET_END = re.compile(rf"(?:(?<![ ,;:])[ ,;:]+)?(?:{GAP}[ ,;:]*)+([)\]])")
_GAP_BETWEEN_MARKS = re.compile(rf"[,;] *(?:{GAP} *)+([,;.])")
_TEMPLATE_NAME = re.compile(rf"{OPEN_TEMPLATE}[^\n|{OPEN_TEMPLATE}]{{0,60}}\||{OPEN_TEMPLATE}")
_PICTURE_OPTIONS = re.compile(rf"{OPEN_PICTURE}[^\n{OPEN_PICTURE}]*\||{OPEN_PICTURE}")
_GAP_BEFORE_MARK = re.compile(rf" *{GAP}+(?: +{GAP}+)* ?([.,)\]])")
_GAP_AT_START = re.compile(rf"^ *{GAP}[ {GAP}]*(?:[,;:](?=[ {GAP}])[ {GAP}]*)*", re.MULTILINE)
_GAP = re.compile(rf"( ?)(?:{GAP} *)+")
_BLANK_LINES = re.compile(r"\n{3,}")
_ROW_LINE = re.compile(rf"\|-+[ {GAP}]*(?:$|[\w-]+ *=)|\|\}}[ {GAP}]*$")
"""A line that begins a row of a table, or ends a table; not the absolute value of a number below 0."""


def tidy(text: str, fragment: Callable[[str], None]) -> str:
    """Rendered text without marks; ``fragment`` is given what is left of a table or a template that lacks an end."""
    text = without_quotes(text).replace(BREAK, "\n").replace(EMPTY, "")
    if BAR_LINE in text or OPEN_TEMPLATE in text:
        text = _without_fragments(text, fragment)
    if OPEN_PICTURE in text:
        text = _PICTURE_OPTIONS.sub(GAP, text)
    text = _SPACES.sub(" ", text)
    if GAP in text:
        text = _close_gaps(text)
    lines = _without_empty_sections([line.strip(" ") for line in text.split("\n")])
    return restored(_BLANK_LINES.sub("\n\n", "\n".join(lines)).strip())


def _close_gaps(text: str) -> str:
    text = _GAPS.sub(GAP, text)
    text = _GAP_LINE.sub("", text)
    text = _EMPTY_BRACKETS.sub("", text)
    text = _BRACKET_START.sub(r"\1", text)
    text = _BRACKET_END.sub(r"\1", text)
    text = _GAP_BETWEEN_MARKS.sub(r"\1", text)
    text = _GAP_BEFORE_MARK.sub(r"\1", text)
    text = _GAP_AT_START.sub("", text)
    return _GAP.sub(_closed, text)


def _closed(match: re.Match[str]) -> str:
    """One space where there was one before or after."""
    return " " if " " in match[0] else ""


def _without_fragments(text: str, fragment: Callable[[str], None]) -> str:
    """Text without rows of a table that a template began, and without arguments of a template that has no end.

    A line that begins with a bar or an exclamation mark is part of one only if it stands beside such marks.
    """
    kept: list[str] = []
    block: list[str] = []
    for line in [*text.split("\n"), ""]:
        if line.startswith(BAR_LINE):
            block.append(line[1:])
            continue
        if block:
            opening = kept[-1].rfind(OPEN_TEMPLATE) if kept else -1
            if opening >= 0:
                fragment("\n".join([kept[-1][opening + 1 :], *block]))
                kept[-1] = kept[-1][:opening] + GAP
            elif any(_ROW_LINE.match(row) for row in block):
                fragment("\n".join(block))
                kept.append(GAP)
            else:
                kept += block
            block = []
        kept.append(line)
    return _TEMPLATE_NAME.sub("", "\n".join(kept[:-1]))


def _without_empty_sections(lines: list[str]) -> list[str]:
    """Headings with something below them, unmarked, and all other lines."""
    kept: list[str] = []
    needed = 0  # a heading stays if its level is below this: if text, or a deeper heading that stays, follows it
    for line in reversed(lines):
        if not line.startswith(HEADING):
            if line:
                needed = 7
            kept.append(line)
            continue
        level, title = int(line[1]), line[2:].strip()
        if title and needed > level:
            kept += ["", title, ""]
            needed = level
    return kept[::-1]
