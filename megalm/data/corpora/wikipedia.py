"""Wikipedia: a ``pages-articles`` dump, streamed. One article is one document: its title, then its text."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from xml.etree.ElementTree import Element, ParseError

from defusedxml import DefusedXmlException
from defusedxml.ElementTree import iterparse

from megalm.data.corpora.options import CorpusOptions
from megalm.data.corpora.streams import Files, find_files, open_stream, size_of
from megalm.data.corpora.wikitext import UnreadableWikitext, to_prose
from megalm.data.document import Corpus, Document, Rejected
from megalm.errors import DataError

_ARTICLES = "0"
"""The namespace of articles; others are talk, users, templates and so on."""


@dataclass(frozen=True)
class Page:
    """A page of a dump.

    Attributes:
        title: its name.
        namespace: number of its namespace, as text.
        is_redirect: whether it only leads to another.
        wikitext: what its authors wrote.
    """

    title: str
    namespace: str
    is_redirect: bool
    wikitext: str


@dataclass(frozen=True)
class Pages:
    """Some pages.

    Attributes:
        pages: in the order of the dump.
        bytes: what they took on disk.
    """

    pages: tuple[Page, ...]
    bytes: int

    def documents(self) -> Iterator[Document | Rejected]:
        """Articles as prose; most of the work of preparing Wikipedia."""
        for page in self.pages:
            yield _document(page)


@dataclass(frozen=True)
class WikipediaCorpus(Files):
    """Dumps."""

    def blocks(self, block_bytes: int) -> Iterator[Pages]:
        """Pages as they come, of about ``block_bytes`` of wikitext."""
        for path in self.files:
            pages: list[Page] = []
            size = consumed = 0
            for page, position in _pages(path):
                pages.append(page)
                size += len(page.wikitext)
                if size >= block_bytes:
                    yield Pages(tuple(pages), position - consumed)
                    pages, size, consumed = [], 0, position
            yield Pages(tuple(pages), size_of(path) - consumed)


def wikipedia_corpus(options: CorpusOptions) -> Corpus:
    """Dumps (``.xml``, also ``.bz2``, ``.gz`` or ``.zst``), and all dumps below folders.

    Raises:
        DataError: no input, or one that does not exist or holds no dump.
    """
    options.check("wikipedia", "inputs")
    return WikipediaCorpus(", ".join(options.inputs), find_files(options.inputs, (".xml",)))


def _pages(path: Path) -> Iterator[tuple[Page, int]]:
    """Pages of a dump, and the bytes of the file that were read so far; memory holds one page."""
    found = False
    with open_stream(path) as stream:
        try:
            events = iterparse(stream.content, events=("start", "end"))
            _, root = next(events)
            for event, element in events:
                if event == "end" and _name(element) == "page":
                    found = True
                    yield _page(element), stream.consumed
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
    )


def _name(element: Element) -> str:
    """Its tag, without the namespace, which every version of the export format changes."""
    return str(element.tag).rpartition("}")[2]


def _document(page: Page) -> Document | Rejected:
    if page.namespace != _ARTICLES:
        return Rejected(page.title, "not an article")
    if page.is_redirect or page.wikitext.lstrip()[:9].upper() == "#REDIRECT":
        return Rejected(page.title, "redirect")
    try:
        prose = to_prose(page.wikitext)
    except UnreadableWikitext:
        return Rejected(page.title, "unreadable wikitext")
    if not prose:
        return Rejected(page.title, "empty")
    return Document.plain(page.title, f"{page.title}\n\n{prose}\n")
