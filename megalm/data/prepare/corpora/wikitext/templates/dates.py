"""Templates that show dates."""

from __future__ import annotations

import re

from megalm.data.prepare.corpora.wikitext.templates.call import Call
from megalm.data.prepare.corpora.wikitext.templates.text import Shown

_MONTHS = {
    "en": "January February March April May June July August September October November December",
    "de": "Januar Februar März April Mai Juni Juli August September Oktober November Dezember",
    "fr": "janvier février mars avril mai juin juillet août septembre octobre novembre décembre",
    "es": "enero febrero marzo abril mayo junio julio agosto septiembre octubre noviembre diciembre",
    "it": "gennaio febbraio marzo aprile maggio giugno luglio agosto settembre ottobre novembre dicembre",
    "pt": "janeiro fevereiro março abril maio junho julho agosto setembro outubro novembro dezembro",
    "nl": "januari februari maart april mei juni juli augustus september oktober november december",
    "pl": "stycznia lutego marca kwietnia maja czerwca lipca sierpnia września października listopada grudnia",
    "ru": "января февраля марта апреля мая июня июля августа сентября октября ноября декабря",
    "uk": "січня лютого березня квітня травня червня липня серпня вересня жовтня листопада грудня",
    "bg": "януари февруари март април май юни юли август септември октомври ноември декември",
    "sv": "januari februari mars april maj juni juli augusti september oktober november december",
}


def date(call: Call) -> str | None:
    """``{{birth date|1990|1|2}}`` ▶ ``January 2, 1990``; a date that is written as text stays."""
    values = call.values()
    if not values or not values[0]:
        return call.text("date") or None
    if not values[0].lstrip("-").isdigit() or (len(values) > 1 and not values[1].isdigit()):
        return " ".join(filter(None, call.positional()))
    return written(*values[:3], language=call.language, day_first=call.value("df") in ("y", "yes", "1"))


def death_date_and_age(call: Call) -> str | None:
    """``{{death date and age|2000|3|4|1920|1|2}}`` ▶ ``March 4, 2000 (aged 80)``."""
    values = call.values()
    shown = date(call)
    if shown is None or len(values) < 6 or not all(value.isdigit() for value in values[:6]):
        return shown
    years = _years(*(int(value) for value in (*values[3:6], *values[:3])))
    return f"{shown} (aged\u00a0{years})" if call.language == "en" else shown


def age(call: Call) -> str | None:
    """Years between two dates; of one alone nothing can be said without today's."""
    values = call.values()
    if len(values) < 6 or not all(value.isdigit() for value in values[:6]):
        return None
    return str(_years(*(int(value) for value in values[:6])))


def as_of(call: Call) -> str | None:
    """``{{as of|2010|1}}`` ▶ ``As of January 2010``."""
    if call.has("alt"):
        return call.text("alt")
    shown = date(call)
    if shown is None:
        return None
    since = call.has("since")
    words = "since" if since else "as of"
    return f"{words if call.has('lc') else words.capitalize()} {shown}"


def circa(call: Call) -> str:
    """``{{circa|1900|1910}}`` ▶ ``c. 1900 – c. 1910``; without a year the word alone."""
    values = [text for text in call.positional() if text]
    word = {"de": "ca.", "fr": "vers", "es": "c.", "bg": "ок.", "ru": "ок.", "nl": "ca.", "sv": "ca"}.get(
        call.language, "c."
    )
    return " – ".join(f"{word}\u00a0{value}" for value in values) or word


def years(word: str) -> Shown:
    """``fl. 1900–1910`` and ``r. 1900–1910``."""

    def shown(call: Call) -> str | None:
        values = [text for text in call.positional() if text][:2]
        return f"{word}\u00a0{'–'.join(values)}" if values else None

    return shown


def day_month_year(call: Call) -> str | None:
    """``{{date|1|janvier|2000}}`` ▶ ``1 janvier 2000``; numbers of months become names."""
    values = call.values()[:3]
    if len(values) == 3 and all(value.isdigit() for value in values):
        year, day = (values[0], values[2]) if len(values[0]) == 4 else (values[2], values[0])
        return written(year, values[1], day, language=call.language)
    return " ".join(filter(None, values)) or None


def written(year: str, month: str = "", day: str = "", *, language: str, day_first: bool = False) -> str:
    """A date in words."""
    names = _MONTHS.get(language, _MONTHS["en"]).split()
    if not month.isdigit() or not 1 <= int(month) <= 12:
        return year
    name = names[int(month) - 1]
    if not re.fullmatch(r"\d{1,2}", day):
        return f"{name} {year}"
    if language in ("es", "pt"):
        return f"{int(day)} de {name} de {year}"
    if language == "de":
        return f"{int(day)}. {name} {year}"
    return (
        f"{int(day)} {name} {year}"
        if day_first or (language in _MONTHS and language != "en")
        else f"{name} {int(day)}, {year}"
    )


def _years(year: int, month: int, day: int, to_year: int, to_month: int, to_day: int) -> int:
    return to_year - year - ((to_month, to_day) < (month, day))
