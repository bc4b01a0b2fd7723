"""Wikipedia: a dump is streamed, and what is left of an article reads as prose."""

from __future__ import annotations

import bz2
import re
from collections import Counter
from contextlib import suppress
from pathlib import Path

import mwparserfromhell
import pytest

from megalm.data.document import Document, Rejected
from megalm.data.prepare.corpora import CORPORA, CorpusOptions
from megalm.data.prepare.corpora.wikitext import Site, to_prose
from megalm.errors import DataError

EXCERPT = Path(__file__).resolve().parents[6] / "shared" / "data" / "wikipedia" / "enwiki-excerpt.xml.bz2"
DUMP = """<mediawiki xmlns="http://www.mediawiki.org/xml/export-0.11/" version="0.11"><siteinfo/>
<page><title>Cat</title><ns>0</ns><revision><text>A '''cat''' is an [[animal]].</text></revision></page>
<page><title>Cats</title><ns>0</ns><redirect title="Cat"/><revision><text>#REDIRECT [[Cat]]</text></revision></page>
<page><title>Kitty</title><ns>0</ns><revision><text>#redirect [[Cat]]</text></revision></page>
<page><title>Talk:Cat</title><ns>1</ns><revision><text>I like cats</text></revision></page>
<page><title>Nothing</title><ns>0</ns><revision><text>{{stub}}</text></revision></page>
<page><title>Dog &amp; bone</title><ns>0</ns>
<revision><text>A dog &lt;ref&gt;a book&lt;/ref&gt;barks.</text></revision></page>
</mediawiki>"""


def read(path: Path, block_bytes: int = 10**6) -> list[Document | Rejected]:
    corpus = CORPORA["wikipedia"](CorpusOptions((str(path),)))
    blocks = list(corpus.blocks(block_bytes))
    assert sum(block.bytes for block in blocks) == corpus.total_bytes
    return [document for block in blocks for document in block.documents()]


@pytest.mark.parametrize("block_bytes", [1, 40, 10**6])
def test_articles_keep_their_title_and_the_rest_is_counted(tmp_path: Path, block_bytes: int) -> None:
    path = tmp_path / "dump.xml.bz2"
    path.write_bytes(bz2.compress(DUMP.encode()))
    found = read(path, block_bytes)
    assert [d.text for d in found if isinstance(d, Document)] == [
        "Cat\n\nA cat is an animal.\n",
        "Dog & bone\n\nA dog barks.\n",
    ]
    assert [(d.name, d.rule) for d in found if isinstance(d, Rejected)] == [
        ("Cats", "redirect"),
        ("Kitty", "redirect"),
        ("Talk:Cat", "not an article"),
        ("Nothing", "empty"),
    ]


ENTITY_BOMB = '<!DOCTYPE x [<!ENTITY a "aaaa"><!ENTITY b "&a;&a;">]><mediawiki><page>&b;</page></mediawiki>'


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (DUMP[:400], "is no XML, or is damaged or cut short"),
        ("", "is no XML, or is damaged or cut short"),
        ("<html></html>", "has no <page>: not a pages-articles dump"),
        (ENTITY_BOMB, "is no XML, or is damaged"),
    ],
)
def test_what_is_no_dump_is_refused(tmp_path: Path, content: str, message: str) -> None:
    path = tmp_path / "dump.xml"
    path.write_text(content)
    with pytest.raises(DataError, match=rf"dump\.xml: {message}"):
        read(path)


@pytest.mark.parametrize(
    ("wikitext", "prose"),
    [
        ("'''Bold''' and ''italic'' and '''''both'''''.", "Bold and italic and both."),
        ("{{Infobox|a={{nested|b}}}}Text{{cite|x}}.", "Text."),
        ("See [[cat|the cat]] and [[dog]]s.", "See the cat and dogs."),
        ("A [[File:x.jpg|thumb|A [[nested]] caption]]b [[Category:Cats]][[de:Katze]]c", "A b c"),
        ("[[:Category:Cats]] stays", "Category:Cats stays"),
        ("{| class=x\n|-\n| cell || other\n|}\nAfter", "After"),
        ('Fact<ref name="a" />.<ref>book {{cite}}</ref> More', "Fact. More"),
        ("[http://a.org the site] and [http://b.org]", "the site and"),
        ("* one\n* two\n# three\n:; four", "one\ntwo\nthree\nfour"),
        ("== Empty ==\n== Full ==\nText\n=== Also empty ===\n", "Full\n\nText"),
        ("== Parent ==\n=== Child ===\nText", "Parent\n\nChild\n\nText"),
        ("Water (H<sub>2</sub>O) &amp; caf&eacute;<br>next<!-- hidden -->", "Water (H2O) & café\nnext"),
        ("Name ({{IPA|x}}; {{IPA|y}}) is", "Name is"),
        ("Name ({{lang|el|x}}; {{IPA|y}}) is", "Name (x) is"),
        ("Name ({{IPA|y}}, 1900) is", "Name (1900) is"),
        ("<math>x^2</math> is a sum<gallery>\nFile:a.jpg\n</gallery>.", "x^2 is a sum."),
        ("__NOTOC__Text<nowiki>''raw''</nowiki>", "Text''raw''"),
        ("broken [[link and {{template\nnext line", "broken link and template\nnext line"),
    ],
)
def test_markup_becomes_what_a_reader_sees(wikitext: str, prose: str) -> None:
    assert to_prose(wikitext) == prose


GERMAN = """<mediawiki xmlns="http://www.mediawiki.org/xml/export-0.11/" xml:lang="de"><siteinfo><namespaces>
<namespace key="-2">Medium</namespace><namespace key="6">Datei</namespace><namespace key="10">Vorlage</namespace>
<namespace key="14">Kategorie</namespace><namespace key="0" /></namespaces></siteinfo>
<page><title>Vorher</title><ns>0</ns><revision><text>Ein anderer Artikel.</text></revision></page>
<page><title>Stadt</title><ns>0</ns><revision>
<text>[[Datei:A.jpg|mini|links|200px|hochkant=1.2|Das [[Haus]] im Winter]]
Der Ort bleibt.[[Bild:B.jpg|rechts|x]] {{Vorlage:nowrap|12 km}} weit.[[Kategorie:Ort]][[en:City]]</text>
</revision></page>
<page><title>Ort</title><ns>0</ns><revision><text>#WEITERLEITUNG [[Stadt]]</text></revision></page>
<page><title>Daten</title><ns>0</ns><revision><model>json</model><text>{}</text></revision></page>
</mediawiki>"""


@pytest.mark.parametrize("block_bytes", [1, 10**6])
def test_a_dump_tells_every_block_its_names_of_namespaces(tmp_path: Path, block_bytes: int) -> None:
    path = tmp_path / "dump.xml.bz2"
    path.write_bytes(bz2.compress(GERMAN[:700].encode()) + bz2.compress(GERMAN[700:].encode()))  # two streams
    found = read(path, block_bytes)
    documents = [document for document in found if isinstance(document, Document)]
    assert [d.text for d in documents] == [
        "Vorher\n\nEin anderer Artikel.\n",
        "Stadt\n\nDer Ort bleibt. 12 km weit.\n",
    ]
    assert documents[1].left_out is not None
    assert documents[1].left_out.kinds == {"caption of a picture": (2, 5)}
    assert [(d.name, d.rule) for d in found if isinstance(d, Rejected)] == [
        ("Ort", "redirect"),
        ("Daten", "not wikitext"),
    ]


@pytest.mark.parametrize(
    ("root", "names", "article"),
    [
        ('xml:lang="bg"', {6: "Файл", 14: "Категория"}, "[[Файл:A.jpg|мини|ляво|Календар]]\nОстава.[[Категория:X]]"),
        ('xml:lang="ru"', {6: "Файл"}, "[[Изображение:a.jpg|мини|слева|200пкс|Подпись]]Остава.[[Category:X]]"),
        ('xml:lang="xx"', {6: "Kuvatus", 14: "Ryhmä"}, "[[Kuvatus:a.jpg|thumb|x]]Остава.[[Ryhmä:X]][[ Ryhmä : Y|z]]"),
        ("", {}, "[[Fichier:a.jpg|vignette|x]]Остава.[[Catégorie:X]][[Thể loại:X]][[Kategoria:X]]"),
        ('xml:lang="ja"', {}, "[[画像:a.jpg|サムネイル|右|説明]]Остава.[[zh-min-nan:X]]"),
    ],
)
def test_links_are_told_by_the_names_of_their_own_wiki(
    tmp_path: Path, root: str, names: dict[int, str], article: str
) -> None:
    namespaces = "".join(f'<namespace key="{number}">{name}</namespace>' for number, name in names.items())
    path = tmp_path / "dump.xml"
    path.write_text(
        f"<mediawiki {root}><siteinfo><namespaces>{namespaces}</namespaces></siteinfo><page><title>T</title><ns>0</ns>"
        f"<revision><text>{article}</text></revision></page></mediawiki>"
    )
    (document,) = read(path)
    assert isinstance(document, Document)
    assert document.text == "T\n\nОстава.\n"


def test_another_rendering_is_another_dataset(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "dump.xml"
    path.write_text(DUMP)
    corpus = CORPORA["wikipedia"](CorpusOptions((str(path),)))
    before = corpus.fingerprint()
    monkeypatch.setattr("megalm.data.prepare.corpora.wikipedia._RENDERING", "another")
    assert corpus.fingerprint() != before


@pytest.mark.skipif(not EXCERPT.exists(), reason="the excerpt of a real dump is not here")
def test_a_real_dump_becomes_clean_text() -> None:
    articles = {document.name: document for document in read(EXCERPT) if isinstance(document, Document)}
    assert len(articles) > 100
    for article in articles.values():
        # Marks that no prose has; formulas and code have braces, and brackets and apostrophes as they are written.
        left = re.search(r"\[\[|\]\]|<ref|\{\||'''|\n\n\n|[\x00-\x08]|thumb\||Category:", article.text)
        assert left is None, f"{article.name}: {article.text[max(left.start() - 40, 0) : left.end() + 40]!r}"
    assert sum(len(article.text) for article in articles.values()) > 2_900_000, "prose is not thrown away"
    for name, size, headings in (
        ("Alaska", 60_000, ("Economy", "Transportation", "Law and government")),
        ("Angola", 48_000, ("Culture", "Health", "Education")),
    ):
        text = articles[name].text
        assert len(text) > size
        assert all(f"\n\n{heading}\n\n" in text for heading in headings)


@pytest.mark.skipif(not EXCERPT.exists(), reason="the excerpt of a real dump is not here")
def test_a_real_article_keeps_the_words_that_the_parser_finds() -> None:
    """All but tables, references, pictures and templates, which are counted."""
    corpus = CORPORA["wikipedia"](CorpusOptions((str(EXCERPT),)))
    pages = [page for block in corpus.blocks(10**6) for page in block.pages if page.namespace == "0"]
    for page in [page for page in pages if not page.is_redirect][::20]:
        code = mwparserfromhell.parse(page.wikitext, skip_style_tags=True)
        for node in [*code.filter_tags(matches=lambda tag: tag.tag in LEFT_OUT), *links_that_show_nothing(code)]:
            with suppress(ValueError):  # within one that is gone
                code.remove(node)
        expected = Counter(re.findall(r"[^\W\d_]{3,}", code.strip_code()))
        kept = Counter(re.findall(r"[^\W\d_]{3,}", to_prose(page.wikitext, Site.of("en"))))
        headings = 20  # of sections that held nothing but a table
        assert (expected - kept).total() <= 0.02 * expected.total() + headings, page.title


LEFT_OUT = ("table", "ref", "gallery")


def links_that_show_nothing(code: mwparserfromhell.wikicode.Wikicode) -> list[mwparserfromhell.nodes.Wikilink]:
    prefix = re.compile(r"\s*(?:file|image|category|[a-z-]{2,12}):", re.IGNORECASE)
    return code.filter_wikilinks(matches=lambda link: prefix.match(str(link.title)))
