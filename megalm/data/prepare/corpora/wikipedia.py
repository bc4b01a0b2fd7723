"""Wikipedia: a ``pages-articles`` dump, streamed. One article is one document: its title, then its text."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from xml.etree.ElementTree import Element, ParseError

from defusedxml import DefusedXmlException
from defusedxml.ElementTree import iterparse

from megalm.data.document import Corpus, Document, Rejected
from megalm.data.prepare.corpora.options import CorpusOptions
from megalm.data.prepare.corpora.streams import Files, files_fingerprint, find_files, open_stream, size_of
from megalm.data.prepare.corpora.wikitext import Site, is_redirect, render_article
from megalm.errors import DataError

_ARTICLES = "0"
"""The namespace of articles; others are talk, users, templates and so on."""
_RENDERING = "wikitext 2"
"""Changes whenever the same dump gives other text, so that datasets and unfinished ones do not pass for each other."""
_WIKITEXT = "wikitext"
_LANGUAGE = "{http://www.w3.org/XML/1998/namespace}lang"


@dataclass(frozen=True)
class Page:
    """A page of a dump.

    Attributes:
        title: its name.
        namespace: number of its namespace, as text.
        is_redirect: whether it only leads to another.
        wikitext: what its authors wrote.
        model: what kind of content it is; articles are ``wikitext``.
    """

    title: str
    namespace: str
    is_redirect: bool
    wikitext: str
    model: str = _WIKITEXT


@dataclass(frozen=True)
class Pages:
    """Some pages.

    Attributes:
        pages: in the order of the dump.
        bytes: what they took on disk.
        site: the wiki that they are from.
    """

    pages: tuple[Page, ...]
    bytes: int
    site: Site

    def documents(self) -> Iterator[Document | Rejected]:
        """Articles as prose; most of the work of preparing Wikipedia."""
        for page in self.pages:
            yield _document(page, self.site)


@dataclass(frozen=True)
class WikipediaCorpus(Files):
    """Dumps."""

    def fingerprint(self) -> str:
        """Of the files, and of how wikitext is rendered."""
        return files_fingerprint(f"{self.source}\0{_RENDERING}", self.files)

    def blocks(self, block_bytes: int) -> Iterator[Pages]:
        """Pages as they come, of about ``block_bytes`` of wikitext."""
        for path in self.files:
            pages: list[Page] = []
            site = Site.of()
            size = consumed = 0
            for page, position, site in _pages(path):
                pages.append(page)
                size += len(page.wikitext)
                if size >= block_bytes:
                    yield Pages(tuple(pages), position - consumed, site)
                    pages, size, consumed = [], 0, position
            yield Pages(tuple(pages), size_of(path) - consumed, site)


def wikipedia_corpus(options: CorpusOptions) -> Corpus:
    """Dumps (``.xml``, also ``.bz2``, ``.gz`` or ``.zst``), and all dumps below folders.

    Raises:
        DataError: no input, or one that does not exist or holds no dump.
    """
    options.check("wikipedia", "inputs")
    return WikipediaCorpus(", ".join(options.inputs), find_files(options.inputs, (".xml",)))


def _pages(path: Path) -> Iterator[tuple[Page, int, Site]]:
    """Pages of a dump, the bytes of the file that were read so far, and the wiki; memory holds one page."""
    found = False
    with open_stream(path) as stream:
        try:
            events = iterparse(stream.content, events=("start", "end"))
            _, root = next(events)
            language = str(root.get(_LANGUAGE) or "")
            site = Site.of(language)
            for event, element in events:
                if event != "end":
                    continue
                if _name(element) == "siteinfo":
                    site = Site.of(language or _language_of(element), _namespaces(element))
                elif _name(element) == "page":
                    found = True
                    yield _page(element), stream.consumed, site
                    root.clear()
        except (ParseError, DefusedXmlException, StopIteration) as error:
            raise DataError(f"{path}: is no XML, or is damaged or cut short: {error}") from None
    if not found:
        raise DataError(f"{path}: has no <page>: not a pages-articles dump")


def _page(element: Element) -> Page:
    parts = {_name(child): child for child in element.iter()}
    text = parts["text"].text if "text" in parts else None
    return Page(
        title=(parts["title"].text or "") if "title" in parts else "",
        namespace=(parts["ns"].text or _ARTICLES) if "ns" in parts else _ARTICLES,
        is_redirect="redirect" in parts,
        wikitext=text or "",
        model=(parts["model"].text or _WIKITEXT) if "model" in parts else _WIKITEXT,
    )


def _namespaces(siteinfo: Element) -> Iterator[tuple[int, str]]:
    """Numbers and names of a wiki's namespaces, as its dump tells them."""
    for element in siteinfo.iter():
        if _name(element) == "namespace" and (element.get("key") or "").lstrip("-").isdigit():
            yield int(element.get("key") or 0), element.text or ""


def _language_of(siteinfo: Element) -> str:
    """Language of a wiki from the name of its database, such as ``dewiki``; empty where that does not tell."""
    name = next((element.text or "" for element in siteinfo.iter() if _name(element) == "dbname"), "")
    return name.removesuffix("wiki").replace("_", "-") if name.endswith("wiki") else ""


def _name(element: Element) -> str:
    """Its tag, without the namespace, which every version of the export format changes."""
    return str(element.tag).rpartition("}")[2]


def _document(page: Page, site: Site) -> Document | Rejected:
    if page.namespace != _ARTICLES:
        return Rejected(page.title, "not an article")
    if page.is_redirect or is_redirect(page.wikitext):
        return Rejected(page.title, "redirect")
    if page.model != _WIKITEXT:
        return Rejected(page.title, "not wikitext")
    prose, left_out = render_article(page.wikitext, site, page.title)
    if not prose:
        return Rejected(page.title, "empty", left_out)
    return replace(Document.plain(page.title, f"{page.title}\n\n{prose}\n"), left_out=left_out)
