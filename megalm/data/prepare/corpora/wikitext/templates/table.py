"""Which template shows what: the table, and what is done with a template that is not in it."""

from __future__ import annotations

import re

from megalm.data.prepare.corpora.wikitext.losses import REFERENCE
from megalm.data.prepare.corpora.wikitext.marks import BREAK, EMPTY
from megalm.data.prepare.corpora.wikitext.templates import dates, text, values
from megalm.data.prepare.corpora.wikitext.templates.call import Call
from megalm.data.prepare.corpora.wikitext.templates.convert import convert
from megalm.data.prepare.corpora.wikitext.templates.countries import COUNTRIES
from megalm.data.prepare.corpora.wikitext.templates.functions import function
from megalm.data.prepare.corpora.wikitext.templates.text import Shown


def _names(text: str) -> list[str]:
    return [" ".join(name.split()) for name in re.split(r"\s\|\s", text.strip())]


_NAMES: tuple[tuple[str, Shown], ...] = (
    ("convert | cvt | convertir | converter | конвертировать", convert),
    (
        """
        nowrap | nobr | nowr | nobreak | nobold | noitalic | nobolditalic | normal | small | smaller | petit
        | klein | малък | big | bigger | large | huge | smallcaps | sc | sc1 | sc2 | caps | smallcaps all |
        small caps | pc | strong | em | bold | italic | italics | center | centre | centered | math | mvar |
        tmath | code | tt | mono | kbd | key | samp | var | codett | vanchor | visible anchor | underline |
        ul | u | ins | strike | del | unicode | polytonic | hebrew | nastaliq | iast | not a typo | proper
        name | as written | typo | no spelling check | longitem | nihongo2 | nihongo foot | midsize | flag |
        flagcountry | flagu | flag country | flaglist | bandeira | bandera | pays | страна | флаг | знаме |
        patria | abbr | abbrlink | tooltip | abréviation | abr | comment | обр | shy | nowiki | plainlist |
        flatlist | plain list | quote inline | overline | indent | serif | sans-serif | sans | font |
        blockindent | bdo | crossref | crossreference | fontcolor | noitalics
        """,
        text.argument("1", "text", "content"),
    ),
    (
        """
        lang | langue | lang2 | langwithname | wikt-lang | script | rtl-lang | color | colour | font color |
        fontcolour | resize | text color | background color | h:title | hidden sort key | мова |
        sprache | citation étrangère | citation langue
        """,
        text.last_argument,
    ),
    ("transl | transliteration | translit | translittération", values.transliteration),
    ("langx", values.in_named_language),
    ("nihongo | japonais | японски | ruby-ja", text.nihongo),
    ("nihongo3 | nihongo krt", text.nihongo_romaji_first),
    ("zh | lang-zh | zh-full | chinois | chinesisch | zho", text.chinese),
    (
        """
        quote | blockquote | block quote | cquote | bquote | quotation | quote box | quotebox | centered
        pull quote | pull quote | poemquote | poem quote | long quotation | epigraph | zitat | zitat-en |
        citation bloc | bloc citation | cita | cita textual | cita2 | citat | cytat | citazione | citação |
        citaat | citát | sitat | sitaatti | idézet | цитата | цитат | epigrafe | эпиграф
        """,
        text.quotation,
    ),
    ("rquote | quoteright | quote right | quote left", text.aligned_quotation),
    ("\" | ' '", text.argument("1", "text", "quote")),
    (
        """
        lien | link-interwiki | ill | interlanguage link | illm | interlanguage link multi | red link |
        redlink | ile | enlace ausente
        """,
        text.other_language_link,
    ),
    (
        """
        нп | нп1 | нп2 | нп3 | нп4 | нп5 | не переведено | не переведено 2 | не переведено 3 | не переведено
        5 | не перекладено
        """,
        text.not_translated,
    ),
    ("linktext | keypress | key press | keys | gaps | link text", text.joined(" ")),
    ("hlist | hl | flat list | inline list | horizontal list", text.joined(" · ")),
    ("cslist | comma separated entries", text.joined(", ")),
    (
        """
        unbulleted list | ubl | ubil | vunblist | unbullet | bulleted list | ordered list | blist | bulleted
        | collapsible list | columns-list | columnslist | div list | tree list
        """,
        text.lines,
    ),
    ("columns", text.columns),
    ("sic | sic! | [sic]", text.sic),
    (
        """
        ship | uss | hms | hmas | hmcs | hmnzs | ss | rms | mv | ms | mt | sms | usat | usns | uscgc | ins |
        ijn | rfa | css | usrc | hnlms | hdms | hmt | gts | ts | tss | sv
        """,
        text.ship,
    ),
    ("sort", text.argument("2", "1")),
    ("sortname", text.last_name_after_first),
    ("url | official url | link", text.link_text),
    ("angbr | angle bracket | angbr ipa | grapheme", text.enclosed("⟨", "⟩")),
    ("abs | absolute value", text.enclosed("|", "|")),
    ("brace | curly brackets", text.enclosed("{", "}")),
    ("bracket | brackets | square brackets", text.enclosed("[", "]")),
    ("sqrt | radic | square root", text.enclosed("√", "")),
    ("incise", text.enclosed(" – ", " –")),
    ("pie", text.enclosed("*", "")),
    (
        """
        birth date | birth-date | birthdate | bda | birth date and age | birth-date and age | death date |
        death-date | start date | start-date | end date | end-date | start date and age | film date | dts |
        date table sorting | birth year and age
        """,
        dates.date,
    ),
    ("death date and age | death-date and age | dda", dates.death_date_and_age),
    ("age | ageny", dates.age),
    ("as of | asof", dates.as_of),
    ("circa | c. | ca. | ca | около | ок.", dates.circa),
    ("floruit | fl. | fl", dates.years("fl.")),
    ("reign | r. | ruled", dates.years("r.")),
    ("date | date- | datum | fecha | дата", dates.day_month_year),
    ("frac | fraction | bruch | дробь | ⁄", values.fraction),
    ("sfrac", values.slashed_fraction),
    ("val", values.value),
    (
        """
        nts | number table sorting | format price | formatprice | nombre | число | num | fmtn
        """,
        values.number,
    ),
    ("unité | unite | nb | unidad | nombre d'unité | unité/2 | unitat | unidade | unità", values.number_and_unit),
    ("höhe | höhe2", values.height),
    (" | ".join(values.CURRENCIES), values.currency),
    ("currency | moneda | monnaie", values.named_currency),
    ("percentage | pct | percent", values.percentage),
    ("ordinal | ord | ordinal number", values.ordinal),
    ("roman | rn | romain | romano", values.roman),
    ("chem | chem2 | fchim | chem/link", values.formula),
    ("music | accidental", values.accidental),
    ("sup | exp | smallsup | superscript | exposant", values.superscript),
    ("sub | smallsub | subscript | ind | indice", text.argument("1")),
    ("pow | power | su", values.power),
    ("br | break | crlf | paragraph break | pb | par | newline", text.literal(BREAK)),
    (
        """
        nbsp | space | spaces | sp | thinsp | thin space | hairsp | hair space | nnbsp | ensp | emsp | pad |
        spacer | пробел
        """,
        text.spaces,
    ),
    ("ndash | en dash | endash | – | dash | nd", text.literal("–")),
    ("mdash | em dash | emdash | — | md", text.literal("—")),
    ("snd | snds | spaced ndash | spaced en dash | spnd | spndash | sndash | ndashb | тире", text.literal(" – ")),
    ("spaced mdash | mdashb | smd | spaced em dash | тире2", text.literal(" — ")),
    ("· | • | middot | bull | bullet | dot | interpunct | ⋅ | ,", text.literal(" · ")),
    ("\\ | slash | spaced slash", text.literal(" / ")),
    ("! | pipe | vertical bar", text.literal("|")),
    ("= | equals | equal", text.literal("=")),
    ("' | apostrophe | aphostrophe | ’", text.literal("'")),
    ("' \"", text.literal("'\"")),
    ("\" '", text.literal("\"'")),
    ("'s | ’s", text.literal("'s")),
    ("okina | ʻokina | ‘", text.literal("ʻ")),
    ("( | lbrace", text.literal("{")),
    (") | rbrace", text.literal("}")),
    ("((", text.literal("{{")),
    ("))", text.literal("}}")),
    ("* | asterisk", text.literal("*")),
    ("hash | number sign", text.literal("#")),
    ("colon", text.literal(":")),
    ("... | ellipsis | [...]", text.literal("…")),
    ("sharp", text.literal("♯")),
    ("flat", text.literal("♭")),
    ("natural", text.literal("♮")),
    ("pi", text.literal("π")),
    ("times", text.literal("×")),
    ("minus | −", text.literal("−")),
    ("± | plusminus | +-", text.literal("±")),
    ("deg | degree | degrees | °", text.literal("°")),
    ("approx | ≈", text.literal("≈")),
    ("infin | ∞", text.literal("∞")),
    ("zwsp | wbr | zwnj | nowrap begin | nowrap end", text.literal(EMPTY)),
)
_IN_LANGUAGE: dict[str, tuple[tuple[str, Shown], ...]] = {
    "en": (
        ("e | esp", values.power_of_ten),
        (" | ".join(COUNTRIES), lambda call: COUNTRIES[call.name]),
        ("vr", text.argument("1")),
    ),
    "fr": (
        ("citation | « » | guillemets | citation inline", text.french_quotation),
        ("s | s- | siècle | siècles | -s | -s-", values.century),
        ("e | er | re | ère | ème | exp | ex | nd | o", lambda call: call.name + call.text("1")),
        ("1er | 1re | ier | ière | ii | iii", lambda call: call.written_name),
        ("n° | numéro | no | numéro avec lien", text.literal("nº")),
        ("av jc | av j-c | avjc | av. j.-c.", text.literal("av. J.-C.")),
        ("ap jc | ap j-c | apjc | ap. j.-c.", text.literal("apr. J.-C.")),
        ("m. | mme | mlle | dr | pr | mgr | st | ste", lambda call: f"{call.written_name} {call.text('1')}".strip()),
        ("nombre | nb", values.number_and_unit),
        ("souverain | souverain- | souverain2 | papauté", text.argument("1")),
        ("lang", text.last_argument),
    ),
    "de": (
        ("§ | §§", lambda call: f"{call.name} {' '.join(filter(None, call.positional()[:2]))}"),
        ("ens | frs", text.argument("1")),
        ("s | seite", text.argument("1")),
    ),
    "es": (
        ("ac | a. c. | a.c.", text.literal("a. C.")),
        ("dc | d. c. | d.c.", text.literal("d. C.")),
        ("esd | sin título", text.argument("1")),
        ("siglo | siglos", lambda call: f"siglo {call.value('1')}" if call.has("1") else None),
    ),
    "ru": (("s | ч | м", text.argument("1")), ("e | э", values.power_of_ten), ("iw", text.not_translated)),
    "bg": (("ч | м | км", text.argument("1")), ("без прев | превод от", text.argument("1"))),
    "uk": (("s | ч | м", text.argument("1")), ("не перекладено | нп | iw", text.not_translated)),
}
_REFERENCES = frozenset(
    _names(
        """
    sfn | sfnp | sfnm | sfnmp | harvnb | harvp | harv | harvtxt | harvcol | harvcolnb | efn | efn-ua |
    efn-lr | efn-la | refn | r | rp | ref | note | notetag | cnote | ref label | note label | citation |
    vcite book | reflist | notelist | refbegin | refend | references | cite | fn | fußnote |
    internetquelle | literatur | einzelnachweise | ouvrage | lien web | article | références | refnec |
    note groupe | obra citada | cita libro | cita web | cita noticia | cita publicación | listaref |
    книга | статья | примечания | публикация | cite book | цитат книга | цитат уеб | цитат периодика |
    цитат новина | reflist2 | oclc | isbn | doi | issn | pmid | harvid | sfnref | webarchive | wayback |
    dead link | page needed | isbn2 | arxiv | jstor | bibcode | книжка | cita news | cita pubblicazione
    | cytuj | cytuj książkę | citar livro | citar web | citar periódico | citeer boek | citeer web |
    bokref | webbref | tidningsref | примітки
    """
    )
)
_REFERENCE = re.compile(r"(?:v?cite|citeer|citar|cytuj|cita) |harv|sfn")
_LANGUAGE_TEMPLATE = re.compile(r"lang-[a-z]{2,3}(?:-[a-z]+)*")
_FRENCH_CENTURY = re.compile(r"-?[ivxl]+er? siècle.*")
_GERMAN_LANGUAGE = re.compile(r"[a-z]{2,3}S")


def _table(rows: tuple[tuple[str, Shown], ...]) -> dict[str, Shown]:
    return {name: shown for names, shown in reversed(rows) for name in _names(names)}


_TABLE = _table(_NAMES)
_TABLES = {language: _table(rows) for language, rows in _IN_LANGUAGE.items()}


def render_template(call: Call) -> str:
    """What a template shows; the mark of a gap if it is left out."""
    name = call.name
    shown = _shown(call)
    text_shown = None if shown is None else shown(call)
    if text_shown is None and (":" in name or not call.raw()):
        text_shown = function(call, *call.function())
    if text_shown is not None:
        return text_shown
    if name in _REFERENCES or _REFERENCE.match(name):
        return call.leave_out(REFERENCE, reference=True)
    return call.leave_out(f"template: {name.split(':')[0] if name.startswith('#') else name}")


def _shown(call: Call) -> Shown | None:
    own = _TABLES.get("en" if call.language == "simple" else call.language, {}).get(call.name)
    if own is not None:
        return own
    if _LANGUAGE_TEMPLATE.fullmatch(call.name) and call.name not in _TABLE:
        return values.in_language
    if call.language == "fr" and _FRENCH_CENTURY.fullmatch(call.name) and not call.raw():
        return lambda call: call.written_name
    if call.language == "de" and _GERMAN_LANGUAGE.fullmatch(call.written_name[:1].lower() + call.written_name[1:]):
        return text.argument("1")
    return _TABLE.get(call.name)
