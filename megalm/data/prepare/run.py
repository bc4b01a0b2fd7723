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
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

from megalm.data.document import Block, Corpus
from megalm.data.names import shown
from megalm.data.place import RECIPE_FILE, check_apart, check_place, is_vacant, owner_lock, partial_folder, put_in_place
from megalm.data.prepare.assemble import SplitWriter, Totals, ValidationTexts, empty_split, nothing_left
from megalm.data.prepare.blocks import CONVERSATIONS, BlockResult, Work, texts_of_block, tokenise_block
from megalm.data.prepare.card import write_card
from megalm.data.prepare.corpora.streams import Files
from megalm.data.prepare.duplicates import Duplicates
from megalm.data.prepare.executors import Workers
from megalm.data.prepare.packing import BestFitPacker
from megalm.data.prepare.recipe import Recipe
from megalm.data.prepare.summary import Summary
from megalm.data.shards.dataset import SPLITS, TOKENIZER_FILE
from megalm.data.shards.write import ShardWriter, write_durably
from megalm.data.tokenization.settings_files import TEMPLATE_FILE
from megalm.data.tokenization.tokenizer import Tokenizer
from megalm.data.tokenization.training import train_byte_level_bpe, train_wordpiece
from megalm.errors import DataError
from megalm.ownership import Claim, owned

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
    recipe: Recipe,
    out: Path,
    *,
    workers: Workers,
    overwrite: bool,
    progress: Progress,
    command: str,
    say: Callable[[str], object] = lambda _: None,
) -> Summary | None:
    """Write the dataset ``out``; None if it is there already, made by the same recipe from the same files.

    Args:
        recipe: the corpus and what is done to it.
        out: the dataset's folder.
        workers: where blocks are worked on; they see the same files.
        overwrite: replace a dataset that was made differently.
        progress: called now and then.
        command: the command line, for the data card.
        say: told why one has to wait.

    Raises:
        ConfigError: another process prepares a dataset there.
        DataError: the corpus or the tokenizer cannot be read, a split would be empty, or ``out`` holds something else.
    """
    check_place(out)
    check_apart(out, recipe.local_inputs)
    corpus, val_corpus = recipe.open_corpus(), recipe.open_val_corpus()
    for one in (corpus, val_corpus):
        if isinstance(one, Files):
            check_apart(out, (), one.files)
    signature = recipe.signature(corpus, val_corpus)
    if _is_made(out, signature, overwrite=overwrite):
        return None
    remedy = "wait for it to end, or give another --out"
    with owned(owner_lock(out), f"--out {shown(out)}", remedy, say=say) as ownership:
        if _is_made(out, signature, overwrite=overwrite):  # by now
            return None
        folder = _resumable_folder(out, signature)
        preparation = _Preparation(recipe, corpus, val_corpus, folder, workers, progress, ownership.claim)
        summary = preparation.run()
        write_card(folder, recipe, summary, command)
        record = {"signature": signature, "command": command, **summary.to_dict()}
        write_durably(folder / RECIPE_FILE, (json.dumps(record, indent=1) + "\n").encode())
        shutil.rmtree(folder / _BLOCKS_FOLDER)
        (folder / _SIGNATURE_FILE).unlink()
        ownership.claim.check()
        put_in_place(folder, out)
    return summary


def _is_made(out: Path, signature: str, *, overwrite: bool) -> bool:
    """Whether the dataset is there already.

    Raises:
        DataError: something else is, which stays.
    """
    if not is_vacant(out):
        if not (out / RECIPE_FILE).is_file():
            raise DataError(
                f"{shown(out)}: exists and is no prepared dataset, so --overwrite leaves it alone; "
                "remove it yourself, or give another --out"
            )
        if not overwrite:
            if _recorded_signature(out) == signature:
                return True
            raise DataError(
                f"{shown(out)}: exists and was made from other files or with other settings; --overwrite replaces it, "
                "another --out keeps it"
            )
    return False


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


@dataclass(frozen=True)
class _Preparation:
    """One preparation in its folder."""

    recipe: Recipe
    corpus: Corpus
    val_corpus: Corpus | None
    folder: Path
    workers: Workers
    report: Progress
    claim: Claim

    def progress(self, phase: str, done: Done) -> None:
        """Between two pieces of work: ask whether the place is this process's still, and tell how far it is."""
        self.claim.check()
        self.report(phase, done)

    def run(self) -> Summary:
        tokenizer = self._tokenizer()
        validation, training = self._tokenise(tokenizer)
        return self._assemble(tokenizer, validation, training)

    def _work(self, tokenizer: Tokenizer | None) -> Work:
        recipe = self.recipe
        return Work(
            recipe.cleaning,
            recipe.exact_duplicates or self.val_corpus is not None,
            recipe.val_fraction,
            None if tokenizer is None else str(self.folder / TOKENIZER_FILE),
            None if tokenizer is None else tokenizer.hash_with_roles,
            str(self.folder / _BLOCKS_FOLDER),
        )

    @staticmethod
    def _blocks(corpus: Corpus | None) -> Iterator[Block]:
        if corpus is None:
            return iter(())
        size = corpus.total_bytes // _BLOCKS_PER_CORPUS
        return corpus.blocks(min(max(size, _MIN_BLOCK_BYTES), _MAX_BLOCK_BYTES))

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
        for texts in self.workers.map(partial(texts_of_block, self._work(None)), self._blocks(self.corpus)):
            for text in texts:
                yield text
                size += len(text)
                done.documents += 1
            done.done = min(size, done.total)
            self.progress("reading for the tokenizer", done)
            if size > TOKENIZER_TRAINING_BYTES:
                break
        self.progress("training the tokenizer", done)

    def _tokenise(self, tokenizer: Tokenizer) -> tuple[int, int]:
        """Results of all blocks that have none yet; returns how many each corpus has, validation first.

        What is like validation documents is then removed from the training data.
        """
        work = self._work(tokenizer)
        done = Done(self.corpus.total_bytes + (self.val_corpus.total_bytes if self.val_corpus is not None else 0))
        counts = [0, 0]

        def missing() -> Iterator[tuple[int, Block]]:
            for which, corpus in enumerate((self.val_corpus, self.corpus)):
                for block in self._blocks(corpus):
                    number = sum(counts)
                    counts[which] += 1
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
        return counts[0], counts[1]

    def _splits(self, tokenizer: Tokenizer) -> dict[str, SplitWriter]:
        recipe = self.recipe
        return {
            split: SplitWriter(
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
            for split in recipe.splits
        }

    def _assemble(self, tokenizer: Tokenizer, validation: int, training: int) -> Summary:
        work, splits = self._work(tokenizer), self._splits(tokenizer)
        totals, val_totals, texts = Totals(self.recipe.pack), Totals(self.recipe.pack), ValidationTexts()
        with Duplicates(self.folder / "duplicates.sqlite") as found:
            duplicates = found if self.recipe.exact_duplicates else None
            for number in range(validation + training):
                block = BlockResult.load(work.path_of(number))
                if number < validation:
                    kept = val_totals.add(block, duplicates, texts)
                    texts.add(block, kept)
                    splits["val"].add(block, kept)
                else:
                    kept = totals.add(block, duplicates, texts)
                    splits["train"].add(block, kept & ~block.validation)
                    if block.validation.any():
                        splits["val"].add(block, kept & block.validation)
                documents, tokens = totals.documents + val_totals.documents, totals.tokens + val_totals.tokens
                done = Done(validation + training, number + 1, documents, tokens, in_bytes=False)
                self.progress("writing shards", done)
        self._check_splits(splits, totals, val_totals)
        indexes = {split: one.close() for split, one in splits.items()}
        if totals.notes[CONVERSATIONS] and tokenizer.chat is None:
            write_durably(self.folder / TEMPLATE_FILE, tokenizer.conversations.template.source.encode())
        rows = {split: one.writer.rows for split, one in splits.items() if one.writer.rows is not None}
        summary = replace(totals.summary(self.corpus, self.recipe, tokenizer, indexes), rows=rows)
        if self.val_corpus is None:
            return summary
        return replace(summary, validation=val_totals.summary(self.val_corpus, self.recipe, tokenizer, {}))

    def _check_splits(self, splits: dict[str, SplitWriter], totals: Totals, val_totals: Totals) -> None:
        """Raise DataError if there is nothing to train on, or nothing to validate on where that is wanted."""
        if totals.documents == 0:
            raise DataError(nothing_left(self.recipe, self.corpus, totals))
        if self.val_corpus is not None and val_totals.documents == 0:
            raise DataError(nothing_left(self.recipe, self.val_corpus, val_totals, option="--val-input"))
        for split, one in splits.items():
            if one.writer.documents == 0 and not one.has_open_rows:
                raise DataError(empty_split(self.recipe, self.corpus, totals.documents, split))


def _tokenise(work: Work, task: tuple[int, Block]) -> tuple[int, int, int]:
    number, block = task
    _, documents, tokens = tokenise_block(work, number, block)
    return block.bytes, documents, tokens


def _recorded_signature(out: Path) -> str | None:
    try:
        record = json.loads((out / RECIPE_FILE).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return str(record.get("signature"))
