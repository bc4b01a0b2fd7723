"""What readers of a corpus leave out of documents, counted by name: in memory that does not grow with the corpus.

The counts depend on the documents and their order alone, never on how many processes read them: blocks are counted
where they are read, and the counts are added up in the order of the corpus. No torch.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from megalm.data.document import LeftOut

NAMES = 65_536
"""Names that are counted one by one: the first of the corpus; later ones are counted together."""
OTHERS = "(all other names)"
LONGEST_NAME = 80
SHARE = 0.5
"""A document that loses a larger share of its words than this is listed."""
LISTED = 100
"""Documents in the list: those that lose most words."""


@dataclass
class LeftOutTotals:
    """Counts over many documents.

    Attributes:
        kinds: by name, how often something was left out and how many words it had.
        over: documents that lose more than :data:`SHARE` of their words.
        documents: of those, the ones that lose most: (name, words kept, words lost, what most of them are).
    """

    kinds: dict[str, tuple[int, int]] = field(default_factory=dict)
    over: int = 0
    documents: list[tuple[str, int, int, str]] = field(default_factory=list)

    def add(self, name: str, left_out: LeftOut) -> None:
        """Count what one document lost."""
        self._add_kinds(left_out.kinds)
        if left_out.share > SHARE:
            self.over += 1
            most = max(left_out.kinds, key=lambda kind: (left_out.kinds[kind][1], kind), default="")
            self._list([(name, left_out.kept_words, left_out.lost_words, most[:LONGEST_NAME])])

    def merge(self, other: LeftOutTotals) -> None:
        """Count what the documents of a later block lost."""
        self._add_kinds(other.kinds)
        self.over += other.over
        self._list(other.documents)

    @property
    def words(self) -> int:
        """All words that were left out."""
        return sum(words for _, words in self.kinds.values())

    def by_words(self) -> list[tuple[str, int, int]]:
        """(name, how often, words), most words first."""
        rows = [(name, times, words) for name, (times, words) in self.kinds.items()]
        return sorted(rows, key=lambda row: (-row[2], -row[1], row[0]))

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        return {"kinds": self.kinds, "over": self.over, "documents": self.documents}

    @classmethod
    def from_dict(cls, contents: Mapping[str, Any]) -> LeftOutTotals:
        """What :meth:`to_dict` gave."""
        kinds = {name: (int(times), int(words)) for name, (times, words) in contents["kinds"].items()}
        return cls(kinds, int(contents["over"]), [(n, k, lost, most) for n, k, lost, most in contents["documents"]])

    def _add_kinds(self, kinds: Mapping[str, tuple[int, int]]) -> None:
        for kind, (times, words) in kinds.items():
            known = kind[:LONGEST_NAME]
            name = known if known in self.kinds or len(self.kinds) < NAMES else OTHERS
            before = self.kinds.get(name, (0, 0))
            self.kinds[name] = (before[0] + times, before[1] + words)

    def _list(self, documents: list[tuple[str, int, int, str]]) -> None:
        self.documents = sorted([*self.documents, *documents], key=lambda one: (-one[2], one[0]))[:LISTED]
