"""Templates that hold text of the sentence around them: what a reader reads, in several languages."""

from __future__ import annotations

import pytest

from megalm.data.prepare.corpora.wikitext import Site, render_article, to_prose


@pytest.mark.parametrize(
    ("call", "shown"),
    [
        # What the template's own documentation and articles show, but for symbols instead of names of units.
        ("12|km|mi", "12 km (7.5 mi)"),
        ("1300|mi|km", "1,300 mi (2,100 km)"),
        ("10|to|20|km|mi", "10 to 20 km (6.2 to 12.4 mi)"),
        ("60|-|80|kg|lb", "60–80 kg (130–180 lb)"),
        ("2|x|4|in|cm", "2 × 4 in (5.1 × 10.2 cm)"),
        ("6|ft|2|in|m", "6 ft 2 in (1.88 m)"),
        ("5|ft|11|in|cm", "5 ft 11 in (180 cm)"),
        ("180|cm|ftin", "180 cm (5 ft 11 in)"),
        ("20|C|F", "20 °C (68 °F)"),
        ("0|C|F", "0 °C (32 °F)"),
        ("-40|C|F", "−40 °C (−40 °F)"),
        ("100|ha|acre", "100 ha (250 acres)"),
        ("1|acre", "1 acre (0.40 ha)"),
        ("500|km2|sqmi|order=flip", "190 sq mi (500 km²)"),
        ("5|mi|km|adj=on", "5-mile (8.0 km)"),
        ("3,000|ft|m|0", "3,000 ft (914 m)"),
        ("1/2|mi|km", "1⁄2 mi (0.80 km)"),
        ("12|km|mi nmi", "12 km (7.5 mi; 6.5 nmi)"),
        ("12|km|mi|abbr=off", "12 kilometres (7.5 miles)"),
        ("3|lb|kg|sigfig=3", "3 lb (1.36 kg)"),
        ("30|lb|kg|round=5", "30 lb (15 kg)"),
        ("4|ft|m|disp=or", "4 ft or 1.2 m"),
        ("2.5|e6acre|km2", "2.5 million acres (10,000 km²)"),
        ("100|mph|km/h|abbr=on", "100 mph (160 km/h)"),
        ("8|L|USgal", "8 L (2.1 US gal)"),
        ("20|in", "20 in (510 mm)"),
        (" 12 | km | mi ", "12 km (7.5 mi)"),
        ("50|oddunit|otherunit", "50 oddunit"),
    ],
)
def test_quantities_are_converted_and_rounded(call: str, shown: str) -> None:
    assert to_prose(f"It is {{{{convert|{call}}}}}.", Site.of("en")) == f"It is {shown}."


@pytest.mark.parametrize(
    ("language", "wikitext", "prose"),
    [
        ("en", "1775{{ndash}}1783{{snd}}x 5{{nbsp}}km {{mdash}} {{·}}", "1775–1783 – x 5 km — ·"),
        (
            "en",
            "{{lang|fr|''chemin''}} {{lang-de|Wort}} {{langx|es|casa}} {{transl|ar|ALA|kitab}}",
            "chemin German: Wort Spanish: casa kitab",
        ),
        (
            "en",
            "{{nihongo|'''aikido'''|合気道|aikidō}} {{nihongo3|Six|六|roku}}",
            "aikido (合気道, aikidō) roku (六, Six)",
        ),
        ("en", "{{zh|s=计|t=計|p=jì}}", "simplified Chinese: 计; traditional Chinese: 計; pinyin: jì"),
        (
            "en",
            "He said: {{quote|All is gold.|A poet|A book}} and left.",
            "He said:\nAll is gold.\n— A poet, A book\nand left.",
        ),
        ("en", "{{cquote|text=One\n* two}}{{Rquote|right|Three|Me}}", "One\ntwo\n\nThree\n— Me"),
        ("en", "{{formatnum:1234567.5}} {{formatnum:3}} {{formatnum:1,234|R}}", "1,234,567.5 3 1234"),
        (
            "en",
            "{{nowrap|a = b}} {{small|x '''y'''}} {{sc|Lord}} {{abbr|NATO|North}} {{code|int a[]}}",
            "a = b x y Lord NATO int a[]",
        ),
        ("en", "{{circa|1900}} {{c.}} 1900 {{fl.|1900|1910}} {{reign|1|2}}", "c. 1900 c. 1900 fl. 1900–1910 r. 1–2"),
        ("en", "{{birth date|1990|1|2|df=y}}, {{birth date and age|1990|5|6}}", "2 January 1990, May 6, 1990"),
        (
            "en",
            "{{as of|2010|1}} {{as of|2010|lc=y}} {{death date and age|2000|3|4|1920|4|1}}",
            "As of January 2010 as of 2010 March 4, 2000 (aged 79)",
        ),
        (
            "en",
            "{{frac|1|2}} {{frac|3|1|2}} {{sfrac|1|2}} {{val|1234.5|0.2|e=6|u=km}} 5{{e|-6}}",
            "1⁄2 3 1⁄2 1/2 1,234.5±0.2×10⁶ km 5×10⁻⁶",
        ),
        ("en", "x{{sup|2}} H{{sub|2}}O {{chem|SO|4|2-}} {{music|flat}} {{mvar|n}} {{math|a}}", "x² H2O SO4²⁻ ♭ n a"),
        ("en", "{{USD|10}} {{£|5}} {{Euro|7}} {{currency|3|JPY}}", "US$10 £5 €7 ¥3"),
        (
            "en",
            "{{flag|France}} {{ill|Name|fr|Nom}} {{ill|N|fr|Nom|lt=text}} {{USS|Enterprise|CVN-65}}",
            "France Name text USS Enterprise (CVN-65)",
        ),
        ("en", "{{hlist|a|b}} {{ubl|c|d}} {{plainlist|\n* e\n* f\n}}", "a · b\nc\nd\ne\nf"),
        (
            "en",
            "a{{!}}b c{{=}}d {{'}} {{sic|teh}} {{angbr|a}} {{roman|14}} {{ordinal|22}}",
            "a|b c=d ' teh [sic] ⟨a⟩ XIV 22nd",
        ),
        (
            "de",
            "{{formatnum:1234567.5}} {{Höhe|1234|DE}} {{enS|word}} {{Zitat|Worte|Ich}}",
            "1.234.567,5 1.234 m word\nWorte\n— Ich",
        ),
        (
            "fr",
            "{{formatnum:1234.5}} {{s|XIX|e}} {{XVIIe siècle}} {{citation|Oui}} {{unité|12|km|2}}",
            "1 234,5 XIXe siècle XVIIe siècle « Oui » 12 km²",
        ),
        (
            "fr",
            "{{date|1|janvier|2000}} {{1er}} {{nombre|1234|habitants}} {{lien|Nom|lang=en}}",
            "1 janvier 2000 1er 1 234 habitants Nom",
        ),
        (
            "es",
            "{{convertir|12|km|mi}} {{cita|Sí|Yo}} {{fecha|1|2|2000}} {{siglo|XIX}}",
            "12 km (7,5 mi)\nSí\n— Yo\n1 de febrero de 2000 siglo XIX",
        ),
        (
            "ru",
            "{{lang-en|word}} {{нп5|Статья|текст|en}} {{цитата|слова|автор=Он}} {{число|12345}}",
            "word текст\nслова\n— Он\n12 345",
        ),
        (
            "bg",
            "{{lang-en|word}} {{цитат|Думи|Автор}} {{formatnum:12345.6}} {{nobr|12 км}}",
            "word\nДуми\n— Автор\n12 345,6 12 км",
        ),
    ],
)
def test_text_of_templates_stays_in_the_sentence(language: str, wikitext: str, prose: str) -> None:
    assert to_prose(wikitext, Site.of(language)) == prose


def test_references_are_told_from_templates_that_say_something() -> None:
    text = "A.{{sfn|B|2000}}{{refn|c d}}{{Cite web|title=e f|url=http://x}}{{#tag:ref|g}} {{harvnb|H}}{{unknown|i j k}}"
    prose, left_out = render_article(text, Site.of("en"))
    assert prose == "A."
    assert left_out.kinds == {"reference": (5, 8), "template: unknown": (1, 3)}
    assert left_out.lost_words == 3


def test_what_is_left_out_of_an_argument_is_counted_once() -> None:
    prose, left_out = render_article("{{convert|12<ref>a b</ref>|km|mi}} {{as of|2010<ref>c</ref>}}", Site.of("en"))
    assert prose == "12 km (7.5 mi) As of 2010"
    assert left_out.kinds == {"reference": (2, 3)}


def test_an_equals_sign_does_not_make_a_language_of_its_code() -> None:
    prose, left_out = render_article("A {{lang|fr|E = mc}} b {{sort|key|text}} {{sort|x}} {{USA}}.", Site.of("en"))
    assert prose == "A b text x United States."
    assert list(left_out.kinds) == ["template: lang"]


def test_columns_are_read_one_after_the_other() -> None:
    assert to_prose("{{columns|col1=\n* a\n* b\n|col2=\n* c\n}}") == "a\nb\nc"


@pytest.mark.parametrize(
    ("wikitext", "shown"),
    [
        ("{{#expr:3*4}}", "12"),
        ("{{formatnum:{{#expr: 1000 * (4 + 1) / 2 }}}}", "2,500"),
        ("{{#expr: 10/3 round 2}}", "3.33"),
        ("{{#expr: 2^2 + 7 mod 4}}", "7"),
        ("{{#expr:1/0}}", ""),
        ("{{#expr:__import__('os')}}", ""),
        ("{{#expr:9^9^9^9}}", ""),
        ("{{#if:x|yes|no}}{{#ifeq:a|b|yes|no}}", "yesno"),
        ("{{#switch:b|a=one|b|c=two|#default=three}}", "two"),
        ("{{#switch:z|a=one|#default=three}}{{#switch:z|a=one|four}}", "threefour"),
        ("{{subst:nowrap|x}} {{safesubst:Template:lang|fr|mot}}", "x mot"),
    ],
)
def test_functions_of_the_parser_are_evaluated(wikitext: str, shown: str) -> None:
    assert to_prose(f"It is {wikitext}.", Site.of("en")) == (f"It is {shown}." if shown else "It is.")
