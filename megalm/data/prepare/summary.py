"""What came of preparing a corpus: counts that the console, ``recipe.json`` and the data card tell alike. No torch."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from megalm.data.names import shown
from megalm.data.prepare.left_out import SHARE, LeftOutTotals
from megalm.data.prepare.recipe import Recipe
from megalm.data.shards.index import Index
from megalm.data.shards.row_counts import RowCounts
from megalm.data.tally import FileTally

_BINS_PER_DOUBLING = 4
_DOUBLINGS = 40
LISTED_KINDS = 1000
"""Names of what was left out that the files of a dataset list, those with most words first; the total counts all."""


@dataclass(frozen=True)
class Lengths:
    """How long documents are, in bins that grow by a quarter of a doubling: a histogram of bounded size.

    Attributes:
        counts: [160], documents of 2^(i/4) up to 2^((i+1)/4) tokens.
    """

    counts: NDArray[np.int64] = field(default_factory=lambda: np.zeros(_BINS_PER_DOUBLING * _DOUBLINGS, dtype=np.int64))

    def add(self, lengths: NDArray[np.int64]) -> None:
        """Count some documents."""
        bins = np.floor(np.log2(np.maximum(lengths, 1)) * _BINS_PER_DOUBLING).astype(np.int64)
        self.counts[:] += np.bincount(bins, minlength=self.counts.size)[: self.counts.size]

    @property
    def edges(self) -> NDArray[np.float64]:
        """[161], tokens at which bins begin and end."""
        return np.exp2(np.arange(self.counts.size + 1) / _BINS_PER_DOUBLING)

    def quantile(self, share: float) -> float:
        """Tokens below which this share of documents is, to within a bin."""
        total = int(self.counts.sum())
        if total == 0:
            return 0.0
        return float(self.edges[int(np.searchsorted(np.cumsum(self.counts), share * total)) + 1])


@dataclass(frozen=True)
class Summary:
    """One finished preparation.

    Attributes:
        source: the corpus, in words.
        recipe: what was done to it.
        read: documents that were read.
        documents: documents that stayed.
        bytes: text that was read.
        text_bytes: text that stayed, after cleaning.
        tokens: of the documents that stayed, end-of-document tokens included.
        removed: how many documents each rule removed.
        notes: how often something was changed in documents.
        left_out: what the corpus's reader left out of documents.
        examples: by rule, the first documents that it removed.
        files: files that were read; 0 where a library reads them.
        file_bytes: their size on disk.
        files_left_out: files that were not read, by reason.
        lengths: tokens per document.
        tokenizer_sha256: hash of the tokenizer.
        vocab_size: of the tokenizer.
        document_start: tokens that begin every document.
        document_end: the token that ends every document.
        splits: index of each split.
        rows: rows of each split, and those with nothing to learn, where not every token carries loss.
        validation: the same of a validation corpus of its own; None: there is none.
    """

    source: str
    recipe: Recipe
    read: int
    documents: int
    bytes: int
    text_bytes: int
    tokens: int
    removed: dict[str, int]
    notes: dict[str, int]
    left_out: LeftOutTotals
    examples: dict[str, list[str]]
    files: int
    file_bytes: int
    files_left_out: FileTally
    lengths: Lengths
    tokenizer_sha256: str
    vocab_size: int
    document_start: tuple[str, ...]
    document_end: str
    splits: dict[str, Index]
    rows: dict[str, RowCounts] = field(default_factory=dict)
    validation: Summary | None = None

    def to_dict(self) -> dict[str, Any]:
        """Contents of ``recipe.json`` and ``data_card.json``."""
        contents = {
            name: getattr(self, name)
            for name in (
                "source",
                "read",
                "documents",
                "bytes",
                "text_bytes",
                "tokens",
                "removed",
                "notes",
                "examples",
                "files",
                "file_bytes",
                "tokenizer_sha256",
                "vocab_size",
                "document_start",
                "document_end",
            )
        }
        splits: dict[str, dict[str, Any]] = {
            split: {
                "documents": index.documents,
                "tokens": index.tokens,
                "loss_tokens": index.loss_tokens,
                "shards": index.num_shards,
                "fingerprint": index.fingerprint,
            }
            for split, index in self.splits.items()
        }
        for split, rows in self.rows.items():
            splits[split]["rows"] = {
                str(length): {"rows": rows.rows[length], "nothing_to_learn": rows.empty[length]}
                for length in rows.lengths
            }
        if self.left_out.kinds:
            contents["left_out"] = self._left_out()
        files = self.files_left_out.to_dict()
        if self.validation is not None:
            own = self.validation.to_dict()
            contents["validation_corpus"] = {name: own[name] for name in own if name not in _OF_THE_DATASET}
        return {**contents, "files_left_out": files, "splits": splits, "recipe": _printable(asdict(self.recipe))}

    def _left_out(self) -> dict[str, Any]:
        return {
            "words": self.left_out.words,
            "kinds": [
                {"name": name, "times": times, "words": words}
                for name, times, words in self.left_out.by_words()[:LISTED_KINDS]
            ],
            "names": len(self.left_out.kinds),
            "over_share": SHARE,
            "documents_over_share": self.left_out.over,
            "documents": [
                {"name": name, "words_kept": kept, "words_left_out": lost, "mostly": mostly}
                for name, kept, lost, mostly in self.left_out.documents
            ],
        }


_OF_THE_DATASET = frozenset({"tokenizer_sha256", "vocab_size", "document_start", "document_end", "splits", "recipe"})
"""What a summary says of the whole dataset, and need not say again of a validation corpus."""


def _printable(value: Any) -> Any:
    """Settings without the bytes of file names that are no UTF-8."""
    if isinstance(value, dict):
        return {name: _printable(inner) for name, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_printable(inner) for inner in value]
    return shown(value) if isinstance(value, str) else value
