"""Wikipedia: a dump is streamed, and what is left of an article reads as prose."""

from __future__ import annotations

import bz2
import re
from pathlib import Path

import pytest

from megalm.data.corpora import CORPORA, CorpusOptions
from megalm.data.corpora.wikitext import to_prose
from megalm.data.document import Document, Rejected
from megalm.errors import DataError

EXCERPT = Path(__file__).resolve().parents[5] / "shared" / "data" / "wikipedia" / "enwiki-excerpt.xml.bz2"
DUMP = """<mediawiki xmlns="http://www.mediawiki.org/xml/export-0.11/" version="0.11"><siteinfo/>
<page><title>Cat</title><ns>0</ns><revision><text>A '''cat''' is an [[animal]].</text></revision></page>
<page><title>Cats</title><ns>0</ns><redirect title="Cat"/><revision><text>#REDIRECT [[Cat]]</text></revision></page>
<page><title>Kitty</title><ns>0</ns><revision><text>#redirect [[Cat]]</text></revision></page>
<page><title>Talk:Cat</title><ns>1</ns><revision><text>I like cats</text></revision></page>
<page><title>Nothing</title><ns>0</ns><revision><text>{{stub}}</text></revision></page>
<page><title>Dog &amp; bone</title><ns>0</ns><revision><text>A dog &lt;ref&gt;a book&lt;/ref&gt;barks.</text></revision></page>
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
        ("Name ({{lang|el|x}}; {{IPA|y}}) is", "Name is"),
        ("Name ({{IPA|y}}, 1900) is", "Name (1900) is"),
        ("<math>x^2</math>Sum<gallery>\nFile:a.jpg\n</gallery>.", "Sum."),
        ("__NOTOC__Text<nowiki>''raw''</nowiki>", "Textraw"),
        ("broken [[link and {{template\nnext line", "broken link and template\nnext line"),
    ],
)
def test_markup_becomes_what_a_reader_sees(wikitext: str, prose: str) -> None:
    assert to_prose(wikitext) == prose


@pytest.mark.skipif(not EXCERPT.exists(), reason="the excerpt of a real dump is not here")
def test_a_real_dump_becomes_clean_text() -> None:
    articles = [document for document in read(EXCERPT) if isinstance(document, Document)]
    assert len(articles) > 100
    for article in articles:
        left = re.search(r"\{\{|\}\}|\[\[|\]\]|<ref|\{\||'''|\n\n\n|\(\)|\( |^[*#:;]", article.text, re.MULTILINE)
        assert left is None, f"{article.name}: {article.text[max(left.start() - 40, 0) : left.end() + 40]!r}"
    assert sum(len(article.text) for article in articles) > 2_500_000, "prose is not thrown away"
