"""Sentences that a run reads once, ten times and a hundred times, each copy a document between ordinary ones."""

from __future__ import annotations

import random
from collections.abc import Sequence
from pathlib import Path


def sentences(words: Sequence[str], count: int, *, length: int, seed: int) -> list[str]:
    """Different sentences of so many words, each drawn of all words; no text that is not planted has them."""
    draw = random.Random(seed)
    return [" ".join(draw.sample(words, length)).capitalize() + "." for _ in range(count)]


def plant(folder: Path, ordinary: Sequence[str], planted: dict[int, list[str]], *, seed: int) -> None:
    """Write a file per document, in an order that is drawn.

    Args:
        folder: for the files ``00042-plain.txt`` and ``00043-planted-100-7.txt``, the seventh sentence of those that
            are there a hundred times.
        ordinary: texts between which the sentences stand.
        planted: how often ▶ the sentences that are there so often.
        seed: of the order.
    """
    documents = [("plain", text) for text in ordinary]
    for times, texts in planted.items():
        documents += [(f"planted-{times}-{number}", text) for number, text in enumerate(texts) for _ in range(times)]
    random.Random(seed).shuffle(documents)
    folder.mkdir(parents=True)
    for number, (name, text) in enumerate(documents):
        (folder / f"{number:05d}-{name}.txt").write_text(text, encoding="utf-8")
