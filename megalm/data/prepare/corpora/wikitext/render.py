"""The parser's tree ▶ text with marks; what is left out is counted."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass, field

import mwparserfromhell
from mwparserfromhell.nodes import Argument, ExternalLink, HTMLEntity, Node, Tag, Template, Text, Wikilink

from megalm.data.prepare.corpora.wikitext import marks
from megalm.data.prepare.corpora.wikitext.links import Kind, caption_of, kind_of
from megalm.data.prepare.corpora.wikitext.losses import REFERENCE, Losses
from megalm.data.prepare.corpora.wikitext.marks import BREAK, EMPTY, GAP
from megalm.data.prepare.corpora.wikitext.names import words
from megalm.data.prepare.corpora.wikitext.site import Site
from megalm.data.prepare.corpora.wikitext.strip import (
    FORMULAS,
    NEVER_SHOWN,
    OPEN_REFERENCE,
    REFERENCES,
    Stripped,
    strip,
)
from megalm.data.prepare.corpora.wikitext.tables import take_out_tables
from megalm.data.prepare.corpora.wikitext.templates import Call, render_template
from megalm.data.prepare.corpora.wikitext.text import TextNodes

_CODE = frozenset({"code", "tt", "kbd", "samp", "var"})
_BLOCKS = words("p div center blockquote li dt dd ul ol dl h1 h2 h3 h4 h5 h6 section article caption figure hr br")
_LEFT_OUT = frozenset({"table", "ref", "gallery", "math", "style", "script"})
_SUPERSCRIPTS = str.maketrans("0123456789+-−()n", "⁰¹²³⁴⁵⁶⁷⁸⁹⁺⁻⁻⁽⁾ⁿ")
_SUPERSCRIPT = re.compile(r"[+\-−]?[0-9]+[+\-−]?|[+\-−]|n")
_HIDDEN = re.compile(r"display\s*:\s*none", re.IGNORECASE)
_VARIANTS = re.compile(r"-\{(?!\{)([^{}\n]*(?:\{\{[^{}]*\}\}[^{}\n]*)*)\}-")
_VARIANT = re.compile(
    r"\s*(?:[\w -]*=>)?\s*((?:zh|sr|kk|ku|uz|tg|iu|crh|gan|shi|ban|sh|mni|wuu|tly)(?:-[a-z]+)*)\s*:", re.IGNORECASE
)
_VARIANT_LANGUAGES = words("zh sr kk ku uz tg iu crh gan shi ban sh mni wuu tly")
_HIDDEN_RULES = frozenset("HTND-")


@dataclass
class Renderer:
    """Renders one article.

    Attributes:
        site: the wiki that it is from.
        title: its name.
        losses: what is left out, so far.
        stripped: tags that were taken out before parsing.
    """

    site: Site
    title: str
    losses: Losses = field(default_factory=Losses)
    stripped: list[Stripped] = field(default_factory=list)

    def __post_init__(self) -> None:
        self._texts = TextNodes(self._stripped_tag, self.losses, self.site)

    def source(self, wikitext: str) -> str:
        """Wikitext without comments and the tags of :mod:`strip`."""
        return strip(marks.without_marks(wikitext), self.stripped)

    def fragment(self, wikitext: str, *, begins_line: bool = True) -> str:
        """Text of a part of an article, of :meth:`source`.

        Raises:
            mwparserfromhell.parser.ParserError: the parser gave up on it.
        """
        wikitext = take_out_tables(wikitext, self._table)
        if "-{" in wikitext:
            wikitext = _VARIANTS.sub(self._variant, wikitext)
        code = mwparserfromhell.parse(wikitext if begins_line else EMPTY + wikitext, skip_style_tags=True)
        return self.nodes(code.nodes, top=True)

    def nodes(self, nodes: Iterable[Node], *, top: bool = False, code: bool = False) -> str:
        """Text of some nodes; ``top``: not within a template; ``code``: within a tag of code."""
        parts: list[str] = []
        for node in nodes:
            if isinstance(node, Text):
                parts.append(self._texts.render(node.value, top=top, begins_line=not parts, code=code))
            elif isinstance(node, Tag):
                if node.wiki_markup is None:
                    parts.append(self._tag(node, top=top, code=code))
                else:
                    self._wiki_mark(node, parts)
            else:
                parts.append(self._node(node))
        return "".join(parts)

    def leave_out(self, kind: str, wikitext: str, *, reference: bool = False) -> str:
        """Count something; the mark of its place."""
        self.losses.add(kind, wikitext, reference=reference)
        for number in marks.STRIPPED.findall(wikitext):
            self._stripped_tag(int(number))  # what is left out within it
        return GAP

    def _node(self, node: Node) -> str:  # noqa: PLR0911 - one line per kind
        if isinstance(node, Wikilink):
            return self._link(node)
        if isinstance(node, Template):
            return render_template(Call(node, self))
        if isinstance(node, ExternalLink):
            if not node.brackets:
                return str(node.url)
            return self.nodes(node.title.nodes) if node.title is not None and str(node.title).strip() else GAP
        if isinstance(node, HTMLEntity):
            return marks.entity(str(node))
        if isinstance(node, Argument):
            return GAP if node.default is None else self.nodes(node.default.nodes)
        title = getattr(node, "title", None)  # a heading within a line, which is text; a comment has no title
        return "" if title is None else self.nodes(title.nodes)

    def _wiki_mark(self, node: Tag, parts: list[str]) -> None:
        """Marks of lists, which show no character but the colon between a term and what it means, and of lines."""
        markup = str(node.wiki_markup)
        if markup.startswith("----"):
            parts.append(BREAK)
        elif markup == ":" and parts and parts[-1] and not parts[-1].endswith("\n"):
            parts[-1] = parts[-1].rstrip(" ")
            parts.append(": ")
        elif node.contents is not None and not node.self_closing:
            parts.append(self.leave_out("table", str(node)))

    def _link(self, node: Wikilink) -> str:
        target = marks.plain(str(node.title))
        kind = kind_of(target, self.site)
        if kind is Kind.FILE:
            return self._picture("" if node.text is None else str(node.text))
        if kind is Kind.NOTHING or (kind is Kind.MEDIA and node.text is None):
            return GAP
        shown = node.title if node.text is None or not str(node.text).strip() else node.text
        return self.nodes(shown.nodes).removeprefix(":")

    def _picture(self, options: str) -> str:
        caption = caption_of(options)
        return self.leave_out("caption of a picture", caption) if caption else GAP

    def _tag(self, node: Tag, *, top: bool, code: bool) -> str:
        name = str(node.tag).strip().lower()
        contents = node.contents
        if name in ("br", "hr"):
            return BREAK
        if name in _LEFT_OUT:
            reference = name == "ref"
            kind = REFERENCE if reference else "table" if name == "table" else f"tag: {name}"
            return self.leave_out(kind, "" if contents is None else str(contents), reference=reference)
        if contents is None or name in NEVER_SHOWN:
            return ""
        if node.attributes and any(_HIDDEN.search(str(attribute)) for attribute in node.attributes):
            return self.leave_out("hidden text", str(contents))
        text = self.nodes(contents.nodes, top=top, code=code or name in _CODE)
        if name == "sup":
            return superscript(text)
        return f"{BREAK}{text}{BREAK}" if name in _BLOCKS else text

    def _table(self, wikitext: str) -> str:
        return self._leave_out_source("table", wikitext)

    def _leave_out_source(self, kind: str, wikitext: str) -> str:
        self.leave_out(kind, wikitext)
        self.stripped.append(Stripped("", "", ""))
        return f"{marks.STRIP_START}{len(self.stripped) - 1}{marks.STRIP_END}"

    def _variant(self, match: re.Match[str]) -> str:
        """Text in a language with several scripts, ``-{zh-hans:…;zh-hant:…}-``: the first; a rule shows nothing."""
        flags, bar, rest = match[1].rpartition("|")
        rules = [rule for rule in rest.split(";") if rule.strip()]
        if rules and _VARIANT.match(rules[0]):
            text = rules[0].split(":", 1)[1].strip()
        elif self.site.language.lower().split("-")[0] in _VARIANT_LANGUAGES:
            text = rest
        else:
            return match[0]
        return "" if bar and _HIDDEN_RULES & set(flags.strip().upper()) else text

    def _stripped_tag(self, number: int) -> str:  # noqa: PLR0911 - one line per kind
        if number >= len(self.stripped):
            return ""
        tag = self.stripped[number]
        name = tag.name
        if name == OPEN_REFERENCE:
            return self.leave_out(REFERENCE, "", reference=True) + " "
        if name in REFERENCES:
            return self.leave_out(REFERENCE, tag.content, reference=True) if tag.content or name == "ref" else GAP
        if name in ("", *NEVER_SHOWN):
            return GAP
        if name == "nowiki":
            return marks.unescaped(tag.content)
        if name in FORMULAS:
            return marks.as_written(marks.unescaped(" ".join(tag.content.split())))
        if name in ("pre", "syntaxhighlight", "source"):
            return _listing(tag)
        if name == "poem":
            return f"{BREAK}{self.fragment(strip(tag.content, self.stripped))}{BREAK}"
        if name == "gallery":
            return self.leave_out("caption of a picture", "\n".join(re.findall(r"\|(.*)", tag.content)))
        return self.leave_out(f"tag: {name}", tag.content)


def superscript(text: str) -> str:
    """A power or a charge as superscript characters, so that 10⁶ does not become 106; other text as it is."""
    inner = text.strip()
    return inner.translate(_SUPERSCRIPTS) if _SUPERSCRIPT.fullmatch(inner) else text


def _listing(tag: Stripped) -> str:
    text = tag.content
    if tag.name == "pre":
        text = marks.unescaped(re.sub(r"</?nowiki\s*/?>", "", text, flags=re.IGNORECASE))
    if re.search(r"\binline\b", tag.attributes):
        return marks.as_written(text)
    return f"{BREAK}{marks.as_written(text.strip(chr(10)))}{BREAK}"
