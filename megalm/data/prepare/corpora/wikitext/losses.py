"""Counts what of an article is not rendered."""

from __future__ import annotations

import re
from dataclasses import dataclass, field

from megalm.data.document import LeftOut

REFERENCE = "reference"
_ATTRIBUTE = (
    r"(?:style|class|width|align|colspan|rowspan|bgcolor|scope|valign|border|cellpadding|cellspacing)"
    r"\s*=\s*(?:\"[^\"\n]*\"|[\w#%-]+)"
)
_NOISE = re.compile(
    r"\x02\d+\x03|<!--.*?-->|<[^<>]*>|\{\|[^\n]*|\|-[^\n]*|\{\{[^{}|]*|\[\[[^\[\]|]*\||(?:https?:)?//[^\s|\]}]+"
    rf"|\|?[ \t]{{0,8}}\b{_ATTRIBUTE}|\|[^|={{}}\[\]\n]{{1,40}}=",
    re.DOTALL,
)
_WORD = re.compile(r"[^\W_]+(?:['’.,-][^\W_]+)*")


def count_words(text: str) -> int:
    """Words of a text: stretches of letters and digits, with what joins them."""
    return len(_WORD.findall(text))


def count_source_words(wikitext: str) -> int:
    """Words in wikitext: without tags, attributes, addresses, names of templates, of parameters and of link targets."""
    return count_words(_NOISE.sub(" ", wikitext))


@dataclass
class Losses:
    """What one article loses, by name."""

    kinds: dict[str, tuple[int, int]] = field(default_factory=dict)
    reference_words: int = 0

    def add(self, kind: str, wikitext: str, *, reference: bool = False) -> None:
        """Count something that is left out."""
        self.add_words(kind, count_source_words(wikitext), reference=reference)

    def add_words(self, kind: str, words: int, *, reference: bool = False) -> None:
        """Count something whose words are counted already."""
        times, before = self.kinds.get(kind, (0, 0))
        self.kinds[kind] = (times + 1, before + words)
        if reference:
            self.reference_words += words

    def left_out(self, prose: str) -> LeftOut:
        """The counts, beside the words that stay."""
        words = sum(count for _, count in self.kinds.values())
        return LeftOut(self.kinds, count_words(prose), words - self.reference_words)
