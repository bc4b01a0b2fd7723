"""Corpora: named sources of documents, each a deterministic sequence of raw bytes.

To add one, write a module with a function ``(inputs) -> Corpus`` and enter it in ``CORPORA``.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from megalm.data.corpora.files import Corpus, stdlib_corpus, text_corpus

CORPORA: dict[str, Callable[[Sequence[str]], Corpus]] = {"stdlib": stdlib_corpus, "text": text_corpus}
"""By the name that ``tools/prepare_data.py --corpus`` takes."""

__all__ = ["CORPORA", "Corpus"]
