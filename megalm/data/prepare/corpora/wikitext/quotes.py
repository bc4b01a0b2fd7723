"""Marks of bold and italics, line by line as MediaWiki reads them: one that is left open ends with its line.

Source: the rules that MediaWiki's parser documents for runs of apostrophes (``Parser::doQuotes``).
"""

from __future__ import annotations

import re

from megalm.data.prepare.corpora.wikitext.marks import QUOTE, QUOTE_END

_RUN = re.compile(f"({QUOTE}{{2,}}){QUOTE_END}")
_ITALIC, _BOLD, _BOTH = 2, 3, 5
_BEFORE_STRING, _AFTER_STRING = " =(,", " ,.;:)"
_STYLED = re.compile(r"(?<!')('{5}|'{3}|'{2})(?![\s'])([^\n]+?)(?<![\s'])\1(?!')")


def without_quotes(text: str) -> str:
    """Text without marks of bold and italics; apostrophes beside them stay."""
    if QUOTE not in text:
        return text
    return "\n".join(_line(line) if QUOTE in line else line for line in text.split("\n"))


def without_quotes_in_code(text: str) -> str:
    """The same for code, where apostrophes are more often what they look like: only what encloses words is a mark."""
    return _STYLED.sub(r"\2", text) if "''" in text else text


def _line(line: str) -> str:
    parts = _RUN.split(line)
    runs = [len(run) for run in parts[1::2]]
    for i, run in enumerate(runs):
        if run == 4 or run > _BOTH:  # what is left over is text
            runs[i] = _BOLD if run == 4 else _BOTH
            parts[2 * i] += "'" * (run - runs[i])
    bold, italic = (runs.count(one) + runs.count(_BOTH) for one in (_BOLD, _ITALIC))
    if bold % 2 and italic % 2:
        wrong = _bold_that_is_italic(parts, runs)
        if wrong is not None:
            runs[wrong] = _ITALIC
            parts[2 * wrong] += "'"
    if (runs.count(_ITALIC) + runs.count(_BOTH)) % 2:
        _keep_empty_string(parts, runs)
    return "".join(parts[::2])


def _bold_that_is_italic(parts: list[str], runs: list[int]) -> int | None:
    """Which of an odd number of bold marks is an apostrophe and an italic mark, as in ``l'''amour''``."""
    after_letter = after_word = after_space = None
    for i, run in enumerate(runs):
        if run != _BOLD:
            continue
        before = parts[2 * i]
        if before[-1:] == " ":
            after_space = i if after_space is None else after_space
        elif before[-2:-1] == " ":
            after_letter = i
            break
        else:
            after_word = i if after_word is None else after_word
    return next((i for i in (after_letter, after_word, after_space) if i is not None), None)


def _keep_empty_string(parts: list[str], runs: list[int]) -> None:
    """An italic mark without a partner that touches no word styles nothing: it is an empty string, as in ``x = ''``."""
    for i, run in enumerate(runs):
        before, after = parts[2 * i], parts[2 * i + 2]
        if run == _ITALIC and before[-1:] in _BEFORE_STRING and (not after or after[0] in _AFTER_STRING):
            parts[2 * i] += "''" if before or after else ""
            return
