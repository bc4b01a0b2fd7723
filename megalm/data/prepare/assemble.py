"""Blocks ▶ splits: which documents stay, where they go, and what became of all of them. No torch."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field

import numpy as np

from megalm.data.document import Corpus
from megalm.data.prepare.blocks import BlockResult
from megalm.data.prepare.corpora.files import finer_split
from megalm.data.prepare.corpora.options import NO_FIELD, how_to_name_fields
from megalm.data.prepare.duplicates import Duplicates
from megalm.data.prepare.left_out import LeftOutTotals
from megalm.data.prepare.packing import BestFitPacker, Row
from megalm.data.prepare.recipe import Recipe
from megalm.data.prepare.summary import Lengths, Summary
from megalm.data.shards.index import Index
from megalm.data.shards.write import ShardWriter
from megalm.data.tally import EXAMPLES, FileTally
from megalm.data.tokenization.tokenizer import Tokenizer

EXACT_ACROSS = "exact duplicate of a validation document"
ALSO_IN_VALIDATION = "also in validation (kept; --dedup exact removes them)"


def nothing_left(recipe: Recipe, corpus: Corpus, totals: Totals, *, option: str = "--input") -> str:
    """Why there is no document, with what stood in the way of each."""
    fieldless = [rule for rule in totals.removed if rule.startswith(NO_FIELD)]
    reasons = [
        f"{n} {rule}, such as {totals.examples[rule][0]}" if rule in fieldless else f"{n} {rule}"
        for rule, n in totals.removed.most_common()
    ]
    left_out = FileTally(corpus.files_left_out.to_dict())
    left_out.update(totals.files)
    if left_out.total():
        reasons.append(f"files left out: {left_out.line()}")
    why = ", ".join(reasons) or "none was found"
    rights = [how_to_name_fields(recipe.corpus)] if fieldless else []
    if len(fieldless) < max(len(reasons), 1):
        rights.append(f"give other {option} or fewer filters")
    return f"{corpus.source}: no document is left ({why}); {', or '.join(rights)}"


def empty_split(recipe: Recipe, corpus: Corpus, documents: int, split: str) -> str:
    """What to say where none of some documents falls into a split."""
    finer = finer_split(corpus, recipe.options) if recipe.corpus == "text" else ""
    other = "smaller" if split == "train" else "larger"
    rights = [finer] if finer else []
    if documents >= 10:
        rights.append(f"a {other} fraction or more documents would fill it")
    elif not finer:
        rights.append("more documents would fill it")
    rights.append("--val-fraction 0 trains on all of them, and --val-input takes validation documents from elsewhere")
    what = "the only document does not fall" if documents == 1 else f"none of the {documents:,} documents falls"
    return f"--val-fraction {recipe.val_fraction}: {what} into {split}; {'; '.join(rights)}"


@dataclass
class SplitWriter:
    """One split being written, packed or not."""

    writer: ShardWriter
    packer: BestFitPacker | None
    has_open_rows: bool = False

    def add(self, block: BlockResult, chosen: np.ndarray) -> None:
        """Append the chosen documents of a block."""
        if not chosen.any():
            return
        if self.packer is not None:
            self._pack(block, chosen)
            return
        of_chosen = np.repeat(chosen, block.lengths)
        mask = None if block.mask is None else block.mask[of_chosen]
        names = [name for name, taken in zip(block.names, chosen.tolist(), strict=True) if taken]
        self.writer.add(block.tokens[of_chosen], block.lengths[chosen].tolist(), names, mask)

    def close(self) -> Index:
        """Write what is left."""
        if self.packer is not None:
            self._write(self.packer.close())
        return self.writer.close()

    def _pack(self, block: BlockResult, chosen: np.ndarray) -> None:
        assert self.packer is not None
        ends = np.cumsum(block.lengths)
        for document in np.flatnonzero(chosen).tolist():
            part = slice(int(ends[document] - block.lengths[document]), int(ends[document]))
            mask = None if block.mask is None else block.mask[part]
            self._write(self.packer.add(block.tokens[part], mask, block.names[document]))
            self.has_open_rows = True

    def _write(self, rows: Iterator[Row]) -> None:
        for row in rows:
            self.writer.add(row.tokens, row.lengths, row.names, row.mask, documents=row.documents)


class ValidationTexts:
    """Hashes of the documents of a validation corpus; a set in memory, since such a corpus is small."""

    def __init__(self) -> None:
        self._digests: set[bytes] = set()

    def add(self, block: BlockResult, kept: np.ndarray) -> None:
        """Remember the documents of a block that stay."""
        self._digests.update(block.digests[document].tobytes() for document in np.flatnonzero(kept).tolist())

    def has(self, digest: bytes) -> bool:
        """Whether a validation document has this text."""
        return digest in self._digests


@dataclass
class Totals:
    """What became of all documents.

    Attributes:
        pack: tokens of the sequences that documents are fitted into; 0: into none, so that none is too long.
    """

    pack: int = 0
    read: int = 0
    documents: int = 0
    bytes: int = 0
    text_bytes: int = 0
    tokens: int = 0
    removed: Counter[str] = field(default_factory=Counter)
    notes: Counter[str] = field(default_factory=Counter)
    left_out: LeftOutTotals = field(default_factory=LeftOutTotals)
    examples: dict[str, list[str]] = field(default_factory=dict)
    files: FileTally = field(default_factory=FileTally)
    lengths: Lengths = field(default_factory=Lengths)

    def add(self, block: BlockResult, duplicates: Duplicates | None, validation: ValidationTexts) -> np.ndarray:
        """Count a block; [D], which of its documents stay.

        Args:
            block: what became of it.
            duplicates: of the documents so far; None: duplicates stay.
            validation: texts of a validation corpus, which training documents are compared with.
        """
        self.read += block.read
        self.bytes += block.bytes
        self.removed.update(block.removed)
        self.notes.update(block.notes)
        self.left_out.merge(LeftOutTotals.from_dict(block.left_out))
        self.files.update(FileTally(block.files))
        for removed_by, names in block.examples.items():
            examples = self.examples.setdefault(removed_by, [])
            examples += names[: EXAMPLES - len(examples)]
        kept = np.ones(len(block.names), dtype=bool)
        for document in range(len(block.names)) if block.digests.size or block.bands.size else ():
            digest = block.digests[document].tobytes()
            across = validation.has(digest)
            rule = None if duplicates is None else duplicates.rule(digest, block.bands[document].tolist())
            if rule is not None:
                kept[document] = False
                self.removed[EXACT_ACROSS if across else rule] += 1
            elif across:
                self.notes[ALSO_IN_VALIDATION] += 1
        self.documents += int(kept.sum())
        self.tokens += int(block.lengths[kept].sum())
        self.text_bytes += int(block.text_bytes[kept].sum())
        self.lengths.add(block.lengths[kept])
        cut = int((block.lengths[kept] > self.pack).sum()) if self.pack else 0
        if cut:
            self.notes[f"longer than --pack {self.pack}, cut into pieces that do not see one another"] += cut
        return kept

    def summary(self, corpus: Corpus, recipe: Recipe, tokenizer: Tokenizer, indexes: dict[str, Index]) -> Summary:
        """What the data card tells."""
        unread = self.files.total()
        unread_bytes = sum(reason.bytes for _, reason in self.files.items())
        left_out = FileTally(corpus.files_left_out.to_dict())
        left_out.update(self.files)
        return Summary(
            source=corpus.source,
            recipe=recipe,
            read=self.read,
            documents=self.documents,
            bytes=self.bytes,
            text_bytes=self.text_bytes,
            tokens=self.tokens,
            removed=dict(self.removed.most_common()),
            notes=dict(self.notes.most_common()),
            left_out=self.left_out,
            examples=self.examples,
            files=max(corpus.num_files - unread, 0),
            file_bytes=max(corpus.total_bytes - unread_bytes, 0) if corpus.num_files else 0,
            files_left_out=left_out,
            lengths=self.lengths,
            tokenizer_sha256=tokenizer.sha256,
            vocab_size=tokenizer.vocab_size,
            document_start=tokenizer.roles.before,
            document_end=tokenizer.roles.end,
            splits=indexes,
        )
