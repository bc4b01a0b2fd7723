"""Functions and variables of MediaWiki's parser: ``{{formatnum:1234}}``, ``{{PAGENAME}}``."""

from __future__ import annotations

from megalm.data.prepare.corpora.wikitext.losses import REFERENCE
from megalm.data.prepare.corpora.wikitext.marks import GAP, plain
from megalm.data.prepare.corpora.wikitext.names import words
from megalm.data.prepare.corpora.wikitext.templates.call import Call
from megalm.data.prepare.corpora.wikitext.templates.expressions import evaluated
from megalm.data.prepare.corpora.wikitext.templates.numbers import grouped, ungrouped

_SHOW_NOTHING = words(
    """
    defaultsort defaultsortkey defaultcategorysort displaytitle sortierung tri clé_de_tri ordenar sortkey
    noexternallanglinks #seo #coordinates
    """
)
_PAGE_NAMES = words(
    """
    pagename fullpagename basepagename subpagename articlepagename subjectpagename seitenname nompage nombredepagina
    nombredepágina название_страницы имястраницы paginanaam nazwastrony
    """
)
_FORMAT_NUMBER = frozenset({"formatnum", "zahlenformat", "formatnombre", "formatonúmero", "форматироватьчисло"})
_CASES = {
    "lc": str.lower,
    "uc": str.upper,
    "lcfirst": lambda text: text[:1].lower() + text[1:],
    "ucfirst": lambda text: text[:1].upper() + text[1:],
}


def function(call: Call, name: str, argument: str) -> str | None:  # noqa: PLR0911 - one line per kind
    """What a function shows; None: it is no function.

    Args:
        call: of the function.
        name: before the colon, in lower case; or all there is.
        argument: rendered text after the colon.
    """
    name = name.replace(" ", "_")
    if name in _PAGE_NAMES:
        return argument or call.title
    if name in _SHOW_NOTHING:
        return GAP
    if name in _FORMAT_NUMBER:
        return _format_number(call, plain(argument))
    if name in _CASES:
        return str(_CASES[name](argument))
    if name == "#tag":
        return _tag(call, plain(argument).lower())
    if name == "#if":
        return call.text("1") if plain(argument) else call.text("2")
    if name == "#expr":
        return evaluated(plain(argument))
    if name == "#switch":
        return _switch(call, plain(argument))
    if name == "#ifeq":
        return call.text("2") if plain(argument) == call.value("1") else call.text("3")
    if name in ("padleft", "padright", "plural", "grammar", "int", "urlencode", "anchorencode", "#language"):
        return argument or GAP
    return None


def _format_number(call: Call, number: str) -> str:
    how = call.value("1").upper()
    if how == "R":
        return ungrouped(number, call.language)
    if how == "NOSEP":
        return number
    return grouped(number, call.language)


def _switch(call: Call, subject: str) -> str:
    """The value of the first case that the subject is; cases without a value share that of the next."""
    matches, default = False, ""
    for name, written, named in call.raw():
        case = name if named else written.strip()
        matches = matches or case == subject
        if named and matches:
            return call.text(name)
        if named and case == "#default":
            default = call.text(name)
    last = call.raw()[-1:]
    return default or (call.text(last[0][0]) if last and not last[0][2] else "")


def _tag(call: Call, tag: str) -> str:
    if tag in ("ref", "references"):
        return call.leave_out(REFERENCE, reference=True)
    if tag in ("nowiki", "poem", "span", "div", "code", "small", "math"):
        return call.text("1")
    return call.leave_out(f"tag: {tag}")
