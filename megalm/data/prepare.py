"""Corpus ▶ token shards, split into training and validation.

In two passes. First any number of workers clean and tokenise blocks of the corpus, each into a file of its own; then
those files are put together in the order of the corpus: duplicates removed, documents shared out to the splits, shards
written. So the output is the same to the last byte for any number of workers, a preparation that was cut off goes on
with the blocks that are missing, and memory holds a few blocks. The blocks take as much disk as the dataset, until it
is complete. A dataset appears in one rename; what a killed preparation leaves behind is not mistaken for one.
"""

from __future__ import annotations

import json
import shutil
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path

import numpy as np

from megalm.data.blocks import CONVERSATIONS, BlockResult, Work, texts_of_block, tokenise_block
from megalm.data.card import write_card
from megalm.data.dataset import SPLITS, TOKENIZER_FILE, partial_folder
from megalm.data.document import Block, Corpus
from megalm.data.duplicates import Duplicates
from megalm.data.executors import Workers
from megalm.data.index import Index
from megalm.data.left_out import LeftOutTotals
from megalm.data.packing import BestFitPacker, Row
from megalm.data.recipe import Recipe
from megalm.data.settings_files import TEMPLATE_FILE
from megalm.data.shard_writer import ShardWriter, write_durably
from megalm.data.summary import Lengths, Summary
from megalm.data.tally import EXAMPLES, FileTally
from megalm.data.tokenizer import Tokenizer
from megalm.data.tokenizer_training import train_byte_level_bpe, train_wordpiece
from megalm.errors import DataError

RECIPE_FILE = "recipe.json"
TOKENIZER_TRAINING_BYTES = 64 * 2**20
"""A tokenizer hardly changes with more text than this, but its training takes memory in proportion."""
_SIGNATURE_FILE = "signature"
_BLOCKS_FOLDER = "blocks"
_MIN_BLOCK_BYTES, _MAX_BLOCK_BYTES, _BLOCKS_PER_CORPUS = 2**19, 2**26, 4096
"""A block's size follows from the corpus alone, never from the workers: it would otherwise be other blocks."""


@dataclass
class Done:
    """How far one pass is.

    Attributes:
        total: bytes of the corpus's files, or blocks.
        done: of them, so far.
        documents: so far.
        tokens: so far.
        resumed: what was there already, which tells nothing of speed.
        in_bytes: whether bytes are counted, or blocks.
    """

    total: int
    done: int = 0
    documents: int = 0
    tokens: int = 0
    resumed: int = 0
    in_bytes: bool = True


Progress = Callable[[str, Done], None]
"""(what is being done, how far it is)"""


def prepare(
    recipe: Recipe, out: Path, *, workers: Workers, overwrite: bool, progress: Progress, command: str
) -> Summary | None:
    """Write the dataset ``out``; None if it is there already, made by the same recipe from the same files.

    Args:
        recipe: the corpus and what is done to it.
        out: the dataset's folder.
        workers: where blocks are worked on; they see the same files.
        overwrite: replace a dataset that was made differently.
        progress: called now and then.
        command: the command line, for the data card.

    Raises:
        DataError: the corpus or the tokenizer cannot be read, a split would be empty, or ``out`` holds something else.
    """
    corpus = recipe.open_corpus()
    signature = recipe.signature(corpus)
    if out.exists() and not overwrite:
        if _recorded_signature(out) == signature:
            return None
        raise DataError(
            f"{out}: exists and was made from other files or with other settings; --overwrite replaces it, "
            "another --out keeps it"
        )
    if out.exists() and not (out / RECIPE_FILE).is_file():
        raise DataError(f"{out}: exists and is no prepared dataset, so --overwrite leaves it alone; remove it yourself")
    folder = _resumable_folder(out, signature)
    preparation = _Preparation(recipe, corpus, folder, workers, progress)
    summary = preparation.run()
    write_card(folder, recipe, summary, command)
    record = {"signature": signature, "command": command, **summary.to_dict()}
    write_durably(folder / RECIPE_FILE, (json.dumps(record, indent=1) + "\n").encode())
    shutil.rmtree(folder / _BLOCKS_FOLDER)
    (folder / _SIGNATURE_FILE).unlink()
    _put_in_place(folder, out)
    return summary


def _resumable_folder(out: Path, signature: str) -> Path:
    """The unfinished preparation of the same dataset, or a new one."""
    folder = partial_folder(out)
    try:
        unfinished = (folder / _SIGNATURE_FILE).read_text(encoding="utf-8")
    except OSError:
        unfinished = None
    if unfinished != signature:
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        write_durably(folder / _SIGNATURE_FILE, signature.encode())
    for split in SPLITS:  # putting blocks together starts anew: it is a small part of the work
        shutil.rmtree(folder / split, ignore_errors=True)
    return folder


def _put_in_place(folder: Path, out: Path) -> None:
    """Two renames: ``out`` never holds half a dataset, and the old one goes only when the new one is whole."""
    replaced = out.with_name(f".{out.name}.replaced")
    shutil.rmtree(replaced, ignore_errors=True)
    if out.exists():
        out.rename(replaced)
    folder.rename(out)
    shutil.rmtree(replaced, ignore_errors=True)


@dataclass(frozen=True)
class _Preparation:
    """One preparation in its folder."""

    recipe: Recipe
    corpus: Corpus
    folder: Path
    workers: Workers
    progress: Progress

    def run(self) -> Summary:
        tokenizer = self._tokenizer()
        count = self._tokenise(tokenizer)
        return self._assemble(tokenizer, count)

    def _work(self, tokenizer: Tokenizer | None) -> Work:
        recipe = self.recipe
        return Work(
            recipe.cleaning,
            recipe.exact_duplicates,
            recipe.val_fraction,
            None if tokenizer is None else str(self.folder / TOKENIZER_FILE),
            None if tokenizer is None else tokenizer.hash_with_roles,
            str(self.folder / _BLOCKS_FOLDER),
        )

    def _blocks(self) -> Iterator[Block]:
        size = self.corpus.total_bytes // _BLOCKS_PER_CORPUS
        return self.corpus.blocks(min(max(size, _MIN_BLOCK_BYTES), _MAX_BLOCK_BYTES))

    def _tokenizer(self) -> Tokenizer:
        """The given tokenizer, or one trained on the corpus; it lies in the folder from now on, with its roles."""
        path = self.folder / TOKENIZER_FILE
        if not path.exists():
            if self.recipe.tokenizer is not None:
                tokenizer = Tokenizer.load(self.recipe.tokenizer, marks=self.recipe.marks)
            else:
                assert self.recipe.tokenizer_vocab is not None
                train = train_wordpiece if self.recipe.tokenizer_kind == "wordpiece" else train_byte_level_bpe
                tokenizer = train(self._training_texts(), self.recipe.tokenizer_vocab)
                tokenizer = Tokenizer(tokenizer.definition, marks=self.recipe.marks)
            for name, text in tokenizer.texts().items():
                write_durably(self.folder / name, text.encode())
        return Tokenizer.load(path)

    def _training_texts(self) -> Iterator[str]:
        done = Done(min(self.corpus.total_bytes, TOKENIZER_TRAINING_BYTES))
        size = 0
        for texts in self.workers.map(partial(texts_of_block, self._work(None)), self._blocks()):
            for text in texts:
                yield text
                size += len(text)
                done.documents += 1
            done.done = min(size, done.total)
            self.progress("reading for the tokenizer", done)
            if size > TOKENIZER_TRAINING_BYTES:
                break
        self.progress("training the tokenizer", done)

    def _tokenise(self, tokenizer: Tokenizer) -> int:
        """Results of all blocks that have none yet; returns the number of blocks."""
        work = self._work(tokenizer)
        done = Done(self.corpus.total_bytes)
        count = 0

        def missing() -> Iterator[tuple[int, Block]]:
            nonlocal count
            for number, block in enumerate(self._blocks()):
                count = number + 1
                if work.path_of(number).exists():
                    done.done += block.bytes
                    done.resumed += block.bytes
                else:
                    yield number, block

        for size, documents, tokens in self.workers.map(partial(_tokenise, work), missing()):
            done.done += size
            done.documents += documents
            done.tokens += tokens
            self.progress("tokenising", done)
        return count

    def _assemble(self, tokenizer: Tokenizer, count: int) -> Summary:
        recipe = self.recipe
        work = self._work(tokenizer)
        splits = {
            split: _Split(
                ShardWriter(
                    self.folder / split,
                    tokenizer_sha256=tokenizer.sha256,
                    vocab_size=tokenizer.vocab_size,
                    eos_id=tokenizer.eos_id,
                    chunk_tokens=recipe.chunk_tokens,
                    chunks_per_shard=recipe.chunks_per_shard,
                    masked=recipe.masked,
                    packed_length=recipe.pack,
                    document_start=tokenizer.document_start,
                ),
                BestFitPacker(recipe.pack, tokenizer.eos_id) if recipe.pack else None,
            )
            for split in SPLITS
        }
        totals = _Totals()
        with Duplicates(self.folder / "duplicates.sqlite") as duplicates:
            for number in range(count):
                block = BlockResult.load(work.path_of(number))
                kept = totals.add(block, duplicates)
                splits["train"].add(block, kept & ~block.validation)
                splits["val"].add(block, kept & block.validation)
                done = Done(count, number + 1, totals.documents, totals.tokens, in_bytes=False)
                self.progress("writing shards", done)
        if totals.documents == 0:
            raise DataError(_nothing_left(self.corpus, totals))
        for split, one in splits.items():
            if one.writer.documents == 0 and not one.has_open_rows:
                other = "smaller" if split == "train" else "larger"
                raise DataError(
                    f"--val-fraction {recipe.val_fraction}: none of the {totals.documents} documents falls into "
                    f"{split}; a {other} fraction or more documents would fill it"
                )
        indexes = {split: one.close() for split, one in splits.items()}
        if totals.notes[CONVERSATIONS] and tokenizer.chat is None:
            write_durably(self.folder / TEMPLATE_FILE, tokenizer.conversations.template.source.encode())
        rows = {split: one.writer.rows for split, one in splits.items() if one.writer.rows is not None}
        return replace(totals.summary(self.corpus, recipe, tokenizer, indexes), rows=rows)


def _nothing_left(corpus: Corpus, totals: _Totals) -> str:
    """Why there is no document, with what stood in the way of each."""
    reasons = [f"{n} {rule}" for rule, n in totals.removed.most_common()]
    left_out = FileTally(corpus.files_left_out.to_dict())
    left_out.update(totals.files)
    if left_out.total():
        reasons.append(f"files left out: {left_out.line()}")
    why = ", ".join(reasons) or "none was found"
    return f"{corpus.source}: no document is left ({why}); give other --input or fewer filters"


def _tokenise(work: Work, task: tuple[int, Block]) -> tuple[int, int, int]:
    number, block = task
    _, documents, tokens = tokenise_block(work, number, block)
    return block.bytes, documents, tokens


@dataclass
class _Split:
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


@dataclass
class _Totals:
    """What became of all documents."""

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

    def add(self, block: BlockResult, duplicates: Duplicates) -> np.ndarray:
        """Count a block; [D], which of its documents stay."""
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
        if block.digests.size or block.bands.size:
            for document in range(len(block.names)):
                rule = duplicates.rule(block.digests[document].tobytes(), block.bands[document].tolist())
                if rule is not None:
                    kept[document] = False
                    self.removed[rule] += 1
        self.documents += int(kept.sum())
        self.tokens += int(block.lengths[kept].sum())
        self.text_bytes += int(block.text_bytes[kept].sum())
        self.lengths.add(block.lengths[kept])
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


def _recorded_signature(out: Path) -> str | None:
    try:
        record = json.loads((out / RECIPE_FILE).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return str(record.get("signature"))
