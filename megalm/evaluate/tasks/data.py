"""The items of a task: records of JSON Lines, or of a dataset that Hugging Face's library reads. No torch."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megalm.config.arguments import expand_home
from megalm.config.yaml_file import shown_path
from megalm.data.document import Rejected
from megalm.data.prepare.corpora.contents import NotText
from megalm.data.prepare.corpora.jsonl import check_layout, read_record
from megalm.data.prepare.corpora.streams import open_text
from megalm.errors import DataError

HF = "hf:"
_EXTRA = "pip install 'megalm[hf]'"
_MOST_PROBLEMS = 5


@dataclass(frozen=True)
class Source:
    """Where items are.

    Attributes:
        path: a file of JSON Lines, or ``hf:`` and a dataset's name or folder.
        config: configuration of a Hugging Face dataset.
        split: its split.
    """

    path: str
    config: str | None = None
    split: str = "test"

    @property
    def is_hf(self) -> bool:
        """Whether Hugging Face's library reads it."""
        return self.path.startswith(HF)


@dataclass(frozen=True)
class Item:
    """One record.

    Attributes:
        number: counts from 0, in the order of the data.
        place: file and line, for messages and results.
        fields: what the record holds.
    """

    number: int
    place: str
    fields: Mapping[str, Any]


def read_items(source: Source) -> list[Item]:
    """All items.

    Raises:
        DataError: the data are not there, or a line is no record; of lines the first few, and how many more.
    """
    items = _rows(source) if source.is_hf else _lines(Path(expand_home(source.path)))
    if not items:
        raise DataError(f"{source.path}: has no records; one JSON object a line")
    return items


def data_hash(items: Sequence[Item]) -> str:
    """SHA-256 of all records, in order, whatever file or library they are from."""
    hasher = hashlib.sha256()
    for item in items:
        hasher.update(json.dumps(item.fields, sort_keys=True, default=str).encode() + b"\n")
    return hasher.hexdigest()


def raise_all(problems: Iterable[str]) -> None:
    """Raise the first few problems, and how many more there are; nothing where there are none.

    Raises:
        DataError: with a line for each.
    """
    lines = list(problems)
    if len(lines) > _MOST_PROBLEMS:
        lines = [*lines[:_MOST_PROBLEMS], f"and {len(lines) - _MOST_PROBLEMS} more such lines"]
    if lines:
        raise DataError("\n".join(lines))


def _lines(path: Path) -> list[Item]:
    """Records of a file, which may be compressed; blank lines are none."""
    name = shown_path(path)
    if not path.is_file():
        what = "is no file" if path.exists() else "there is no such file"
        raise DataError(f"{name}: {what}; JSON Lines, or hf:NAME of a Hugging Face dataset")
    items: list[Item] = []
    problems: list[str] = []
    try:
        with open_text(path, None) as text:
            check_layout(text.head())
            for number, line in _numbered(text.content):
                place = f"{name}:{number}"
                record = read_record(place, line)
                if isinstance(record, Rejected):
                    rule = record.rule if _is_utf8(line) else "not UTF-8"
                    problems.append(f"{place}: {rule}; one JSON object a line, in UTF-8")
                else:
                    items.append(Item(len(items), place, record))
    except NotText as finding:
        # Advice may be of options that only megalm prepare has.
        advice = finding.advice if finding.advice and "--" not in finding.advice else "JSON Lines in UTF-8"
        raise DataError(f"{name}: {finding.reason}; {advice}") from None
    raise_all(problems)
    return items


def _numbered(lines: Iterable[bytes]) -> Iterator[tuple[int, bytes]]:
    return ((number, line) for number, line in enumerate(lines, start=1) if line.strip())


def _rows(source: Source) -> list[Item]:
    name = source.path.removeprefix(HF)
    try:
        import datasets
    except ImportError:
        raise DataError(f"{source.path}: needs the datasets library; {_EXTRA}") from None
    datasets.disable_progress_bars()
    folder = Path(expand_home(name))
    try:
        if (folder / "dataset_dict.json").is_file() or (folder / "state.json").is_file():
            found = datasets.load_from_disk(str(folder))
            found = found[source.split] if isinstance(found, dict) else found
        else:
            where = str(folder) if folder.is_dir() else name
            found = datasets.load_dataset(where, source.config, split=source.split)
        rows = [dict(row) for row in found]
    except Exception as error:  # whatever a hub, a file system or a loading script raises
        words = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise DataError(f"{source.path} ({source.split}): cannot be loaded: {words}") from None
    return [Item(number, f"{source.path} ({source.split}) row {number}", row) for number, row in enumerate(rows)]


def _is_utf8(line: bytes) -> bool:
    try:
        line.decode()
    except UnicodeDecodeError:
        return False
    return True
