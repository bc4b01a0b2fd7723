"""Templates that show numbers, formulas, currencies and names of languages."""

from __future__ import annotations

import re

from megalm.data.prepare.corpora.wikitext.marks import plain
from megalm.data.prepare.corpora.wikitext.names import words
from megalm.data.prepare.corpora.wikitext.templates.call import Call
from megalm.data.prepare.corpora.wikitext.templates.numbers import grouped, is_number

_SUPERSCRIPTS = str.maketrans("0123456789+-−()n", "⁰¹²³⁴⁵⁶⁷⁸⁹⁺⁻⁻⁽⁾ⁿ")
_LANGUAGE_NAMES = dict(
    pair.split("=")
    for pair in words(
        """
        ar=Arabic az=Azerbaijani be=Belarusian bg=Bulgarian bn=Bengali bo=Tibetan bs=Bosnian ca=Catalan cs=Czech
        cy=Welsh da=Danish de=German el=Greek en=English eo=Esperanto es=Spanish et=Estonian eu=Basque fa=Persian
        fi=Finnish fr=French ga=Irish gd=Scottish_Gaelic gl=Galician grc=Ancient_Greek got=Gothic gu=Gujarati
        haw=Hawaiian he=Hebrew hi=Hindi hr=Croatian hu=Hungarian hy=Armenian id=Indonesian is=Icelandic it=Italian
        ja=Japanese ka=Georgian kk=Kazakh km=Khmer ko=Korean ku=Kurdish la=Latin lb=Luxembourgish lt=Lithuanian
        lv=Latvian mk=Macedonian mn=Mongolian mr=Marathi ms=Malay mt=Maltese my=Burmese ne=Nepali nl=Dutch
        nn=Norwegian_Nynorsk no=Norwegian nb=Norwegian_Bokmål ang=Old_English non=Old_Norse fro=Old_French
        pa=Punjabi pl=Polish ps=Pashto pt=Portuguese ro=Romanian ru=Russian sa=Sanskrit sk=Slovak sl=Slovene
        so=Somali sq=Albanian sr=Serbian sv=Swedish sw=Swahili ta=Tamil te=Telugu th=Thai tl=Tagalog tr=Turkish
        uk=Ukrainian ur=Urdu uz=Uzbek vi=Vietnamese yi=Yiddish yo=Yoruba zh=Chinese zu=Zulu arc=Aramaic syr=Syriac
        cop=Coptic egy=Egyptian akk=Akkadian gsw=Swiss_German nds=Low_German fy=West_Frisian af=Afrikaans br=Breton
        kn=Kannada ml=Malayalam si=Sinhala mi=Māori qu=Quechua nv=Navajo
        """
    )
)
_BEFORE = {
    "usd": "US$", "us$": "US$", "$": "$", "gbp": "£", "£": "£", "pound": "£", "eur": "€", "€": "€", "euro": "€",
    "jpy": "¥", "¥": "¥", "cny": "CN¥", "inr": "₹", "indian rupee": "₹", "₹": "₹", "cad": "C$", "can$": "C$",
    "aud": "A$", "au$": "A$", "a$": "A$", "nzd": "NZ$", "nz$": "NZ$", "hkd": "HK$", "sgd": "S$", "rub": "₽",
    "krw": "₩", "₩": "₩", "php": "₱", "ils": "₪", "brl": "R$", "mxn": "Mex$", "chf": "CHF ", "zar": "R", "try":
    "₺", "ngn": "₦", "pkr": "Rs ", "idr": "Rp", "vnd": "₫",
}  # fmt: skip
CURRENCIES = tuple(_BEFORE)
_ACCIDENTALS = {
    "flat": "♭", "b": "♭", "sharp": "♯", "#": "♯", "natural": "♮", "doublesharp": "𝄪", "double sharp": "𝄪", "##": "𝄪",
    "doubleflat": "𝄫", "double flat": "𝄫", "bb": "𝄫",
}  # fmt: skip
_PARTS_OF_FORMULA = re.compile(r"\d*[+\-−]")


def raised(text: str) -> str:
    """A number as superscript characters; other text as it is."""
    inner = plain(text)
    return inner.translate(_SUPERSCRIPTS) if re.fullmatch(r"[0-9+\-−n]+", inner) else text


def superscript(call: Call) -> str | None:
    """``{{sup|2}}``."""
    return raised(call.text("1")) if call.has("1") else None


def power_of_ten(call: Call) -> str | None:
    """``{{e|6}}`` ▶ ``×10⁶``."""
    return f"×10{raised(call.text('1'))}" if call.has("1") else None


def power(call: Call) -> str | None:
    """``{{pow|10|6}}`` ▶ ``10⁶``."""
    return call.text("1") + raised(call.text("2")) if call.has("1") else None


def fraction(call: Call) -> str | None:
    """``{{frac|3|1|2}}`` ▶ ``3 1⁄2``."""
    return _fraction(call, "⁄")


def slashed_fraction(call: Call) -> str | None:
    """``{{sfrac|1|2}}`` ▶ ``1/2``."""
    return _fraction(call, "/")


def value(call: Call) -> str | None:
    """``{{val|1234.5|0.2|e=6|u=km}}`` ▶ ``1,234.5±0.2×10⁶ km``."""
    if not call.has("1"):
        return None
    number = call.value("1")
    text = call.text("p") + (grouped(number, call.language) if is_number(number) else number).replace("-", "−")
    if call.has("2"):
        up, down = call.value("2"), call.value("3")
        text += f"+{up.lstrip('+')}−{down.lstrip('-−')}" if down else up if up.startswith("(") else f"±{up}"
    if call.has("e"):
        text += f"×10{raised(call.text('e'))}"
    unit = call.text("u", "ul", "unit", "up", "upl")
    return f"{text}{call.text('s')}\u00a0{unit}" if unit else text + call.text("s")


def number(call: Call) -> str | None:
    """``{{nts|1234}}`` ▶ ``1,234``."""
    return grouped(call.value("1").replace(",", ""), call.language) if call.has("1") else None


def number_and_unit(call: Call) -> str | None:
    """``{{unité|12|km|2}}`` ▶ ``12 km²``: a number, and words after it."""
    values = call.values()
    if not values or not values[0]:
        return None
    first = values[0].replace(" ", "").replace("\u202f", "")
    shown = grouped(first.replace(",", ".") if call.language == "fr" else first, call.language)
    unit = values[1] if len(values) > 1 else ""
    if len(values) > 2 and re.fullmatch(r"[-−]?\d", values[2]):
        unit += raised(values[2])
    return f"{shown if is_number(first.replace(',', '.')) else values[0]}\u00a0{unit}".strip()


def height(call: Call) -> str | None:
    """``{{Höhe|123|DE}}`` ▶ ``123 m``."""
    return f"{grouped(call.value('1'), call.language)}\u00a0m" if call.has("1") else None


def currency(call: Call) -> str | None:
    """``{{USD|10}}`` ▶ ``US$10``; without an amount the sign alone."""
    return f"{_BEFORE[call.name]}{call.text('1')}".strip()


def named_currency(call: Call) -> str | None:
    """``{{currency|10|EUR}}``."""
    code = call.value("2").lower()
    return f"{_BEFORE.get(code, code.upper() + ' ')}{call.text('1')}" if call.has("1") and code else None


def percentage(call: Call) -> str | None:
    """``{{percentage|1|3|1}}`` ▶ ``33.3%``."""
    part, whole, digits = call.value("1").replace(",", ""), call.value("2").replace(",", ""), call.value("3")
    if not (is_number(part) and is_number(whole)) or not float(whole):
        return None
    return (
        grouped(f"{float(part) / float(whole) * 100:.{int(digits) if digits.isdigit() else 0}f}", call.language) + "%"
    )


def ordinal(call: Call) -> str | None:
    """``{{ordinal|21}}`` ▶ ``21st``."""
    text = call.value("1")
    if not text.isdigit():
        return text or None
    ending = "th" if 10 <= int(text) % 100 <= 13 else {1: "st", 2: "nd", 3: "rd"}.get(int(text) % 10, "th")
    return text + ending


def roman(call: Call) -> str | None:
    """``{{roman|14}}`` ▶ ``XIV``."""
    text = call.value("1")
    if not text.isdigit() or not 0 < int(text) < 4000:
        return text or None
    left, shown = int(text), ""
    for size, letters in zip(
        (1000, 900, 500, 400, 100, 90, 50, 40, 10, 9, 5, 4, 1),
        ("M", "CM", "D", "CD", "C", "XC", "L", "XL", "X", "IX", "V", "IV", "I"),
        strict=True,
    ):
        shown += letters * (left // size)
        left %= size
    return shown


def formula(call: Call) -> str | None:
    """``{{chem|SO|4|2-}}`` ▶ ``SO4²⁻``."""
    parts = call.positional()
    return "".join(raised(part) if _PARTS_OF_FORMULA.fullmatch(plain(part)) else part for part in parts) or None


def accidental(call: Call) -> str | None:
    """``{{music|flat}}`` ▶ ``♭``."""
    return _ACCIDENTALS.get(call.value("1"))


def century(call: Call) -> str | None:
    """``{{s|XIX|e}}`` of the French Wikipedia ▶ ``XIXe siècle``."""
    return f"{call.text('1')}{call.text('2')}\u00a0siècle" if call.has("1") else None


def in_language(call: Call) -> str | None:
    """``{{lang-fr|chemin}}`` ▶ ``French: chemin`` in English; in other languages the words alone."""
    code = call.name.removeprefix("lang-").removeprefix("lang").strip()
    return _named(call, code, call.text("1", "text"), call.text("2", "translit"))


def in_named_language(call: Call) -> str | None:
    """``{{langx|fr|chemin}}`` ▶ ``French: chemin``."""
    return _named(call, call.value("1"), call.text("2", "text"), call.text("3", "translit"))


def transliteration(call: Call) -> str | None:
    """``{{transl|ar|ALA|words}}`` ▶ ``words``."""
    found = [text for text in call.positional() if text]
    return found[-1] if found else None


def _named(call: Call, code: str, words: str, other: str) -> str | None:
    if not words:
        return None
    name = _LANGUAGE_NAMES.get(code.partition("-")[0], "").replace("_", " ")
    label = f"{name}: " if name and call.language in ("en", "simple") and call.value("label", "links") != "no" else ""
    return f"{label}{words}{f', {other}' if other else ''}"


def _fraction(call: Call, line: str) -> str | None:
    parts = [part for part in call.positional() if part]
    if not parts:
        return line
    if len(parts) == 1:
        return f"1{line}{parts[0]}"
    return f"{parts[0]}{line}{parts[1]}" if len(parts) == 2 else f"{parts[0]} {parts[1]}{line}{parts[2]}"
