"""Wikitext ▶ prose: what a reader of an article would read, without markup, tables, references and pictures.

``mwparserfromhell`` parses; the order of work is MediaWiki's own. Comments and tags with contents of their own kind
are taken out (``strip``), then tables, line by line (``tables``); each section is parsed, and its tree rendered
(``render``, ``text``, ``links``,
``templates``); marks of bold and italics are read line by line (``quotes``). What has been rendered
is text: nothing looks for markup in it again. Markup that is left out is counted by name (``losses``).
"""

from __future__ import annotations

from megalm.data.prepare.corpora.wikitext.article import render_article
from megalm.data.prepare.corpora.wikitext.site import Site, is_redirect

__all__ = ["Site", "is_redirect", "render_article", "to_prose"]


def to_prose(wikitext: str, site: Site | None = None, title: str = "") -> str:
    """The text of an article."""
    return render_article(wikitext, Site.of() if site is None else site, title)[0]
