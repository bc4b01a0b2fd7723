"""Wikitext ▶ prose: what a reader of the article would read, without markup, tables, references and pictures."""

from __future__ import annotations

import re
from collections.abc import Iterable

import mwparserfromhell
from mwparserfromhell.nodes import (
    Argument,
    Comment,
    ExternalLink,
    Heading,
    HTMLEntity,
    Node,
    Tag,
    Template,
    Text,
    Wikilink,
)

_NOT_PROSE = frozenset(
    {
        "ref",
        "references",
        "gallery",
        "math",
        "chem",
        "ce",
        "table",
        "timeline",
        "score",
        "syntaxhighlight",
        "source",
        "style",
        "script",
        "imagemap",
        "hiero",
        "graph",
        "mapframe",
        "maplink",
        "templatedata",
        "templatestyles",
        "inputbox",
        "categorytree",
        "indicator",
        "noinclude",
        "includeonly",
    }
)
"""Tags that go with all they hold."""
_LINE_TAGS = frozenset({"br", "hr"})
_MEDIA = frozenset({"file", "image", "category", "media"})
"""Namespaces whose links show no text, in English; others are told by :data:`_NAMESPACE`."""
_INTERWIKI = re.compile(r"^[a-z]{2,3}(-[a-z]+)*$")
"""A link to another language's article."""
_HEADING = "\x00"
"""Marks a line as a heading, with its level, until it is known whether anything follows it."""

_REFERENCE = re.compile(r"<ref\b[^<>]*/>|<ref\b[^<>]*>.*?</ref\s*>", re.IGNORECASE | re.DOTALL)
_LEFT_OVER = re.compile(
    r"</?\s*(?:ref|references|small|big|div|span|center|font|nowiki|blockquote|sup|sub|gallery|table|tr|td|th|br|p)\b[^<>]*>"
    r"|<ref\b|\{\{+|\}\}+|\[\[+|\]\]+|__[A-Z]{3,}__|'''''|'''|''",
    re.IGNORECASE,
)
_TABLE_LINE = re.compile(r"^\s*(?:\{\||\|\}|\|-|\||!).*$", re.MULTILINE)
_LIST_MARK = re.compile(r"^ ?[*#:;]+ ?", re.MULTILINE)
_EMPTY_BRACKETS = re.compile(r"\(\s*(?:[,;:–-]\s*)*\)|\[\s*\]")
_BRACKET_START = re.compile(r"\(\s*(?:[,;:]\s*)+")
_BRACKET_END = re.compile(r"(?:\s*[,;:])+\s*\)")
_SPACES = re.compile(r"[ \t\u00a0]+")
_SPACE_BEFORE = re.compile(r" +([,.;:)\]])")
_SPACE_AFTER = re.compile(r"([(\[]) +")
_BROKEN_PICTURE = re.compile(r"\b(?:File|Image):[^\n|]*\|[^\n]*", re.IGNORECASE)
_BLANK_LINES = re.compile(r"\n{3,}")


class UnreadableWikitext(ValueError):  # noqa: N818 - it is the text's condition, which the caller reports
    """The parser gave up."""


def to_prose(wikitext: str) -> str:
    """The text of an article; headings without anything below them are left out.

    Raises:
        UnreadableWikitext: the parser gave up on it.
    """
    try:
        code = mwparserfromhell.parse(wikitext, skip_style_tags=False)
    except mwparserfromhell.parser.ParserError as error:
        raise UnreadableWikitext(str(error)) from None
    return _tidy(_render(code.nodes))


def _render(nodes: Iterable[Node]) -> str:
    return "".join(_render_node(node) for node in nodes)


def _render_node(node: Node) -> str:  # noqa: PLR0911 - one line per kind
    if isinstance(node, Text):
        return str(node.value)
    if isinstance(node, Wikilink):
        return _link(node)
    if isinstance(node, Tag):
        return _tag(node)
    if isinstance(node, ExternalLink):
        if not node.brackets:
            return str(node.url)
        return _render(node.title.nodes) if node.title is not None else ""
    if isinstance(node, Heading):
        title = " ".join(_render(node.title.nodes).split())
        return f"\n{_HEADING}{node.level}{title}\n"
    if isinstance(node, HTMLEntity):
        return str(node.normalize())
    assert isinstance(node, Template | Argument | Comment), f"a new kind of node: {type(node)}"
    return ""


def _link(node: Wikilink) -> str:
    target = str(node.title).strip()
    space, colon, _ = target.partition(":")
    if colon and space and (space.strip().lower() in _MEDIA or _INTERWIKI.match(space.strip())):
        return ""
    shown = node.title if node.text is None else node.text
    return _render(shown.nodes).removeprefix(":")


def _tag(node: Tag) -> str:
    name = str(node.tag).strip().lower()
    if name in _NOT_PROSE:
        return ""
    if name in _LINE_TAGS:
        return "\n"
    if node.wiki_markup is not None and node.self_closing:
        return ""  # a list mark
    return "" if node.contents is None else _render(node.contents.nodes)


def _tidy(text: str) -> str:
    """Remove what broken markup has left, and the traces of what was taken out."""
    text = _REFERENCE.sub("", text)
    text = _TABLE_LINE.sub("", text)
    text = _BROKEN_PICTURE.sub("", text)
    text = _LEFT_OVER.sub("", text)
    text = _SPACES.sub(" ", text)
    text = _LIST_MARK.sub("", text)
    text = _EMPTY_BRACKETS.sub("", text)
    text = _BRACKET_START.sub("(", text)
    text = _BRACKET_END.sub(")", text)
    text = _EMPTY_BRACKETS.sub("", text)
    text = _SPACES.sub(" ", text)
    text = _SPACE_BEFORE.sub(r"\1", text)
    text = _SPACE_AFTER.sub(r"\1", text)
    lines = _without_empty_sections([line.strip(" ") for line in text.split("\n")])
    return _BLANK_LINES.sub("\n\n", "\n".join(lines)).strip()


def _without_empty_sections(lines: list[str]) -> list[str]:
    """Headings with something below them, unmarked, and all other lines."""
    kept: list[str] = []
    needed = 0  # a heading stays if its level is below this: if text, or a deeper heading that stays, follows it
    for line in reversed(lines):
        if not line.startswith(_HEADING):
            if any(map(str.isalnum, line)):
                needed = 7
                kept.append(line)
            elif not line:
                kept.append(line)
            continue
        level, title = int(line[1]), line[2:].strip()
        if title and needed > level:
            kept += ["", title, ""]
            needed = level
    return kept[::-1]
