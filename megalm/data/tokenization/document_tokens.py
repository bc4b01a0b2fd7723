"""Documents ▶ tokens, end to end, with what begins and ends each and which of them carry loss. No torch.

Shapes: D documents, T tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import islice

import numpy as np
from numpy.typing import NDArray

from megalm.data.document import Document
from megalm.data.tokenization.tokenizer import Tokenizer

Run = tuple[list[int], bool]
"""Tokens, and whether they carry loss."""


def encode_documents(
    tokenizer: Tokenizer, documents: Sequence[Document]
) -> tuple[NDArray[np.uint32], NDArray[np.int64], NDArray[np.uint8] | None]:
    """Tokens of many documents, end to end, each with what goes before it, if anything does, and its end token.

    A document is tokenised as one text, whatever segments it has. One that a chat template wrote may begin and end with
    those tokens already, and gets them once.

    Returns:
        The tokens, [T]; the length of each document, [D]; and [T], 1 where a token carries loss: those that any part of
        a learnt segment is in, and the end after one; None where all do.
    """
    whole = tokenizer.encode_many([str(d.segments[0].text) for d in documents if _is_plain(d)])
    runs: list[Run] = []
    lengths = np.zeros(len(documents), dtype=np.int64)
    for number, document in enumerate(documents):
        if _is_plain(document):
            inside: list[Run] = [(next(whole), document.segments[0].learnt)]
        else:
            inside = tokenizer.encode_runs(document)
        outside = _with_ends(tokenizer, document, inside)
        runs += outside
        lengths[number] = sum(len(ids) for ids, _ in outside)
    flat = np.empty(int(lengths.sum()), dtype=np.uint32)
    start = 0
    for ids, _ in runs:
        flat[start : start + len(ids)] = ids
        start += len(ids)
    learnt = [flag for _, flag in runs]
    mask = None if all(learnt) else np.repeat(np.array(learnt, dtype=np.uint8), [len(ids) for ids, _ in runs])
    return flat, lengths, mask


def _with_ends(tokenizer: Tokenizer, document: Document, inside: list[Run]) -> list[Run]:
    """A document's tokens with those that every document begins and ends with."""
    before = tokenizer.before_ids
    first = tuple(islice((token for ids, _ in inside for token in ids), len(before)))
    begun = not before or (document.marked and first == before)
    ended = document.marked and bool(inside) and inside[-1][0][-1] == tokenizer.eos_id
    head = [] if begun else [(list(before), document.segments[0].learnt)]
    tail = [] if ended else [(list(tokenizer.end_ids), document.segments[-1].learnt)]
    return [*head, *inside, *tail]


def _is_plain(document: Document) -> bool:
    """Whether a document is one text, all of which is learnt or none."""
    return len(document.segments) == 1 and not document.marked
