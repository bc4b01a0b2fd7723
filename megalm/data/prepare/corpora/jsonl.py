"""JSON Lines: one record a line, its text in a field."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

from megalm.data.document import Corpus, Document, Rejected
from megalm.data.prepare.corpora.contents import NotText
from megalm.data.prepare.corpora.options import NO_FIELD, CorpusOptions
from megalm.data.prepare.corpora.records import RecordCorpus
from megalm.data.prepare.corpora.streams import find_files


class _FieldTwice(Exception):  # noqa: N818 - caught below
    """Which of two values is meant, nobody can say."""


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    record = dict(pairs)
    if len(record) != len(pairs):
        raise _FieldTwice
    return record


_DECODER = json.JSONDecoder(object_pairs_hook=_object)
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
        record = read_record(name, data)
        if isinstance(record, Rejected):
            return record
        text = lookup(record, self.field)
        if text is None:
            return Rejected(name, NO_FIELD + self.field)
        if not isinstance(text, str):
            return Rejected(name, f"field {self.field} is no text")
        return Document.plain(name, text)


def read_record(name: str, data: bytes) -> dict[str, Any] | Rejected:
    """The object that a line holds, or why it holds none."""
    try:
        record = _DECODER.decode(data.decode("utf-8-sig"))
    except _FieldTwice:
        return Rejected(name, "a field twice in one JSON object")
    except (ValueError, RecursionError):
        return Rejected(name, "malformed JSON")
    return record if isinstance(record, dict) else Rejected(name, "JSON that is no object")


def check_layout(head: bytes) -> None:
    """Raise NotText if a file begins as one JSON value over many lines, or as an array of all records."""
    text = head.decode("utf-8-sig", errors="replace").strip()
    first, _, rest = text.partition("\n")
    if text[:1] not in ("{", "[") or (rest.strip() and _is_json(first)):
        return
    if text[0] == "[":
        raise NotText("a JSON array, not JSON Lines", "one record a line: jq -c '.[]' FILE > FILE.jsonl")
    if first.strip() == "{" or (not _is_json(first) and _first_value_ends(text) > len(first)):
        raise NotText("JSON over many lines, not JSON Lines", "one record a line: jq -c . FILE > FILE.jsonl")


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
    options.check("jsonl", "inputs", "text_field", "encoding", "undecodable")
    found = find_files(options.inputs, SUFFIXES)
    return RecordCorpus(options.source, found, JsonText(options.text_field), options.reading, check=check_layout)


def _is_json(text: str) -> bool:
    try:
        json.loads(text)
    except (ValueError, RecursionError):
        return False
    return True


def _first_value_ends(text: str) -> int:
    """Where the value that a text begins with ends; 0: it begins with none."""
    try:
        return json.JSONDecoder().raw_decode(text)[1]
    except (ValueError, RecursionError):
        return 0
