"""Numbers as a language writes them."""

from __future__ import annotations

import re

from megalm.data.prepare.corpora.wikitext.names import words

_SPACED = words("fr es ru uk bg be cs sk pl fi sv no nb nn hu et lv lt kk hy ka sq eo af")
_DOTTED = words("de it nl pt da id tr el ro hr sr bs sl sh vi is ca gl eu az mk")
_NUMBER = re.compile(r"[-−+]?\d+(?:\.\d+)?")
_IN_TEXT = re.compile(r"\d+(?:\.\d+)?")
_FOUR_DIGITS_TOGETHER = words("es pl pt bg hu")


def separators(language: str) -> tuple[str, str]:
    """Between thousands, and before decimals."""
    if language in _SPACED:
        return "\u00a0", ","
    return (".", ",") if language in _DOTTED else (",", ".")


def grouped(number: str, language: str) -> str:
    """A number with ``.`` before its decimals, as a language writes it; other text as it is, but for numbers in it."""
    return _IN_TEXT.sub(lambda match: _grouped(match[0], language), number)


def ungrouped(text: str, language: str) -> str:
    """A number as programs write it."""
    thousands, decimal = separators(language)
    return text.replace(thousands, "").replace("\u202f", "").replace(" ", "").replace(decimal, ".")


def is_number(text: str) -> bool:
    """Whether it is a number as programs write it."""
    return bool(_NUMBER.fullmatch(text))


def _grouped(number: str, language: str) -> str:
    thousands, decimal = separators(language)
    whole, point, decimals = number.partition(".")
    if len(whole) > (4 if language in _FOUR_DIGITS_TOGETHER else 3):
        whole = f"{int(whole):,}".replace(",", thousands) if whole[0] != "0" else whole
    return whole + (decimal + decimals if point else "")
