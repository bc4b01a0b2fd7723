"""Wikitext as real articles hold it: unbalanced, nested and odd. Nothing is swallowed, and text stays as written."""

from __future__ import annotations

import pytest

from megalm.data.prepare.corpora.wikitext import Site, is_redirect, render_article, to_prose

SECTION = "\n\n== Next ==\nNEXT-MARK stays."
NEXT = "\n\nNext\n\nNEXT-MARK stays."


@pytest.mark.parametrize(
    "text",
    [
        "!Kung live here.",
        "|x| is the absolute value of x.",
        "|-3| = 3, and\n|-x| = |x|",
        "The set {1, 2} | 3 has\n| bars at the start of a line.\n! and this one",
        "main() and exit(1) and f( )",
        "int a[] and a[ ] and [1]",
        "x = ''",
        "x = '' is an empty string",
        "!!!",
        "rock 'n' roll and the dogs' bones",
        "__init__ and __FILE__ and __name__",
        "List<String> and 3 < 4 > 2 and #include <stdio.h>",
        "A -{4-[3-x]phenyl}-piperidine",
        "mot : autre ; fin",
    ],
)
def test_text_stays_as_written(text: str) -> None:
    assert to_prose(text, Site.of("en")) == text


@pytest.mark.parametrize(
    ("wikitext", "prose"),
    [
        ("'''!Kung''' are a people", "!Kung are a people"),
        ("'''#1 Record''' is an album", "#1 Record is an album"),
        ("'''*NSYNC''' and", "*NSYNC and"),
        ("'''; DROP''' and '''':''' and", "; DROP and ': and"),
        ("''':''' is a colon", ": is a colon"),
        ("'''[!]'''", "[!]"),
        ("&#35;1 and &#124;x&#124; and &lt;ref&gt; and &#91;&#91;a]]", "#1 and |x| and <ref> and [[a"),
        ("<nowiki>* [[x]] ''y'' {{z}} &amp;</nowiki>", "* [[x]] ''y'' {{z}} &"),
        ("<nowiki/>* no list<nowiki />", "* no list"),
        ("The element <code>''</code> is empty", "The element '' is empty"),
        ("<code>x = ''</code>, <code>''n''</code> and <tt>a[[i]] = {}</tt>", "x = '', n and ai = {}"),
        ("<code>int a[]</code> <code>main()</code> <code>a[i] || }}</code>", "int a[] main() a[i] || }}"),
        (
            "<syntaxhighlight lang=c>\nif (a[0] && {{b}}) {\n    ''c'';\n}\n</syntaxhighlight>",
            "if (a[0] && {{b}}) {\n    ''c'';\n}",
        ),
        ("In <source inline>a  b</source> line", "In a  b line"),
        ("<pre>\n* no  list &lt;b&gt;\n  indented <nowiki>''x''</nowiki>\n</pre>", "* no  list <b>\n  indented ''x''"),
        ("Let <math>x</math> be <math>\\frac{1}{2}</math>", "Let x be \\frac{1}{2}"),
        (
            "&#xD800; is none, &#x1F600; is one, &#150; a dash, &bogus;",
            "&#xD800; is none, 😀 is one, – a dash, &bogus;",
        ),
        ("10<sup>6</sup> m<sup>2</sup>, H<sub>2</sub>O, 1<sup>st</sup>, Na<sup>+</sup>", "10⁶ m², H2O, 1st, Na⁺"),
    ],
)
def test_what_is_text_by_its_markup_is_not_taken_for_markup(wikitext: str, prose: str) -> None:
    assert to_prose(wikitext) == prose


@pytest.mark.parametrize(
    ("wikitext", "prose"),
    [
        ("'''''Both''' italic'' and ''it'''bold'''''", "Both italic and itbold"),
        ("'''''x''''' ''''four'''' '''''''seven'''''''", "x 'four' ''seven''"),
        ("L'''Avenir'' de Zola", "L'Avenir de Zola"),
        ("''[[Foo]]'''s bar", "Foo's bar"),
        ("'''Open bold.\nNext ''open italic\n\n'''ok'''", "Open bold.\nNext open italic\n\nok"),
        ("''Open title without an end", "Open title without an end"),
        ("'''[[a|'''b''' c]] d'''", "b c d"),
    ],
)
def test_bold_and_italics_end_with_their_line(wikitext: str, prose: str) -> None:
    assert to_prose(wikitext) == prose


@pytest.mark.parametrize(
    ("wikitext", "prose"),
    [
        ("Text.\n{| class=x\n|-\n| '''Total || 12\n|}", "Text."),
        ("Text.\n{| class=x\n| ''open\n| {{open\n| [[open\n| <small>open\n|}", "Text."),
        ("Text.\n{|\n|a\n{|\n|b\n|}\n|c\n|}\nAfter.", "Text.\nAfter."),
        ("Text.\n:{| class=x\n| a\n|}\nAfter.", "Text.\nAfter."),
        ("Text.\n{| class=x\n| a table without an end\n|-\n| b", "Text."),
        ("Text.\n{| class=x\n| without an end\n\nA paragraph after it.", "Text.\nA paragraph after it."),
        ("Text.\n{{box|a=\n{| class=x\n| {{b|\n{|\n| c\n|}\n}}\n|}\n}}\nAfter.", "Text.\nAfter."),
        ("Text.\n{{Table begin}}\n|-\n| [[a]] || 12\n|-\n! b\n|}\nAfter.", "Text.\nAfter."),
        ("Fact.<ref>'''open</ref> More.", "Fact. More."),
        ("Fact.<ref>{{open</ref> More.", "Fact. More."),
        ("Fact.<ref>Without an end. More.", "Fact. Without an end. More."),
        ("Fact.<ref name=a>Without an end. More.<ref>ended</ref> Last.", "Fact. Without an end. More. Last."),
        ("A <small>small <div class=x>text '''bold <center>", "A small\ntext bold"),
        ("A </div> text </small> with ends alone", "A\ntext with ends alone"),
        ("A <nowiki>text <code>open <pre>and more", "A text open and more"),
        ("A <nowiki>open [[x]]\n\n== H ==\nb <nowiki>''y''</nowiki>", "A open x\n\nH\n\nb ''y''"),
        ("A <math>open\n\nb <math>y</math>", "A open\n\nb y"),
        ("A <ref name=x open <br>b", "A name=x open\nb"),
        ("A <gallery>\nFile:x", "A\nFile:x"),
        ("A <!-- text goes on", "A text goes on"),
        ("A <!-- text\n\n== H ==\ngoes on<!-- hidden -->.", "A text\n\nH\n\ngoes on."),
        ("A <!-- \n== Hidden ==\nsection -->\nend", "A\nend"),
        ("A }} text ]] with [[ends and [[x|links]] alone", "A text with ends and links alone"),
        ("A {{quote|text without an end", "A text without an end"),
        ("{{Infobox city\n| name = X\n| size = 12\n\n'''X''' is a city.", "X is a city."),
        ("[[File:X.jpg|thumb|a caption without an end\nText.", "a caption without an end\nText."),
        ("[http://x.org label without an end", "[http://x.org label without an end"),
    ],
)
def test_what_is_left_open_swallows_nothing_after_it(wikitext: str, prose: str) -> None:
    assert to_prose(wikitext + SECTION) == prose + NEXT


@pytest.mark.parametrize(
    ("wikitext", "prose"),
    [
        ("* '''Bold''': text\n*''it'' [[x]]\n# one\n:; t\n:: indented", "Bold: text\nit x\none\nt\nindented"),
        ("; Term : Meaning", "Term: Meaning"),
        ("<!-- c -->* item\n<!-- a\nline -->\nText<!-- in --> end", "item\nText end"),
        ("[http://x.org label], [http://y.org], http://z.org/a_b and [//p.org rel]", "label, http://z.org/a_b and rel"),
        ("Hello<br>big<br/>wide</br>world", "Hello\nbig\nwide\nworld"),
        ("----\nAfter", "After"),
        ("<poem>\n''Line'' one\nLine '''two'''\n</poem>", "Line one\nLine two"),
        ("<ul><li>one<li>two</li></ul>", "one\ntwo"),
        ("a<div style='display: none'>hidden</div> b", "a b"),
        ("<noinclude>shown</noinclude><includeonly>not</includeonly>", "shown"),
        (
            "[[de:Katze]][[:de:Katze]] [[wikt:cat|cat]] [[Media:x.ogg|listen]] [[:File:x.jpg|see]]",
            "de:Katze cat listen see",
        ),
        ("[[File:a.jpg|thumb|[[File:b.jpg|inner]] [1] {{lang|fr|x}} [http://x y]]] Stays.", "Stays."),
        ("-{zh-hans:计算机;zh-hant:電腦}- is a word", "计算机 is a word"),
        ("== #1 ==\na\n== ''It'' {{x}} ==\nb\n=== [[L|l]]<ref>x</ref> ===\nc", "#1\n\na\n\nIt\n\nb\n\nl\n\nc"),
        ("{{About|x|y}}\n'''A''' ({{IPA|x}}, {{cite|y}}) is.<ref>z</ref>", "A is."),
        ("* {{cite book|x}}; also published\n* {{cite book|y}}, {{cite book|z}}", "also published"),
        ("A.<references><ref>x</ref></references>{{reflist}} B", "A. B"),
        ("__NOTOC__ a __KEIN_INHALTSVERZEICHNIS__ b __БЕЗ_ОГЛ__", "a b"),
        ("{{{1|default}}} {{#if:x|yes|no}} {{lc:ABC}} {{PAGENAME}} {{DEFAULTSORT:x}}", "default yes abc Title"),
    ],
)
def test_markup_shows_what_a_reader_sees(wikitext: str, prose: str) -> None:
    assert to_prose(wikitext, Site.of("en"), "Title") == prose


@pytest.mark.parametrize(
    "wikitext",
    [
        "a" + " {{x}}" * 200 + " b",
        "a" + " , {{x}}" * 200 + " b",
        "(" + "{{x}} , " * 200 + "b",
        "a" + " <ref>x</ref>" * 200 + " b",
        "(" * 2000 + "{{x}}" * 200 + "b",
        "{|\n|" + " " * 20_000 + "\n|}\nb",
        "''" * 4999 + "b",
        "[[a|" * 300 + "b",
        "{{a|" * 300 + "b",
        "<ref>a" * 2000 + "b",
        "= a " * 5000 + "b",
        "\n| b" * 2000,
    ],
)
def test_time_does_not_grow_out_of_hand(wikitext: str) -> None:
    """Patterns that try all ways to share out spaces between gaps would not come to an end."""
    assert to_prose(wikitext).endswith("b")


def test_languages_with_several_scripts_show_the_first_of_them() -> None:
    text = "-{H|zh-cn:x;zh-tw:y}--{zh-cn:计算机;zh-tw:電腦}-是-{中文}-"
    assert to_prose(text, Site.of("zh")) == "计算机是中文"


@pytest.mark.parametrize(
    ("wikitext", "redirect"),
    [
        ("#REDIRECT [[X]]", True),
        ("#redirect: [[X]]", True),
        ("#WEITERLEITUNG [[X]]", True),
        (" # перенаправление [[X]]\n[[Category:y]]", True),
        ("#リダイレクト[[X]]", True),
        ("#NEUESWORT [[X]] {{R}} [[Category:y]]", True),
        ("#1 [[X]]", False),
        ("# one [[x]]\n# two [[y]]", False),
        ("#NASA [[X]] is the first of a list", False),
    ],
)
def test_redirects_of_any_language_are_told(wikitext: str, redirect: bool) -> None:
    assert is_redirect(wikitext) is redirect


def test_all_that_is_left_out_is_counted_by_name_and_words() -> None:
    text = (
        "Kept words are five.<ref>[http://x.org A book] {{cite|title=B}}</ref> {{Some  box|name=two words|x=[[a|b]]}}\n"
        "{| class=x\n! head\n|-\n| one || two<ref>in it</ref>\n|}\n"
        "[[File:a.jpg|thumb|left|200px|upright=1.2|alt=no|A caption]] [[File:b.jpg|thumb]] {{some_box|c}}\n"
        "<gallery>\nFile:c.jpg|Third\n</gallery><timeline>a b</timeline>{{IPA|w}}"
    )
    prose, left_out = render_article(text, Site.of("en"))
    assert prose == "Kept words are five."
    assert left_out.kinds == {
        "reference": (2, 5),
        "template: some box": (2, 4),
        "table": (1, 3),
        "caption of a picture": (2, 3),
        "tag: timeline": (1, 2),
        "template: ipa": (1, 1),
    }
    assert (left_out.kept_words, left_out.lost_words) == (4, 13), "references are no part of the text"
    assert left_out.share == pytest.approx(13 / 17)


def test_what_the_parser_gives_up_on_is_counted_and_the_rest_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    import mwparserfromhell

    parse = mwparserfromhell.parse

    def fails(text: str, **options: object) -> object:
        if "BAD" in text:
            raise mwparserfromhell.parser.ParserError("lost")
        return parse(text, **options)

    monkeypatch.setattr(mwparserfromhell, "parse", fails)
    prose, left_out = render_article("One.\n\nBAD two three.\n\nFour." + SECTION, Site.of())
    assert prose == "One.\n\nFour." + NEXT
    assert left_out.kinds == {"unreadable wikitext": (1, 3)}
