"""A template as an article calls it."""

from __future__ import annotations

from collections.abc import Iterable
from functools import cached_property
from typing import Protocol

from mwparserfromhell.nodes import Node, Template
from mwparserfromhell.wikicode import Wikicode

from megalm.data.prepare.corpora.wikitext.marks import plain
from megalm.data.prepare.corpora.wikitext.site import Site, normalised


class ArticleRenderer(Protocol):
    """What a template needs of the renderer of its article.

    Attributes:
        site: the wiki.
        title: name of the article.
    """

    site: Site
    title: str

    def nodes(self, nodes: Iterable[Node]) -> str:
        """Rendered text of parsed markup."""

    def leave_out(self, kind: str, wikitext: str, *, reference: bool = False) -> str:
        """Count markup that is not rendered, and give what stands in its place."""


class Call:
    """Its name, and its arguments as rendered text.

    Args:
        node: as parsed.
        renderer: of the article.
    """

    def __init__(self, node: Template, renderer: ArticleRenderer) -> None:
        self._node = node
        self._renderer = renderer
        self._rendered: dict[str, str] = {}

    @cached_property
    def written_name(self) -> str:
        """The name as written, without its namespace."""
        name = plain(str(self._node.name))
        prefix, colon, rest = name.partition(":")
        if colon and normalised(prefix) in ("subst", "safesubst"):
            name = rest.strip()
            prefix, colon, rest = name.partition(":")
        return rest.strip() if colon and normalised(prefix) in self.site.templates else name

    @cached_property
    def name(self) -> str:
        """The name as names are compared."""
        return normalised(self.written_name)

    def function(self) -> tuple[str, str]:
        """The name as one of a function, in lower case, and its first argument as rendered text."""
        name = str(self._node.name).lstrip()
        before, colon, _ = name.partition(":")
        if not colon or "{" in before or "[" in before:
            return self.written_name.lower(), ""
        rendered = self._renderer.nodes(self._node.name.nodes)
        return before.strip().lower(), rendered.partition(":")[2].strip(" \n")

    @property
    def site(self) -> Site:
        """The wiki."""
        return self._renderer.site

    @property
    def language(self) -> str:
        """Code of the wiki's language, without its variant; English where it is not known."""
        return self.site.language.lower().split("-")[0] or "en"

    @property
    def title(self) -> str:
        """Name of the article."""
        return self._renderer.title

    @cached_property
    def _arguments(self) -> dict[str, Wikicode]:
        return {str(parameter.name).strip(): parameter.value for parameter in self._node.params}

    def has(self, *keys: str) -> bool:
        """Whether one of these arguments is given and not blank."""
        return any(key in self._arguments and str(self._arguments[key]).strip() for key in keys)

    def text(self, *keys: str, otherwise: str = "") -> str:
        """Rendered text of the first of these arguments that is given and not blank, without spaces around it."""
        key = next((key for key in keys if self.has(key)), None)
        return otherwise if key is None else self._text(key)

    def value(self, *keys: str, otherwise: str = "") -> str:
        """The same as one line of plain text: a number, a name, a choice."""
        return plain(self.text(*keys)) or otherwise

    def only_argument(self) -> str | None:
        """Rendered text of the one argument, which has a name because it holds an equals sign: ``{{nowrap|a = b}}``."""
        if len(self._node.params) != 1 or not self._node.params[0].showkey:
            return None
        name, value = self._node.params[0].name, self._node.params[0].value
        return f"{self._renderer.nodes(name.nodes)}={self._renderer.nodes(value.nodes)}".strip(" \n")

    def positional(self) -> list[str]:
        """Rendered text of the arguments 1, 2, 3 …, up to the first that is not given."""
        found: list[str] = []
        while str(len(found) + 1) in self._arguments:
            found.append(self._text(str(len(found) + 1)))
        return found

    def values(self) -> list[str]:
        """The same as plain text."""
        return [plain(text) for text in self.positional()]

    def _text(self, key: str) -> str:
        """Rendered once: what is left out of it is counted once."""
        if key not in self._rendered:
            self._rendered[key] = self._renderer.nodes(self._arguments[key].nodes).strip(" \n")
        return self._rendered[key]

    def raw(self) -> list[tuple[str, str, bool]]:
        """Arguments as written: (name, value, whether the name is written too)."""
        return [(str(p.name).strip(), str(p.value), bool(p.showkey)) for p in self._node.params]

    def leave_out(self, kind: str, *, reference: bool = False) -> str:
        """Count the template, under a name, as left out."""
        words = "\n".join(str(parameter.value) for parameter in self._node.params)
        return self._renderer.leave_out(kind, words, reference=reference)
