"""``megalm data show DATASET``: its documents as text, as the tokens in the shards say it. No torch."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from itertools import groupby, islice

from megalm.data.shards.dataset import check_folder, splits_of, tokenizer_of
from megalm.data.shards.documents import DocumentSpan, documents_of_split, tokens_of_document
from megalm.data.shards.index import read_index
from megalm.data.shards.read import ChunkReader
from megalm.data.shards.store import open_store
from megalm.data.tokenization.tokenizer import Tokenizer
from megalm.errors import ConfigError, DataError

SHOWN_TOKENS = 200
"""Of each document; what a reader sees at a glance."""
_SHOWN_DOCUMENTS = 5
LEARNT = "«»"
"""Around what carries loss, in data of which only a part does."""


def dataset_lines(
    location: str, *, split: str, listed: bool, find: str | None, limit: int | None, as_json: bool
) -> Iterator[str]:
    """What to print of a dataset.

    Args:
        location: a folder, or an address.
        split: ``train`` or ``val``.
        listed: names and lengths alone.
        find: part of a document's name; None: all documents.
        limit: most documents; None: as many as fit a screen, or all that are listed.
        as_json: one JSON object per document.

    Raises:
        DataError: there is no such dataset, it has no such split, or no document has such a name.
        ConfigError: ``limit`` is not positive.
    """
    if limit is not None and limit < 1:
        raise ConfigError(f"--limit {limit}: must be at least 1")
    store = open_store(location)
    check_folder(store)
    if split not in splits_of(store):
        raise DataError(f"{location}: was prepared without a {split} split")
    part = store.below(split)
    index = read_index(part)
    tokenizer, chunks = tokenizer_of([store]), ChunkReader(part, index)
    if not as_json:
        masked = ", the loss is on marked text alone" if index.masked else ""
        yield (
            f"{location} {split}: {index.documents:,} documents, {index.tokens:,} tokens, vocabulary "
            f"{index.vocab_size:,}{masked}"
        )
    wanted = (d for d in documents_of_split(part, index) if find is None or find.casefold() in d.name.casefold())
    most = limit if limit is not None or listed else _SHOWN_DOCUMENTS
    shown = 0
    for document in islice(wanted, most):
        shown += 1
        if listed:
            yield _json(document) if as_json else f"{document.tokens:>9,}  {document.name}"
            continue
        text = _text(tokenizer, *tokens_of_document(chunks, document, SHOWN_TOKENS))
        if as_json:
            yield _json(document, text=text)
        else:
            more = "" if document.tokens <= SHOWN_TOKENS else " …"
            yield from ("", f"{document.name} ({document.tokens:,} tokens)", f"{text}{more}")
    if find is not None and not shown:
        raise DataError(f"--find {find}: none of the {index.documents:,} documents of {split} has a name with this")
    if not as_json and most is not None and next(wanted, None) is not None:
        yield from ("", "and more: --limit N shows others, --documents lists all, --find TEXT finds one")


def _json(document: DocumentSpan, **more: str) -> str:
    fields = {"name": document.name, "start": document.start, "tokens": document.tokens, **more}
    return json.dumps(fields, ensure_ascii=False)


def _text(tokenizer: Tokenizer, tokens: Sequence[int], learnt: Sequence[int]) -> str:
    """Tokens as text; where only some carry loss, these between marks."""
    if all(learnt):
        return tokenizer.decode(tokens)
    parts = []
    pairs = zip(tokens, learnt, strict=True)
    for carries_loss, found in groupby(pairs, key=lambda pair: bool(pair[1])):
        text = tokenizer.decode([token for token, _ in found])
        parts.append(f"{LEARNT[0]}{text}{LEARNT[1]}" if carries_loss else text)
    return "".join(parts)
