"""Takes comments and tags with contents of their own kind out of wikitext, as MediaWiki does before it parses.

So nothing inside a reference, a formula or a listing can lead the parser astray.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from megalm.data.prepare.corpora.wikitext.marks import STRIP_END, STRIP_START

SHOWN_AS_WRITTEN = frozenset({"nowiki", "pre", "syntaxhighlight", "source"})
FORMULAS = frozenset({"math", "chem", "ce"})
REFERENCES = frozenset({"ref", "references"})
OPEN_REFERENCE = "ref without an end"
NEVER_SHOWN = frozenset({"includeonly", "templatestyles", "section", "indicator", "templatedata"})
_TAKEN_OUT = frozenset(
    SHOWN_AS_WRITTEN
    | FORMULAS
    | REFERENCES
    | NEVER_SHOWN
    | {
        "poem",
        "gallery",
        "timeline",
        "score",
        "style",
        "script",
        "imagemap",
        "hiero",
        "graph",
        "mapframe",
        "maplink",
        "inputbox",
        "categorytree",
    }
)
_OPENING = re.compile(
    r"<!--|<(" + "|".join(sorted(_TAKEN_OUT, key=lambda name: (-len(name), name))) + r")(?=[\s/>])([^<>]*)>",
    re.IGNORECASE,
)
_CLOSING = {name: re.compile(rf"</{name}\s*>", re.IGNORECASE) for name in _TAKEN_OUT}
_AGAIN = {name: re.compile(rf"<{name}(?=[\s>])[^<>]*(?<!/)>", re.IGNORECASE) for name in _TAKEN_OUT}
_REST_OF_LINE = re.compile(r"[ \t]*\n")
_HEADING_LINE = re.compile(r"^==[^\n]*==[ \t]*$", re.MULTILINE)


@dataclass(frozen=True)
class Stripped:
    """A tag that was taken out.

    Attributes:
        name: of the tag, in lower case.
        attributes: as written.
        content: between its start and its end.
    """

    name: str
    attributes: str
    content: str


def strip(wikitext: str, stripped: list[Stripped]) -> str:
    """Wikitext without comments, and with numbers instead of tags; the tags are appended to ``stripped``."""
    kept: list[str] = []
    position = 0
    endless: set[str] = set()  # tags that no closing tag follows any more
    while (opening := _OPENING.search(wikitext, position)) is not None:
        if opening[1] is None:
            until, position_after = _comment(wikitext, position, opening.start())
            kept.append(wikitext[position:until])
            position = position_after
            continue
        kept.append(wikitext[position : opening.start()])
        name, attributes = opening[1].lower(), opening[2]
        content, position = _content(wikitext, opening, name, endless)
        if content is None:  # without an end: the tag alone goes, and what it would swallow stays
            if name != "ref":
                continue
            content, name = "", OPEN_REFERENCE
        kept.append(f"{STRIP_START}{len(stripped)}{STRIP_END}")
        stripped.append(Stripped(name, attributes, content))
    kept.append(wikitext[position:])
    return "".join(kept)


def _content(wikitext: str, opening: re.Match[str], name: str, endless: set[str]) -> tuple[str | None, int]:
    """What a tag holds, None if it has no end; and where the text goes on."""
    if opening[2].rstrip().endswith("/"):
        return "", opening.end()
    closing = None if name in endless else _CLOSING[name].search(wikitext, opening.end())
    if closing is None:
        endless.add(name)
        return None, opening.end()
    content = wikitext[opening.end() : closing.start()]
    # One end does not do for two starts or two sections; what is shown as written may hold one of these.
    signs = bool(_AGAIN[name].search(content)), bool(_HEADING_LINE.search(content))
    if all(signs) or (any(signs) and name not in SHOWN_AS_WRITTEN):
        return None, opening.end()
    return content, closing.end()


def _comment(wikitext: str, position: int, start: int) -> tuple[int, int]:
    """Where the text before a comment ends, and where it goes on; a comment that fills its lines goes with them."""
    end = wikitext.find("-->", start)
    inside = wikitext[start + 4 : end]
    if end < 0 or ("<!--" in inside and _HEADING_LINE.search(inside)):
        return start, start + 4  # without an end of its own: its mark alone goes
    end += 3
    line = wikitext.rfind("\n", 0, start) + 1
    rest = _REST_OF_LINE.match(wikitext, end)
    if rest is not None and line >= position and not wikitext[line:start].strip():
        return line, rest.end()
    return start, end
