"""A prepared dataset as a whole: ``DIR/{train,val}`` and ``DIR/tokenizer.json``. No torch: asked before ranks start."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path

from megalm.data.index import check_files, read_index
from megalm.errors import DataError

SPLITS = ("train", "val")
TOKENIZER_FILE = "tokenizer.json"


@dataclass(frozen=True)
class DatasetInfo:
    """What a run needs to know of its data before it starts.

    Attributes:
        path: the dataset's folder.
        vocab_size: token ids are below this.
        chunk_tokens: sequence lengths divide this.
        train_tokens: valid tokens of the training split.
        val_tokens: valid tokens of the validation split.
        tokenizer_sha256: hash of the tokenizer that made them.
    """

    path: Path
    vocab_size: int
    chunk_tokens: int
    train_tokens: int
    val_tokens: int
    tokenizer_sha256: str

    @property
    def tokenizer_path(self) -> Path:
        """The tokenizer that made the tokens."""
        return self.path / TOKENIZER_FILE


def partial_folder(path: Path) -> Path:
    """Where a dataset is put together before it is renamed to ``path``."""
    return path.with_name(f".{path.name}.partial")


def inspect_dataset(path: str | Path) -> DatasetInfo:
    """Read both indexes and check that every file is there and has its size.

    Raises:
        DataError: anything is missing, half-written, or does not belong together.
    """
    folder = Path(path)
    if not folder.exists():
        unfinished = partial_folder(folder)
        hint = f" ({unfinished} was left by a preparation that was cut off)" if unfinished.exists() else ""
        raise DataError(f"data.path={path}: no such folder{hint}; prepare one with tools/prepare_data.py --out {path}")
    if not any((folder / split).exists() for split in SPLITS):
        raise DataError(
            f"data.path={path}: has no train/ and val/, so it is no prepared dataset; "
            "tools/prepare_data.py --out prepares one"
        )
    indexes = {}
    for split in SPLITS:
        indexes[split] = read_index(folder / split)
        check_files(indexes[split], folder / split)
    train, val = indexes["train"], indexes["val"]
    if (train.tokenizer_sha256, train.chunk_tokens) != (val.tokenizer_sha256, val.chunk_tokens):
        raise DataError(f"data.path={path}: train/ and val/ were prepared differently; prepare the dataset again")
    _check_tokenizer(folder / TOKENIZER_FILE, train.tokenizer_sha256)
    return DatasetInfo(
        path=folder,
        vocab_size=train.vocab_size,
        chunk_tokens=train.chunk_tokens,
        train_tokens=train.tokens,
        val_tokens=val.tokens,
        tokenizer_sha256=train.tokenizer_sha256,
    )


def _check_tokenizer(path: Path, sha256: str) -> None:
    try:
        found = hashlib.sha256(path.read_bytes()).hexdigest()
    except OSError:
        raise DataError(f"{path}: missing; copy it from where the dataset was prepared") from None
    if found != sha256:
        raise DataError(f"{path}: is not the tokenizer that made these tokens; copy the dataset again")
