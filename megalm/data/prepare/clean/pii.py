"""Replaces what identifies a person by placeholders: addresses and numbers of fixed form, told by rule and checksum.

Names and street addresses have no fixed form and stay. So do addresses of private networks, which identify nobody.
Every pattern has bounded repetitions, so that time is linear in the text.
"""

from __future__ import annotations

import ipaddress
import re
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass


@dataclass(frozen=True)
class _Kind:
    """Something to replace.

    Attributes:
        name: as reports call it.
        placeholder: what stands for it.
        pattern: how it looks.
        is_real: whether a match is one.
    """

    name: str
    placeholder: str
    pattern: re.Pattern[str]
    is_real: Callable[[str], bool]


def scrub(text: str, notes: Counter[str]) -> str:
    """Text with placeholders; ``notes`` counts them by kind."""
    has_digit = any(map(str.isdigit, text))
    for kind in _KINDS:
        if not (has_digit or kind.name == "e-mail") or (kind.name == "e-mail" and "@" not in text):
            continue

        def replaced(match: re.Match[str], kind: _Kind = kind) -> str:
            before = match.string[max(match.start() - _LABEL_LENGTH, 0) : match.start()]
            if _OTHER_NUMBER.search(before) or not kind.is_real(match[0]):
                return match[0]
            notes[f"PII: {kind.name}"] += 1
            return kind.placeholder

        text = kind.pattern.sub(replaced, text)
    return text


_OTHER_NUMBER = re.compile(r"(?:ISBN|ISSN|OCLC|DOI|arXiv|PMID|version)(?:-1[03])?[:\s]*$", re.IGNORECASE)
"""What says of the number after it that it names a book, an article or a program."""
_LABEL_LENGTH = 16


def _digits(text: str) -> str:
    return "".join(filter(str.isdigit, text))


def _is_global_ip(text: str) -> bool:
    try:
        return ipaddress.ip_address(text).is_global
    except ValueError:
        return False


def _is_card(text: str) -> bool:
    """An issuer's prefix and length, and Luhn's checksum (ISO/IEC 7812)."""
    digits = _digits(text)
    prefix, length = int(digits[:4]), len(digits)
    known = (
        (digits[0] == "4" and length in (13, 16, 19))
        or ((5100 <= prefix <= 5599 or 2221 <= prefix <= 2720) and length == 16)
        or (digits[:2] in ("34", "37") and length == 15)
        or ((digits[:4] == "6011" or digits[:2] in ("62", "65") or 6440 <= prefix <= 6499) and 16 <= length <= 19)
        or (3528 <= prefix <= 3589 and 16 <= length <= 19)
        or ((3000 <= prefix <= 3059 or digits[:2] in ("36", "38", "39")) and length == 14)
    )
    doubled = [int(d) * (1 + i % 2) for i, d in enumerate(reversed(digits))]
    return known and sum(d - 9 * (d > 9) for d in doubled) % 10 == 0


def _is_iban(text: str) -> bool:
    """Checksum of ISO 13616: the rearranged digits leave 1 modulo 97."""
    compact = text.replace(" ", "")
    if not 15 <= len(compact) <= 34:
        return False
    return int("".join(str(int(c, 36)) for c in compact[4:] + compact[:4])) % 97 == 1


def _is_spanish_id(text: str) -> bool:
    """DNI or NIE: the letter is the number modulo 23."""
    number = text[:-1].translate(str.maketrans("XYZ", "012", "-"))
    return "TRWAGMYFPDXBNJZSQVHLCKE"[int(number) % 23] == text[-1]


def _is_german_tax_id(text: str) -> bool:
    """Steuer-ID: of ten digits one occurs two or three times, and the last is a checksum (ISO 7064, mod 11,10)."""
    digits = _digits(text)
    counts = sorted(Counter(digits[:10]).values())
    if len(digits) != 11 or digits[0] == "0" or counts[-1] not in (2, 3) or counts[-2] != 1:
        return False
    product = 10
    for digit in digits[:10]:
        product = (int(digit) + product) % 10 or 10
        product = product * 2 % 11
    return (11 - product) % 10 == int(digits[10])


def _is_french_id(text: str) -> bool:
    """NIR: 97 less the number modulo 97; Corsica's letters stand for 19 and 18."""
    compact = text.replace(" ", "")
    number = compact[:13].replace("2A", "19").replace("2B", "18")
    return number.isdigit() and 97 - int(number) % 97 == int(compact[13:])


def _is_brazilian_id(text: str) -> bool:
    """CPF: two check digits modulo 11."""
    digits = [int(d) for d in _digits(text)]
    if len(set(digits)) == 1:
        return False
    for end in (9, 10):
        total = sum(d * (end + 1 - i) for i, d in enumerate(digits[:end]))
        if total * 10 % 11 % 10 != digits[end]:
            return False
    return True


def _is_chinese_id(text: str) -> bool:
    """Resident number: a date of birth, and a checksum (ISO 7064, mod 11-2)."""
    month, day = int(text[10:12]), int(text[12:14])
    total = sum(int(d) * pow(2, 17 - i, 11) for i, d in enumerate(text[:17]))
    return 1 <= month <= 12 and 1 <= day <= 31 and "10X98765432"[total % 11] == text[-1].upper()


def _is_us_social_security_number(text: str) -> bool:
    """It has no checksum, but numbers that are never given out."""
    area, group, serial = text.split("-")
    return area not in ("000", "666") and area < "900" and group != "00" and serial != "0000"


def _is_phone(text: str) -> bool:
    """As many digits as a number can have (ITU-T E.164), which is more than a date or a price has."""
    return 8 <= len(_digits(text)) <= 15


def _kind(name: str, placeholder: str, pattern: str, is_real: Callable[[str], bool]) -> _Kind:
    return _Kind(name, placeholder, re.compile(pattern), is_real)


_KINDS = (
    _kind(
        "e-mail",
        "<EMAIL>",
        r"(?<![\w.%+-])[A-Za-z0-9_%+-][A-Za-z0-9._%+-]{0,63}@(?:[A-Za-z0-9-]{1,63}\.){1,8}[A-Za-z]{2,24}(?![\w-])",
        lambda text: ".." not in text,
    ),
    _kind("IBAN", "<IBAN>", r"\b[A-Z]{2}\d{2}(?: ?[A-Z0-9]{4}){2,7}(?: ?[A-Z0-9]{1,3})?\b", _is_iban),
    _kind(
        "id number", "<ID>", r"(?<![\w-])[1278]\d\d(?:0[1-9]|1[0-2]|[2-9]\d)(?:\d\d|2A|2B)\d{8}(?![\w-])", _is_french_id
    ),
    _kind("id number", "<ID>", r"(?<![\w-])[1-9]\d{5}(?:19|20)\d{9}[\dXx](?![\w-])", _is_chinese_id),
    _kind("card", "<CARD>", r"(?<![\w.-])\d(?:[ -]?\d){12,18}(?![\w-]|\.\d)", _is_card),
    _kind("id number", "<ID>", r"(?<![\w.-])\d{3}\.\d{3}\.\d{3}-\d{2}(?![\w-])", _is_brazilian_id),
    _kind("id number", "<ID>", r"(?<![\w-])(?:\d{8}|[XYZ]-?\d{7})-?[A-HJ-NP-TV-Z](?![\w-])", _is_spanish_id),
    _kind("id number", "<ID>", r"(?<![\w.-])\d{2} ?\d{3} ?\d{3} ?\d{3}(?![\w-]|\.\d)", _is_german_tax_id),
    _kind("id number", "<ID>", r"(?<![\w.-])\d{3}-\d{2}-\d{4}(?![\w-])", _is_us_social_security_number),
    _kind("IP address", "<IP>", r"(?<![\w.:])(?:\d{1,3}\.){3}\d{1,3}(?![\w-]|\.\d)", _is_global_ip),
    _kind("IP address", "<IP>", r"(?<![\w.:])(?:[0-9A-Fa-f]{0,4}:){2,7}[0-9A-Fa-f]{0,4}(?![\w:])", _is_global_ip),
    _kind(
        "phone",
        "<PHONE>",
        r"(?<![\w+.-])(?<!\d )(?:\+|00)[1-9]\d{0,2}(?:[ .-]?\(\d{1,4}\))?(?:[ ./-]?\d{2,5}){2,5}(?![\w-]|\.\d)",
        _is_phone,
    ),
    _kind(
        "phone",
        "<PHONE>",
        r"(?<![\w+.-])(?:\([2-9]\d\d\) ?|[2-9]\d\d[-. ])[2-9]\d\d[-. ]\d{4}(?![\w-]|\.\d)",
        _is_phone,
    ),
    _kind(
        "phone",
        "<PHONE>",
        r"(?<![\w+.,-])(?<!\d )\(?0[1-9]\d{1,3}\)?[ /-]\d{3,4}[ -]?\d{2,5}(?![\w-]|[.,]\d)",
        _is_phone,
    ),
)
"""In this order: a card number would also pass for a phone number."""
