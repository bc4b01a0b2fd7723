"""Where a link leads: to a picture, a category, another language or an article."""

from __future__ import annotations

import re
from enum import Enum

from megalm.data.prepare.corpora.wikitext.names import LANGUAGES, MEDIA_OPTIONS
from megalm.data.prepare.corpora.wikitext.site import Site, normalised

_OPTION = re.compile(
    r"(?:x?\d+|\d+x\d+)\s*(?:px|пкс|п|τχ|ピクセル|픽셀|像素|بك|פיקסלים|pks)?"
    r"|[^\W\d_]+\s*[=]?\s*[\d.,]+|[^\W\d_]+(?:[ -][^\W\d_]+)?\s*=.*",
    re.DOTALL,
)
"""A size, or a name with a value: ``200px``, ``upright=1.2``, ``alt=…``."""
_LINK_TARGET = re.compile(r"\[\[[^\[\]|]*\||\[\[|\]\]")


class Kind(Enum):
    """What a link shows."""

    TEXT = "its text"
    FILE = "a picture or a sound"
    MEDIA = "a link to a file"
    NOTHING = "nothing in its place"


def kind_of(target: str, site: Site) -> Kind:
    """What a link to ``target`` shows."""
    prefix, colon, _ = target.partition(":")
    if not colon or not prefix.strip():
        return Kind.TEXT
    prefix = normalised(prefix)
    if prefix in site.files:
        return Kind.FILE
    if prefix in site.media:
        return Kind.MEDIA
    return Kind.NOTHING if prefix in site.categories or prefix in LANGUAGES else Kind.TEXT


def caption_of(options: str) -> str:
    """The caption among what follows a picture's name: the last part that is no option; empty: there is none."""
    parts, depth, start = [], 0, 0
    for match in re.finditer(r"\[\[|\{\{|\]\]|\}\}|\|", options):
        if match[0] in ("[[", "{{"):
            depth += 1
        elif match[0] != "|":
            depth -= 1
        elif depth <= 0:
            parts.append(options[start : match.start()])
            start = match.end()
    parts.append(options[start:])
    return next((part.strip() for part in reversed(parts) if not _is_option(part)), "")


def _is_option(part: str) -> bool:
    name = normalised(part)
    return not name or name in MEDIA_OPTIONS or (len(part) < 400 and bool(_OPTION.fullmatch(part.strip())))
