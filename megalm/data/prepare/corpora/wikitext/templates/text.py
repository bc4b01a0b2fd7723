"""Templates that show their arguments, with little around them."""

from __future__ import annotations

import re
from collections.abc import Callable

from megalm.data.prepare.corpora.wikitext.marks import BREAK
from megalm.data.prepare.corpora.wikitext.templates.call import Call

_COLUMNS = re.compile(r"\d+(?:em)?")
"""How many columns a list has, or how wide they are."""
Shown = Callable[[Call], str | None]
"""What a template shows; None: it is left out, and counted."""


def argument(*keys: str) -> Shown:
    """The first of these arguments that is given; or all there is, where an equals sign made it look like a name."""
    return lambda call: call.text(*keys) if call.has(*keys) else call.only_argument()


def last_argument(call: Call) -> str | None:
    """The last one without a name, of two or more: ``{{lang|fr|mot}}``."""
    found = [text for text in call.positional() if text]
    return found[-1] if len(found) > 1 else None


def joined(separator: str) -> Shown:
    """All arguments without names."""
    return lambda call: separator.join(filter(None, call.positional())) or None


def literal(text: str) -> Shown:
    """The same for any arguments."""
    return lambda _: text


def enclosed(before: str, after: str) -> Shown:
    """The first argument with something around it; nothing without one."""
    return lambda call: f"{before}{call.text('1')}{after}" if call.has("1") else None


def lines(call: Call) -> str | None:
    """A list: each argument on a line of its own."""
    items = [text for text in call.positional() if text]
    if len(items) > 1 and _COLUMNS.fullmatch(items[0]):
        del items[0]
    return BREAK + "\n".join(items) + BREAK if items else None


def columns(call: Call) -> str | None:
    """``{{columns|col1=…|col2=…}}``: one after the other."""
    texts = [call.text(f"col{number}", str(number)) for number in range(1, 11)]
    return BREAK + "\n".join(filter(None, texts)) + BREAK if any(texts) else None


def spaces(_: Call) -> str:
    """White space, of which one is kept."""
    return " "


def quotation(call: Call) -> str | None:
    """A quotation in lines of its own, and who said it."""
    words = call.text(
        "text", "quote", "content", "quotetext", "texte", "texto", "zitat", "Text", "текст", "цитата", "testo", "treść",
        "citation", "cita", "tekst", "1",
    )  # fmt: skip
    if not words:
        return None
    by = [
        call.text("author", "sign", "by", "person", "character", "auteur", "autor", "Autor", "автор", "autore", "2"),
        call.text("source", "title", "Quelle", "fuente", "fonte", "источник", "bron", "3"),
    ]
    said = ", ".join(filter(None, by))
    return f"{BREAK}{words}{f'{BREAK}— {said}' if said else ''}{BREAK}"


def aligned_quotation(call: Call) -> str | None:
    """``{{rquote|right|words|author}}``."""
    words = call.text("2", "text", "quote")
    said = ", ".join(filter(None, (call.text("3", "author"), call.text("4", "source"))))
    return f"{BREAK}{words}{f'{BREAK}— {said}' if said else ''}{BREAK}" if words else None


def nihongo(call: Call) -> str | None:
    """``{{nihongo|English|kanji|rōmaji|extra|extra2}}`` ▶ ``English (kanji, rōmaji, extra) extra2``."""
    english, kanji, romaji = call.text("1"), call.text("2"), call.text("3")
    extra, after = call.text("4", "extra"), call.text("5", "extra2")
    if not english:
        english, romaji = romaji, ""
    inside = ", ".join(filter(None, (kanji, romaji, extra)))
    text = f"{english} ({inside})" if english and inside else english or inside
    return f"{text} {after}".strip() or None


def nihongo_romaji_first(call: Call) -> str | None:
    """``{{nihongo3|English|kanji|rōmaji}}`` ▶ ``rōmaji (kanji, English)``."""
    english, kanji, romaji = call.text("1"), call.text("2"), call.text("3")
    inside = ", ".join(filter(None, (kanji, english, call.text("4"))))
    return f"{romaji} ({inside})" if romaji and inside else romaji or inside or None


def chinese(call: Call) -> str | None:
    """``{{zh|s=…|t=…|p=…}}`` ▶ ``Chinese: …; pinyin: …``."""
    labels = {
        "c": "Chinese", "s": "simplified Chinese", "t": "traditional Chinese", "hp": "pinyin", "p": "pinyin",
        "tp": "Tongyong Pinyin", "w": "Wade–Giles", "j": "Jyutping", "cy": "Cantonese Yale", "poj": "Pe̍h-ōe-jī",
        "l": "lit.",
    }  # fmt: skip
    found = [(label, call.text(key)) for key, label in labels.items() if call.has(key)]
    if not found:
        return call.text("1") or None
    if call.value("labels") == "no":
        return ", ".join(text for _, text in found)
    return "; ".join(f"{label}: {text}" for label, text in found)


def sic(call: Call) -> str | None:
    """``{{sic|…}}``: words as their author wrote them, and the note that they are."""
    words = call.text("1") + call.text("2")
    if call.has("hide", "nolink"):
        return words or None
    return f"{words} [sic]".strip()


def other_language_link(call: Call) -> str | None:
    """A link to an article that only another language has."""
    return call.text("lt", "display", "text", "texte", "1", "en", "fr", "de") or None


def ship(call: Call) -> str | None:
    """``{{USS|Enterprise|CVN-65}}`` ▶ ``USS Enterprise (CVN-65)``; ``{{ship|HMS|Hood|51}}`` names its prefix."""
    named = call.name == "ship"
    prefix = call.text("1") if named else call.written_name.strip()
    name, hull, form = (call.text(str(key + named)) for key in (1, 2, 3))
    if not name:
        return None
    text = name if form == "6" else f"{prefix} {name}".strip()
    return f"{text} ({hull})" if hull and not form else hull if form in ("3", "4") and hull else text


def last_name_after_first(call: Call) -> str | None:
    """``{{sortname|First|Last}}``."""
    return " ".join(filter(None, call.positional()[:2])) or None


def link_text(call: Call) -> str | None:
    """``{{URL|example.org|label}}``."""
    return call.text("2", "1") or None


def not_translated(call: Call) -> str | None:
    """A link to an article that is still to be translated: its label, or else its name."""
    return call.text("2", "текст", "1", "есть") or None


def french_quotation(call: Call) -> str | None:
    """``{{citation|…}}`` of the French Wikipedia."""
    return enclosed("«\u00a0", "\u00a0»")(call)
