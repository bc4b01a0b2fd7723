"""An article ▶ prose: section by section, so that what is left open in one never reaches the next."""

from __future__ import annotations

import re

from mwparserfromhell.parser import ParserError

from megalm.data.document import LeftOut
from megalm.data.prepare.corpora.wikitext.marks import HEADING
from megalm.data.prepare.corpora.wikitext.render import Renderer
from megalm.data.prepare.corpora.wikitext.site import Site
from megalm.data.prepare.corpora.wikitext.tidy import tidy

_HEADING_LINE = re.compile(r"^(={1,6})([^\n]+?)(={1,6})[ \t]*$", re.MULTILINE)
_PARAGRAPH_END = re.compile(r"\n[ \t]*\n")
UNREADABLE = "unreadable wikitext"


def render_article(wikitext: str, site: Site, title: str = "") -> tuple[str, LeftOut]:
    """Its text, without headings that nothing follows, and what was left out of it."""
    renderer = Renderer(site, title)
    source = renderer.source(wikitext)
    parts: list[str] = []
    position = 0
    for heading in _HEADING_LINE.finditer(source):
        parts.append(_section(renderer, source[position : heading.start()]))
        level = min(len(heading[1]), len(heading[3]))
        surplus = "=" * (len(heading[1]) - level), "=" * (len(heading[3]) - level)
        text = _part(renderer, surplus[0] + heading[2].strip() + surplus[1], begins_line=False)
        parts.append(f"\n{HEADING}{level}{' '.join(text.split())}\n")
        position = heading.end()
    parts.append(_section(renderer, source[position:]))

    def fragment(left: str) -> None:
        renderer.losses.add("part of a table or template", left)

    prose = tidy("".join(parts), fragment)
    return prose, renderer.losses.left_out(prose)


def _section(renderer: Renderer, wikitext: str) -> str:
    """A section; if the parser gives up on it, paragraph by paragraph."""
    try:
        return renderer.fragment(wikitext)
    except ParserError:
        return "\n\n".join(_part(renderer, paragraph) for paragraph in _PARAGRAPH_END.split(wikitext))


def _part(renderer: Renderer, wikitext: str, *, begins_line: bool = True) -> str:
    """A part that is counted as left out if the parser gives up on it."""
    try:
        return renderer.fragment(wikitext, begins_line=begins_line)
    except ParserError:
        return renderer.leave_out(UNREADABLE, wikitext)
