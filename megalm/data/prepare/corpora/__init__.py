"""Corpora: named sources of documents, each a deterministic sequence of blocks.

To add one, write a module with a function ``(CorpusOptions) -> Corpus`` and enter it in ``CORPORA``.
"""

from __future__ import annotations

from collections.abc import Callable

from megalm.data.document import Corpus
from megalm.data.prepare.corpora.files import SPLITS_ON, stdlib_corpus, text_corpus
from megalm.data.prepare.corpora.hf import hf_corpus
from megalm.data.prepare.corpora.jsonl import jsonl_corpus
from megalm.data.prepare.corpora.options import UNDECODABLE, CorpusOptions
from megalm.data.prepare.corpora.sft import sft_corpus
from megalm.data.prepare.corpora.wikipedia import wikipedia_corpus

CORPORA: dict[str, Callable[[CorpusOptions], Corpus]] = {
    "stdlib": stdlib_corpus,
    "text": text_corpus,
    "jsonl": jsonl_corpus,
    "wikipedia": wikipedia_corpus,
    "hf": hf_corpus,
    "sft": sft_corpus,
}
"""By the name that ``megalm prepare --corpus`` takes."""

__all__ = ["CORPORA", "SPLITS_ON", "UNDECODABLE", "Corpus", "CorpusOptions"]
