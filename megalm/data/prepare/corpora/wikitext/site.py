"""What a dump says of its wiki: its language and the names of its namespaces."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from itertools import chain

from megalm.data.prepare.corpora.wikitext.names import CATEGORY_NAMES, FILE_NAMES, REDIRECTS

_FILE, _MEDIA, _TEMPLATE, _CATEGORY = 6, -2, 10, 14
_REDIRECT = re.compile(r"\s*#\s*([^\W\d][\w -]*?)\s*:?\s*\[\[[^\[\]\n]+\]\]")


@dataclass(frozen=True)
class Site:
    """A wiki.

    Attributes:
        language: code of its language; empty: not known.
        files: names, in :func:`normalised` form, of the namespace of pictures and sounds.
        categories: of the namespace of categories.
        media: of links to a file itself.
        templates: of the namespace of templates.
    """

    language: str
    files: frozenset[str]
    categories: frozenset[str]
    media: frozenset[str]
    templates: frozenset[str]

    @classmethod
    def of(cls, language: str = "", namespaces: Iterable[tuple[int, str]] = ()) -> Site:
        """A wiki from its language and what its dump calls its namespaces (number, name).

        English names work in every wiki, and old names in that of their language; where it is not known, all do.
        """
        names: dict[int, set[str]] = {_FILE: set(), _MEDIA: {"media"}, _TEMPLATE: {"template"}, _CATEGORY: set()}
        for number, name in namespaces:
            if number in names and name:
                names[number].add(normalised(name))
        code = language.lower().split("-")[0]
        for number, known in ((_FILE, FILE_NAMES), (_CATEGORY, CATEGORY_NAMES)):
            aliases = (*known[""], *known.get(code, ())) if code else chain.from_iterable(known.values())
            names[number].update(map(normalised, aliases))
        return cls(language, *(frozenset(names[n]) for n in (_FILE, _CATEGORY, _MEDIA, _TEMPLATE)))


def normalised(name: str) -> str:
    """A name as wikis compare it: without case, underscores as spaces."""
    return " ".join(name.replace("_", " ").casefold().split())


def is_redirect(wikitext: str) -> bool:
    """Whether a page only leads to another: ``#``, the word for it in any of many languages, and a link.

    A word that is not known counts too if nothing but links to categories or templates follows.
    """
    match = _REDIRECT.match(wikitext)
    if match is None:
        return False
    rest = re.sub(r"\[\[[^\[\]]*:[^\[\]]*\]\]|\{\{[^{}]*\}\}|<!--.*?-->", "", wikitext[match.end() :], flags=re.DOTALL)
    return match[1].casefold() in REDIRECTS or (" " not in match[1] and match[1].isupper() and not rest.strip())
