"""Text as the parser leaves it: it may still hold marks of bold, tags without a partner and brackets without an end."""

from __future__ import annotations

import re
from collections.abc import Callable

from megalm.data.prepare.corpora.wikitext.links import Kind, kind_of
from megalm.data.prepare.corpora.wikitext.losses import REFERENCE, Losses
from megalm.data.prepare.corpora.wikitext.marks import (
    BAR_LINE,
    BREAK,
    GAP,
    OPEN_PICTURE,
    OPEN_TEMPLATE,
    QUOTE,
    QUOTE_END,
    STRIPPED,
)
from megalm.data.prepare.corpora.wikitext.names import SWITCHES, words
from megalm.data.prepare.corpora.wikitext.quotes import without_quotes_in_code
from megalm.data.prepare.corpora.wikitext.site import Site

_TAGS = words(
    """
    abbr b bdi bdo big blockquote br caption center cite code dd del dfn div dl dt em font gallery h1 h2 h3 h4
    h5 h6 hr i
    imagemap includeonly ins kbd li mark math noinclude nowiki ol onlyinclude p poem pre q ref references rp rt
    ruby s samp
    score section small source span strike strong sub sup syntaxhighlight table tbody td th thead timeline tr tt
    u ul var
    wbr
    """
)
_NEW_LINE = words("br hr p div li dd dt ul ol dl blockquote center tr table h1 h2 h3 h4 h5 h6 poem")
_SPECIAL = re.compile(
    r"'{2,}|\x02\d+\x03|</?(" + "|".join(sorted(_TAGS, key=lambda tag: (-len(tag), tag))) + r")(?:\s[^<>\n]*)?\s*/?>"
    r"|\{\{+|\}\}+|\[\[+|\]\]+|__([^\W_][\w]*?[^\W_])__|\n[ \t]*[|!]|<!--|<ref\b",
    re.IGNORECASE,
)
_LINE_MARK = re.compile(r"[ \t]*[|!]")


class TextNodes:
    """Renders them.

    Args:
        stripped_tag: what stands for a tag that was taken out before parsing, by its number.
        losses: where references without an end are counted.
        site: the wiki.
    """

    def __init__(self, stripped_tag: Callable[[int], str], losses: Losses, site: Site) -> None:
        self._stripped_tag = stripped_tag
        self._site = site
        self._losses = losses

    def render(self, text: str, *, top: bool, begins_line: bool, code: bool) -> str:
        """Text with marks.

        Args:
            text: of a node.
            top: whether it is outside of templates, whose lines may begin with bars.
            begins_line: whether it begins a part of an article.
            code: whether it is code, in which brackets and apostrophes are text.
        """
        if code:
            return STRIPPED.sub(lambda match: self._stripped_tag(int(match[1])), without_quotes_in_code(text))
        text = _SPECIAL.sub(self._replaced, text)
        if top and begins_line and _LINE_MARK.match(text):
            text = BAR_LINE + text.lstrip(" \t")
        return text if top else text.replace("\n" + BAR_LINE, "\n")

    def _replaced(self, match: re.Match[str]) -> str:  # noqa: PLR0911 - one line per kind
        found = match[0]
        first = found[0]
        if first == "'":
            return QUOTE * len(found) + QUOTE_END
        if first == "\x02":
            return self._stripped_tag(int(found[1:-1]))
        if first == "\n":
            return f"\n{BAR_LINE}{found[-1]}"
        if first == "<":
            return self._tag(match)
        if first == "{":
            return OPEN_TEMPLATE
        if first == "[":
            return (
                OPEN_PICTURE if kind_of(found[2:] + match.string[match.end() :][:40], self._site) is Kind.FILE else ""
            )
        if first == "_":
            return GAP if match[2].upper() in SWITCHES and match[2] == match[2].upper() else found
        return ""

    def _tag(self, match: re.Match[str]) -> str:
        name = (match[1] or "").lower()
        if name == "ref" or not name:
            if match[0].lower().startswith("<ref"):
                self._losses.add_words(REFERENCE, 0)
            return f"{GAP} " if name else ""
        return BREAK if name in _NEW_LINE else ""
