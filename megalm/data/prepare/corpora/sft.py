"""Supervised data: JSON Lines of prompts with completions, or of conversations; only answers are learnt.

A conversation leaves here as turns: the chat template that puts them together comes with the tokenizer.
"""

from __future__ import annotations

import string
from dataclasses import dataclass
from typing import Any

from megalm.data.document import Corpus, Document, Rejected, Segment
from megalm.data.prepare.corpora.jsonl import SUFFIXES, check_layout, lookup, read_record
from megalm.data.prepare.corpora.options import NO_FIELD, CorpusOptions, option_name
from megalm.data.prepare.corpora.records import RecordCorpus
from megalm.data.prepare.corpora.streams import find_files
from megalm.data.tokenization.chat import ASSISTANT, TOOL_CALLS
from megalm.errors import DataError

_ROLES = frozenset({"system", "developer", "user", ASSISTANT, "tool"})


@dataclass(frozen=True)
class SupervisedRecord:
    """A record is a conversation (``messages``) or has a prompt and a completion.

    One that is both is a conversation, unless other fields were asked for than the usual ones.

    Attributes:
        prompt: name of a field, or text with ``{fields}`` in it.
        completion: the same.
    """

    prompt: str
    completion: str

    def __call__(self, name: str, data: bytes) -> Document | Rejected:
        """Read a line."""
        record = read_record(name, data)
        if isinstance(record, Rejected):
            return record
        if "messages" in record and not self._names_what(record):
            return _conversation(name, record["messages"])
        texts = []
        for template in (self.prompt, self.completion):
            for field in _fields(template):
                if not isinstance(lookup(record, field), str):
                    missing = lookup(record, field) is None
                    return Rejected(name, NO_FIELD + field if missing else f"field {field} is no text")
            texts.append(_fill(template, record))
        if not texts[1].strip():
            return Rejected(name, "empty completion")
        return Document(name, (Segment(texts[0], learnt=False), Segment(texts[1])))

    def _names_what(self, record: dict[str, Any]) -> bool:
        """Whether fields other than the usual ones were asked for, and a record has them."""
        if (self.prompt, self.completion) == (CorpusOptions.prompt, CorpusOptions.completion):
            return False
        return all(lookup(record, field) is not None for field in _fields(self.prompt) + _fields(self.completion))


def sft_corpus(options: CorpusOptions) -> Corpus:
    """Files of JSON Lines, and all such files below folders.

    Raises:
        DataError: no input, one that does not exist or holds no such file, or a template with a fault.
    """
    options.check("sft", "inputs", "prompt", "completion", "encoding", "undecodable")
    for field in ("prompt", "completion"):
        try:
            list(string.Formatter().parse(getattr(options, field)))
        except ValueError as error:
            raise DataError(f"{option_name(field)} {getattr(options, field)!r}: {error}; {{field}} names one") from None
    reader = SupervisedRecord(options.prompt, options.completion)
    return RecordCorpus(
        options.source, find_files(options.inputs, SUFFIXES), reader, options.reading, check=check_layout
    )


def _fields(template: str) -> list[str]:
    """The fields that a template needs: itself, where it is the name of one."""
    if "{" not in template:
        return [template]
    return [field for _, field, _, _ in string.Formatter().parse(template) if field is not None]


def _fill(template: str, record: dict[str, Any]) -> str:
    """The text that a template gives for a record, which has all its fields."""
    if "{" not in template:
        return str(lookup(record, template))
    parts = []
    for literal, field, _, _ in string.Formatter().parse(template):
        parts += [literal] if field is None else [literal, lookup(record, field)]
    return "".join(parts)


def _conversation(name: str, messages: Any) -> Document | Rejected:
    if not isinstance(messages, list) or not messages:
        return Rejected(name, "messages are no list")
    segments: list[Segment] = []
    for message in messages:
        role = message.get("role") if isinstance(message, dict) else None
        content = message.get("content") if isinstance(message, dict) else None
        if role not in _ROLES or not isinstance(content, str):
            return Rejected(name, "a message without role or content")
        if any(message.get(key) for key in TOOL_CALLS):
            return Rejected(name, "a message that calls tools: text alone is read")
        segments.append(Segment(content, learnt=role == ASSISTANT, role=role))
    if not any(segment.learnt for segment in segments):
        return Rejected(name, "no answer to learn")
    return Document(name, tuple(segments))
