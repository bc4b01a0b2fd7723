"""Exact match and F1, as SQuAD's evaluation script computes them. No torch.

Rajpurkar et al. 2016, section 6.1; ``evaluate-v2.0.py`` of Rajpurkar et al. 2018 for questions without an answer.
"""

from __future__ import annotations

import re
import string
from abc import abstractmethod
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from megalm.evaluate.tasks.metrics.base import Generated, Mean

_ARTICLES = re.compile(r"\b(a|an|the)\b")
_PUNCTUATION = frozenset(string.punctuation)
SQUAD, NONE = "squad", "none"


def normalised(text: str) -> str:
    """Lower case, without ASCII punctuation and the articles a, an, the, words one space apart."""
    text = "".join(character for character in text.lower() if character not in _PUNCTUATION)
    return " ".join(_ARTICLES.sub(" ", text).split())


def exact(text: str, reference: str) -> float:
    """1 where two texts are equal after :func:`normalised`, else 0."""
    return float(normalised(text) == normalised(reference))


def f1(text: str, reference: str) -> float:
    """Harmonic mean of precision and recall of the words that two normalised texts share, as bags; 0 to 1.

    Where one of them has no words, 1 if the other has none either.
    """
    words, right = normalised(text).split(), normalised(reference).split()
    if not words or not right:
        return float(words == right)
    common = sum((Counter(words) & Counter(right)).values())
    if not common:
        return 0.0
    precision, recall = common / len(words), common / len(right)
    return 2 * precision * recall / (precision + recall)


class OverReferences(Mean[Generated]):
    """The best over all references; a question without any is right without an answer."""

    def __init__(self, name: str, options: Mapping[str, Any]) -> None:
        self.name = name
        self._normalise = options.get("normalise", SQUAD) == SQUAD
        self._no_answer = options.get("no_answer")
        self.signature = f"normalise:{SQUAD if self._normalise else NONE}"

    def of(self, answer: Generated) -> float:
        """Of one item."""
        return max(self._pair(self._said(answer.text), each) for each in self._right(answer.references))

    def emptied(self, answers: Sequence[Generated]) -> int:
        """How many questions have an answer of which normalisation leaves nothing, such as the letter A, an article.

        Nothing is right for them then, and so is any other such text.
        """
        said = [[self._said(each) for each in answer.references] for answer in answers] if self._normalise else []
        return sum(any(texts) and not any(map(normalised, texts)) for texts in said)

    @abstractmethod
    def _pair(self, text: str, reference: str) -> float:
        """Of a text and one reference."""

    def _said(self, text: str) -> str:
        """What was answered; nothing, where it was said that there is no answer."""
        return "" if self._no_answer is not None and exact(text, self._no_answer) else text

    def _right(self, references: Sequence[str]) -> Sequence[str]:
        """As SQuAD's script: references that normalise to nothing count only where there are no others."""
        said = [self._said(each) for each in references]
        return [each for each in said if not self._normalise or normalised(each)] or [""]


class ExactMatch(OverReferences):
    """Share of texts that equal a reference."""

    def _pair(self, text: str, reference: str) -> float:
        return exact(text, reference) if self._normalise else float(text == reference)


class F1(OverReferences):
    """Mean F1 of words with the closest reference."""

    def _pair(self, text: str, reference: str) -> float:
        return f1(text, reference)
