"""A prepared dataset as a whole: ``{train,val}/`` and ``tokenizer.json``, in a folder or elsewhere. No torch."""

from __future__ import annotations

import hashlib
import json
import shlex
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

from megalm.config.schema import Data
from megalm.data.place import RECIPE_FILE, partial_folder
from megalm.data.shards.beside import files_beside
from megalm.data.shards.index import INDEX_FILE, Index, check_files, check_marks, read_index
from megalm.data.shards.store import Cache, MissingFile, RefusedFile, Store, open_store
from megalm.data.tokenization.roles import USUAL_START, Marks
from megalm.data.tokenization.tokenizer import TOKENIZER_FILE, Tokenizer
from megalm.errors import DataError

SPLITS = ("train", "val")
AS_THE_MODELS = "megalm prepare --add-bos, --no-add-bos and --eos make them as the model's"
"""What helps where documents begin or end otherwise than a model's."""


SHIPPED_DATASETS = {
    "data/quickstart": "--corpus stdlib --tokenizer-vocab 4096",
    "data/quickstart_bert": "--corpus stdlib --tokenizer-vocab 4096 --tokenizer-kind wordpiece",
}
"""``data.path`` of the experiments that megalm ships, and the arguments of ``megalm prepare`` that make it."""


@dataclass(frozen=True)
class DatasetInfo:
    """What a run needs to know of its data before it starts.

    Attributes:
        location: where the dataset is, as messages name it.
        vocab_size: token ids are below this.
        chunk_tokens: sequence lengths divide this.
        packed_length: the only sequence length, where documents were packed for one; 0: any.
        train_tokens: valid tokens of the training split.
        val_tokens: valid tokens of the validation split; 0: it has none.
        tokenizer_sha256: hash of the tokenizer that made them.
        marks: how documents begin and end, in words.
        train_fingerprint: of the training split's contents, wherever they are.
        masked: whether the training split has a loss mask.
        indexes: of the splits that there are, without the hashes of their shards.
    """

    location: str
    vocab_size: int
    chunk_tokens: int
    packed_length: int
    train_tokens: int
    val_tokens: int
    tokenizer_sha256: str
    marks: str
    train_fingerprint: str = ""
    masked: bool = False
    indexes: Mapping[str, Index] = field(default_factory=dict)

    def sequences(self, sequence_length: int) -> int:
        """Sequences of the training split."""
        return -(-(self.train_tokens - 1) // sequence_length)


def open_datasets(data: Data) -> tuple[Store, ...]:
    """The datasets that a config names."""
    cache = Cache(data.cache_dir, data.cache_gib)
    return tuple(open_store(path, cache) for path in data.path)


def inspect_datasets(data: Data) -> tuple[DatasetInfo, ...]:
    """Inspect every dataset that a config names.

    Raises:
        DataError: anything is missing, half-written, or does not belong together.
    """
    infos = tuple(inspect_dataset(store) for store in open_datasets(data))
    for info in infos[1:]:
        if info.tokenizer_sha256 != infos[0].tokenizer_sha256:
            raise DataError(
                f"data.path: {infos[0].location} and {info.location} were made by different tokenizers; "
                f"prepare one of them again with --tokenizer and the {TOKENIZER_FILE} of the other"
            )
        check_marks({info.location: info.marks for info in (infos[0], info)})
    return infos


def inspect_dataset(store: Store | Path, *, looks_at_files: bool = True) -> DatasetInfo:
    """Read both indexes and check that every file is there and has its size.

    Args:
        store: the dataset.
        looks_at_files: whether to do so; False: what the indexes say is taken for granted.

    Raises:
        DataError: anything is missing, half-written, or does not belong together.
    """
    store = open_store(store) if isinstance(store, Path) else store
    check_folder(store)
    indexes = {}
    for split in splits_of(store):
        indexes[split] = read_index(store.below(split))
        if looks_at_files:
            check_files(indexes[split], store.below(split))
    train, val = indexes["train"], indexes.get("val")
    same = ("tokenizer_sha256", "chunk_tokens", "packed_length", "eos_id", "vocab_size", "document_start")
    if val is not None and any(getattr(train, name) != getattr(val, name) for name in same):
        raise DataError(f"data.path={store.location}: train/ and val/ were prepared differently; prepare it again")
    _check_tokenizer(store, _read_tokenizer(store), train)
    return DatasetInfo(
        location=store.location,
        vocab_size=train.vocab_size,
        chunk_tokens=train.chunk_tokens,
        packed_length=train.packed_length,
        train_tokens=train.tokens,
        val_tokens=0 if val is None else val.tokens,
        tokenizer_sha256=train.tokenizer_sha256,
        marks=train.marks,
        train_fingerprint=train.fingerprint,
        masked=train.masked,
        indexes={split: index.without_checks() for split, index in indexes.items()},
    )


def splits_of(store: Store) -> tuple[str, ...]:
    """The splits of a dataset: without ``val`` where its recipe says that it was prepared so.

    A folder that has lost its ``val/`` is not taken for one: whoever reads that split says that it is missing.
    """
    try:
        store.below("val").read(INDEX_FILE)
    except (MissingFile, RefusedFile):  # some servers refuse files that do not exist
        with suppress(MissingFile, RefusedFile, ValueError):
            if "val" not in json.loads(store.read(RECIPE_FILE)).get("splits", SPLITS):
                return ("train",)
    return SPLITS


def with_validation(stores: Sequence[Store]) -> tuple[Store, ...]:
    """Those of some datasets that have validation documents."""
    return tuple(store for store in stores if "val" in splits_of(store))


def tokenizer_of(stores: Sequence[Store], known: Index | None = None) -> Tokenizer:
    """The tokenizer that made the datasets, with the start and the end of a document that they were made with.

    Args:
        stores: the datasets.
        known: the index of the first one's training split; None: it is read.

    Raises:
        DataError: it is missing or damaged.
    """
    store = stores[0]
    definition = _read_tokenizer(store)
    index = read_index(store.below("train")) if known is None else known
    if known is not None:
        _check_tokenizer(store, definition, known)
    return Tokenizer.parse(
        definition.decode("utf-8", errors="replace"),
        store.path_of(TOKENIZER_FILE),
        read=files_beside(store),
        marks=marks_of(index),
    )


def marks_of(index: Index) -> Marks:
    """How the documents of a split begin and end."""
    return Marks(eos_id=index.eos_id, before=USUAL_START if index.document_start is None else index.document_start)


def other_marks(tokenizer: Tokenizer, index: Index) -> str | None:
    """That documents begin or end otherwise than those that a model was trained with; None: they do not."""
    if (index.document_start, index.eos_id) == (tokenizer.document_start, tokenizer.eos_id):
        return None
    start = marks_of(index).before or ()
    theirs = " ".join(token for token in start if tokenizer.id_of(token) is not None) or "nothing"
    ours = " ".join(tokenizer.roles.before) or "nothing"
    return (
        f"these documents begin with {theirs} and end with {tokenizer.name_of(index.eos_id)}, the model's with {ours} "
        f"and {tokenizer.roles.end}"
    )


def _read_tokenizer(store: Store) -> bytes:
    try:
        return store.read(TOKENIZER_FILE)
    except MissingFile:
        raise DataError(
            f"{store.path_of(TOKENIZER_FILE)}: missing; copy it from where the dataset was prepared"
        ) from None


def _check_tokenizer(store: Store, definition: bytes, index: Index) -> None:
    if hashlib.sha256(definition).hexdigest() != index.tokenizer_sha256:
        raise DataError(
            f"{store.path_of(TOKENIZER_FILE)}: is not the tokenizer that made these tokens; copy the dataset again"
        )


def prepare_command(folder: Path) -> str:
    """A command that makes a dataset: that of a shipped experiment, or an example for text of one's own."""
    text = "--corpus text --input FILES_OR_FOLDERS --tokenizer-vocab 32000"
    return f"megalm prepare {SHIPPED_DATASETS.get(str(folder), text)} --out {shlex.quote(str(folder))}"


def _looked_for(folder: Path) -> str:
    """Where a relative path has led, which another working folder than the run's may have changed."""
    return "" if folder.is_absolute() else f" in {Path.cwd()}, where this command was started"


def check_folder(store: Store) -> None:
    """Raise DataError if a local folder is not there, or is no dataset."""
    folder = Path(store.location)
    if not store.is_local:
        return
    if not folder.exists():
        unfinished = partial_folder(folder)
        hint = f" ({unfinished} was left by a preparation that was cut off)" if unfinished.exists() else ""
        several = f", or several as data.path=[{folder}]" if "," in str(folder) else ""
        raise DataError(
            f"data.path={folder}: no such folder{_looked_for(folder)}{hint}; prepare it with "
            f"`{prepare_command(folder)}`, or name another as data.path=FOLDER{several}"
        )
    if not any((folder / split).exists() for split in SPLITS):
        raise DataError(
            f"data.path={folder}: has no train/ and val/, so it is no prepared dataset; "
            "megalm prepare --out prepares one"
        )
