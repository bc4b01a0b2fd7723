"""Quality rules of Gopher (Rae et al. 2021, appendix A1) and C4 (Raffel et al. 2020, section 2.2), run by datatrove.

Words are told apart by spaces and sentences by their ends, without any model, so nothing is downloaded. Gopher's rule
about stop words is for English; ``gopher-any`` leaves it out. C4's rules expect Latin punctuation, and neither is for
scripts without spaces.
"""

from __future__ import annotations

import re
from collections import Counter
from functools import lru_cache
from typing import Any

from megalm.data.document import Document
from megalm.errors import DataError

QUALITY = ("gopher", "gopher-any", "c4")
_SENTENCE_END = re.compile(r"(?<=[.!?。！？])[\"'”’)\]]*\s+")
_RULES = {
    "gopher_short_doc": "gopher: too few words",
    "gopher_long_doc": "gopher: too many words",
    "gopher_below_avg_threshold": "gopher: words too short",
    "gopher_above_avg_threshold": "gopher: words too long",
    "gopher_too_many_hashes": "gopher: too many hash signs",
    "gopher_too_many_ellipsis": "gopher: too many ellipses",
    "gopher_too_many_bullets": "gopher: too many bullet points",
    "gopher_too_many_end_ellipsis": "gopher: too many lines that break off",
    "gopher_below_alpha_threshold": "gopher: too few words with letters",
    "gopher_enough_stop_words": "gopher: too few English stop words",
    "lorem_ipsum": "c4: lorem ipsum",
    "curly_bracket": "c4: curly bracket",
    "too_few_sentences": "c4: too few sentences",
}
"""What datatrove calls its rules ▶ what a report calls them."""


class Quality:
    """One set of rules.

    Args:
        name: in ``QUALITY``.

    Raises:
        DataError: datatrove is not installed.
    """

    def __init__(self, name: str) -> None:
        self.name = name
        try:
            from datatrove.pipeline.filters import C4QualityFilter, GopherQualityFilter
        except ImportError as error:
            raise DataError(
                f"--quality {name}: needs datatrove, and {error.name} is not installed; pip install 'megalm[quality]'"
            ) from None
        if name == "c4":
            self._filter: Any = C4QualityFilter(language=_splitter())
        else:
            self._filter = GopherQualityFilter(language=_splitter(), min_stop_words=2 if name == "gopher" else 0)

    def judge(self, text: str) -> tuple[str, str | None]:
        """The text that stays (C4 drops lines), and the rule that it breaks, if any."""
        from datatrove.data import Document as DatatroveDocument

        if not text.strip():
            return text, f"{self.name}: empty"
        document = DatatroveDocument(text=text, id="")
        verdict = self._filter.filter(document)
        passed, rule = verdict if isinstance(verdict, tuple) else (verdict, "")
        return document.text, None if passed else _RULES.get(rule, f"{self.name}: {rule}")


def quality_rule(quality: Quality, document: Document, notes: Counter[str]) -> tuple[Document, str | None]:
    """A document with what a set of rules leaves of it, and the rule that it breaks, if any.

    A document of several parts (supervised data) is judged as one text, and nothing is cut out of it.
    """
    text, rule = quality.judge(document.text)
    if rule is None and text != document.text and len(document.segments) == 1:
        notes[f"{quality.name}: lines removed"] += document.text.count("\n") + 1 - (text.count("\n") + 1)
        document = document.with_texts([text])
    return document, rule


@lru_cache(maxsize=1)
def _splitter() -> Any:
    """What datatrove asks for words and sentences; its own are trained, or must be downloaded."""
    from datatrove.utils.word_tokenizers import WordTokenizer

    class Splitter(WordTokenizer):  # type: ignore[misc]
        def word_tokenize(self, text: str) -> list[str]:
            return text.split()

        def sent_tokenize(self, text: str) -> list[str]:
            return [sentence for sentence in _SENTENCE_END.split(text) if sentence.strip()]

        def span_tokenize(self, text: str) -> list[tuple[int, int]]:
            ends = [match.end() for match in _SENTENCE_END.finditer(text)]
            return list(zip([0, *ends], [*ends, len(text)], strict=True))

    return Splitter()
