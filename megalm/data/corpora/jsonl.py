"""JSON Lines: one record a line, its text in a field."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

from megalm.data.corpora.options import CorpusOptions
from megalm.data.corpora.records import RecordCorpus
from megalm.data.corpora.streams import find_files
from megalm.data.document import Corpus, Document, Rejected

SUFFIXES = (".jsonl", ".ndjson", ".json")


@dataclass(frozen=True)
class JsonText:
    """A record's text is in a field of it.

    Attributes:
        field: its name; dots lead into nested records.
    """

    field: str

    def __call__(self, name: str, data: bytes) -> Document | Rejected:
        """Read a line."""
        record = parse_record(data)
        if record is None:
            return Rejected(name, "malformed JSON")
        text = lookup(record, self.field)
        if text is None:
            return Rejected(name, f"no field {self.field}")
        if not isinstance(text, str):
            return Rejected(name, f"field {self.field} is no text")
        return Document.plain(name, text)


def parse_record(data: bytes) -> dict[str, Any] | None:
    """The object that a line holds; None if it holds none."""
    try:
        record = json.loads(data.decode("utf-8-sig", errors="replace"))
    except (ValueError, RecursionError):
        return None
    return record if isinstance(record, dict) else None


def lookup(record: dict[str, Any], field: str) -> Any:
    """The value of a field, or of ``a.b`` the field ``b`` of the field ``a``; None if there is none."""
    if field in record:
        return record[field]
    head, _, rest = field.partition(".")
    inner = record.get(head)
    return lookup(inner, rest) if rest and isinstance(inner, dict) else None


def jsonl_corpus(options: CorpusOptions) -> Corpus:
    """Files of JSON Lines, and all such files below folders.

    Raises:
        DataError: no input, or one that does not exist or holds no such file.
    """
    options.check("jsonl", "inputs", "text_field")
    return RecordCorpus(", ".join(options.inputs), find_files(options.inputs, SUFFIXES), JsonText(options.text_field))
