"""Hugging Face data: parquet files, or a dataset by its name."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megalm.data.document import Block, Corpus, Document, Rejected
from megalm.data.names import shown
from megalm.data.prepare.corpora.jsonl import lookup
from megalm.data.prepare.corpora.options import NO_FIELD, CorpusOptions
from megalm.data.prepare.corpora.streams import Files, files_fingerprint, find_files, size_of
from megalm.data.tally import FileTally
from megalm.errors import DataError

_EXTRA = "pip install 'megalm[hf]'"


@dataclass(frozen=True)
class RowGroup:
    """Some rows of a parquet file.

    Attributes:
        path: the file.
        number: of the row group.
        first_row: number of its first row in the file.
        field: column that holds the text; dots lead into nested ones.
        bytes: its share of the file.
    """

    path: Path
    number: int
    first_row: int
    field: str
    bytes: int

    def documents(self) -> Iterator[Document | Rejected]:
        """Read the rows."""
        table = _parquet(self.path).read_row_group(self.number, columns=[self.field.partition(".")[0]])
        row = self.first_row
        for batch in table.to_batches(max_chunksize=1024):
            for record in batch.to_pylist():
                yield _document(f"{shown(self.path)}:{row}", record, self.field)
                row += 1


@dataclass(frozen=True)
class ParquetCorpus(Files):
    """Parquet files.

    Attributes:
        field: column that holds the text.
    """

    field: str

    def fingerprint(self) -> str:
        """Of the files and the column."""
        return files_fingerprint(f"{self.source}\0{self.field}", self.files)

    def blocks(self, block_bytes: int) -> Iterator[Block]:  # noqa: ARG002 - a row group is what can be read at once
        """Row groups, whose size the file has decided."""
        for path in self.files:
            file = _parquet(path)
            if self.field.partition(".")[0] not in file.schema_arrow.names:
                columns = ", ".join(file.schema_arrow.names)
                raise DataError(f"--text-field {self.field}: {shown(path)} has no such column; it has {columns}")
            metadata, row = file.metadata, 0
            share = size_of(path) // max(metadata.num_row_groups, 1)
            for number in range(metadata.num_row_groups):
                yield RowGroup(path, number, row, self.field, share)
                row += metadata.row_group(number).num_rows


@dataclass(frozen=True)
class Rows:
    """Some rows of a dataset.

    Attributes:
        texts: (name, text) of each; None where there is no text.
        bytes: size of the texts.
        field: column that was asked for.
    """

    texts: tuple[tuple[str, str | None], ...]
    bytes: int
    field: str

    def documents(self) -> Iterator[Document | Rejected]:
        """The rows."""
        for name, text in self.texts:
            yield Rejected(name, NO_FIELD + self.field) if text is None else Document.plain(name, text)


@dataclass(frozen=True)
class NamedDataset:
    """A dataset that the ``datasets`` library knows by name; streamed.

    Attributes:
        name: of the dataset.
        config: of its configurations.
        split: of its splits.
        field: column that holds the text.
    """

    name: str
    config: str | None
    split: str
    field: str

    @property
    def source(self) -> str:
        """Name, configuration and split."""
        return f"{self.name}{'/' + self.config if self.config else ''} ({self.split})"

    @property
    def total_bytes(self) -> int:
        """What the library says of the split, if it says."""
        splits = self._load().info.splits or {}
        return int(splits[self.split].num_bytes or 0) if self.split in splits else 0

    @property
    def num_files(self) -> int:
        """The library reads them."""
        return 0

    @property
    def files_left_out(self) -> FileTally:
        """The library knows."""
        return FileTally()

    def fingerprint(self) -> str:
        """Of the name and, where it is known, the version."""
        dataset = self._load()
        return hashlib.sha256(f"{self}\0{dataset.info.version}\0{self.total_bytes}".encode()).hexdigest()

    def blocks(self, block_bytes: int) -> Iterator[Block]:
        """Rows as they come, of about ``block_bytes`` of text."""
        texts: list[tuple[str, str | None]] = []
        size = 0
        for row, record in enumerate(self._load()):
            text = lookup(record, self.field)
            texts.append((f"{self.name}:{row}", text if isinstance(text, str) else None))
            size += len(text.encode("utf-8", "surrogatepass")) if isinstance(text, str) else 0
            if size >= block_bytes:
                yield Rows(tuple(texts), size, self.field)
                texts, size = [], 0
        if texts:
            yield Rows(tuple(texts), size, self.field)

    def _load(self) -> Any:
        try:
            import datasets
        except ImportError:
            raise DataError(f"--corpus hf --input {self.name}: needs the datasets library; {_EXTRA}") from None
        datasets.disable_progress_bars()
        try:
            return datasets.load_dataset(self.name, self.config, split=self.split, streaming=True)
        except Exception as error:  # whatever a hub, a file system or a loading script raises
            first = (str(error).strip() or type(error).__name__).splitlines()[0]
            raise DataError(f"--corpus hf --input {self.name}: cannot be loaded: {first}") from None


def hf_corpus(options: CorpusOptions) -> Corpus:
    """Parquet files and folders of them, or the name of one dataset.

    Raises:
        DataError: no input, files that are no parquet, or a library is missing.
    """
    options.check("hf", "inputs", "text_field", "hf_config", "hf_split")
    if any(Path(name).exists() or name.endswith(".parquet") for name in options.inputs):
        files = find_files(options.inputs, (".parquet",))
        return ParquetCorpus(options.source, files, options.text_field)
    if len(options.inputs) > 1:
        raise DataError(f"--corpus hf --input {' '.join(options.inputs)}: one dataset name at a time, or parquet files")
    return NamedDataset(options.inputs[0], options.hf_config, options.hf_split, options.text_field)


def _document(name: str, record: dict[str, Any], field: str) -> Document | Rejected:
    text = lookup(record, field)
    return Document.plain(name, text) if isinstance(text, str) else Rejected(name, NO_FIELD + field)


def _parquet(path: Path) -> Any:
    try:
        from pyarrow import ArrowException, parquet
    except ImportError:
        raise DataError(f"--corpus hf --input {path}: parquet needs pyarrow; {_EXTRA}") from None
    try:
        return parquet.ParquetFile(path)
    except (ArrowException, OSError) as error:
        raise DataError(f"{shown(path)}: is no parquet file, or is damaged: {error}") from None
