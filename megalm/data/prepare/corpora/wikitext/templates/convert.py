"""``{{convert|12|km|mi}}`` ▶ ``12 km (7.5 mi)``.

The result is rounded as the template documents it (Help:Convert): to about the precision of the number that is given,
and to at least two significant figures; temperatures to three in kelvins.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass

from megalm.data.prepare.corpora.wikitext.templates.call import Call
from megalm.data.prepare.corpora.wikitext.templates.numbers import grouped, is_number, ungrouped
from megalm.data.prepare.corpora.wikitext.templates.units import PAIRS, UNITS, Unit

_BETWEEN = {
    "-": "–", "–": "–", "to": " to ", "to(-)": " to ", "and": " and ", "and(-)": " and ", "or": " or ",
    "by": " by ", "x": " × ", "×": " × ", "xx": " × ", "*": " × ", "+/-": " ± ", "±": " ± ", "+": " + ", "/": "/",
    "till": " till ", "til": " til ", "to about": " to about ", "and about": " and about ", "ad": " ad ",
    "bis": " bis ", "à": " à ", "a": " a ", "y": " y ", "до": " до ", "и": " и ", "e": " e ", "&": " & ",
}  # fmt: skip
_SCALED = re.compile(r"e(3|6|9|12)(.+)")
_MULTIPLES = {"3": "thousand", "6": "million", "9": "billion", "12": "trillion"}
_FRACTION = re.compile(r"(?:(\d+)\s*(?:\+\s*|\s|[+])\s*)?(\d+)\s*[/⁄]+\s*(\d+)")
_VULGAR = {"½": 0.5, "¼": 0.25, "¾": 0.75, "⅓": 1 / 3, "⅔": 2 / 3, "⅛": 0.125, "⅜": 0.375, "⅝": 0.625, "⅞": 0.875}
_FUDGE = 1e-14


@dataclass(frozen=True)
class _Number:
    """A number of the input.

    Attributes:
        value: the number.
        shown: as written.
        decimals: digits after its point; of a whole number, less than 0 for each zero at its end.
        in_two_units: whether it is of feet and inches.
    """

    value: float
    shown: str
    decimals: float
    in_two_units: bool = False


@dataclass(frozen=True)
class _Measure:
    """A unit, with what multiplies it: ``million km²``."""

    unit: Unit
    multiple: str = ""
    factor: float = 1.0

    def to_si(self, value: float) -> float:
        """A value of this unit in the SI unit of its kind."""
        return value * self.unit.scale * self.factor + self.unit.offset

    def from_si(self, value: float) -> float:
        """The other way."""
        return (value - self.unit.offset) / (self.unit.scale * self.factor)

    def named(self, number: str, *, whole: bool, singular: bool = False) -> str:
        """What follows a number."""
        if not whole and self.unit.symbol != self.unit.singular:
            name = self.unit.symbol
        else:
            name = self.unit.singular if singular or number in ("1", "-1", "−1") else self.unit.plural
        space = "" if name.startswith("/") else "\u00a0"
        return f"{space}{self.multiple}{' ' if self.multiple else ''}{name}"


def convert(call: Call) -> str | None:
    """The text of ``{{convert}}`` and its siblings; None: the arguments are not understood."""
    arguments = [argument.strip() for argument in call.values()]
    numbers, between, rest = _numbers(arguments, call.language)
    if not numbers or not rest:
        return None
    code, rest = rest[0], rest[1:]
    if code in ("ft", "lb", "st", "mi", "yd") and len(rest) >= 2 and len(numbers) == 1:
        second = _number(rest[0], call.language)
        if second is not None and (code, rest[1]) in {(a, b) for a, b, _ in PAIRS.values()}:
            return _from_pair(call, numbers[0], second, code, rest[1], rest[2:])
    measure = _measure(code)
    if measure is None:
        return f"{_joined([number.shown for number in numbers], between)}\u00a0{code}"
    shown = _input(call, numbers, between, measure)
    return _with_results(call, shown, numbers, between, measure, rest)


def _numbers(arguments: list[str], language: str) -> tuple[list[_Number], list[str], list[str]]:
    """The numbers at the start, what is between them, and the other arguments."""
    numbers: list[_Number] = []
    between: list[str] = []
    position = 0
    while position < len(arguments):
        number = _number(arguments[position], language)
        if number is None:
            break
        numbers.append(number)
        position += 1
        following = arguments[position + 1] if position + 1 < len(arguments) else ""
        if arguments[position : position + 1] and arguments[position] in _BETWEEN and _number(following, language):
            between.append(_BETWEEN[arguments[position]])
            position += 1
        else:
            break
    return numbers, between, arguments[position:]


def _number(text: str, language: str) -> _Number | None:
    """A number: with thousands or without, a fraction, or whole and fraction."""
    text = text.replace("−", "-").replace("&minus;", "-").replace("\u00a0", " ").strip()
    shown = text.replace("-", "−", 1) if text.startswith("-") else text
    vulgar = next((value for sign, value in _VULGAR.items() if text.endswith(sign)), None)
    if vulgar is not None and (not text[:-1] or text[:-1].strip().isdigit()):
        return _Number(float(text[:-1] or 0) + vulgar, shown, 1)
    fraction = _FRACTION.fullmatch(text)
    if fraction is not None and int(fraction[3]):
        value = int(fraction[1] or 0) + int(fraction[2]) / int(fraction[3])
        whole = f"{fraction[1]}+" if fraction[1] else ""
        return _Number(value, f"{whole}{fraction[2]}⁄{fraction[3]}", max(math.log10(int(fraction[3])), 1))
    bare = text.replace(",", "") if re.fullmatch(r"[-+]?\d{1,3}(?:,\d{3})+(?:\.\d+)?", text) else text
    if language != "en" and not is_number(bare):
        bare = ungrouped(text, language)
    if not is_number(bare):
        return None
    whole_part, _, decimals = bare.partition(".")
    precision = len(decimals) if decimals else -(len(whole_part) - len(whole_part.rstrip("0")))
    if not float(bare):
        precision = len(decimals)
    return _Number(float(bare), grouped(bare, language).replace("-", "−"), precision)


def _measure(code: str) -> _Measure | None:
    scaled = _SCALED.fullmatch(code)
    if scaled is not None and scaled[2] in UNITS:
        return _Measure(UNITS[scaled[2]], _MULTIPLES[scaled[1]], 10.0 ** int(scaled[1]))
    unit = UNITS.get(code)
    return None if unit is None else _Measure(unit)


def _joined(numbers: list[str], between: list[str]) -> str:
    return numbers[0] + "".join(sign + number for sign, number in zip(between, numbers[1:], strict=True))


def _input(call: Call, numbers: list[_Number], between: list[str], measure: _Measure) -> str:
    adjective = call.value("adj")
    shown = _joined([number.shown for number in numbers], between)
    whole = call.value("abbr") in ("off", "out")
    if adjective in ("on", "mid", "1") and call.value("abbr") not in ("on", "in"):
        name = measure.unit.singular.replace(" ", "-")
        return f"{shown}-{measure.multiple}{'-' if measure.multiple else ''}{name}{_middle(call)}"
    return shown + measure.named(shown, whole=whole) + _middle(call)


def _middle(call: Call) -> str:
    """``{{convert|5|ft|m|adj=mid|-long}}``: what stands between the unit and the bracket."""
    if call.value("adj") != "mid":
        return ""
    text = next((value for value in reversed(call.values()) if value.startswith("-") or value.isalpha()), "")
    known = text in UNITS or text in PAIRS or text in _BETWEEN
    return "" if not text or known else text if text.startswith("-") else f" {text}"


def _with_results(
    call: Call, shown: str, numbers: list[_Number], between: list[str], measure: _Measure, rest: list[str]
) -> str:
    """What is given, and in brackets what it comes to in the units asked for."""
    wanted, digits = _wanted(rest, measure)
    values = [measure.to_si(number.value) for number in numbers]
    results = []
    for code in wanted:
        result = _result(call, code, values, numbers, between, measure, digits)
        if result is not None:
            results.append(result)
    if not results:
        return shown
    result = "; ".join(results)
    display = call.value("disp")
    if display in ("out", "output only", "output number only", "number"):
        return result
    if call.value("order") == "flip":
        shown, result = result, shown
    sign = {"or": " or ", "comma": ", ", "slash": " / ", "/": " / ", "br": "\n", "s": " / ", "x": " "}.get(display)
    return f"{shown} ({result})" if sign is None else f"{shown}{sign}{result}"


def _wanted(rest: list[str], measure: _Measure) -> tuple[list[str], int | None]:
    """Codes of the units of the result, and the number of decimals if it is said."""
    digits = next((int(text) for text in rest if re.fullmatch(r"[-−]?\d", text.replace("−", "-"))), None)
    codes = rest[0] if rest and not re.fullmatch(r"[-−]?\d", rest[0]) else ""
    if codes in PAIRS or _measure(codes):
        return [codes], digits
    parts = [part for part in re.split(r"[ +]+", codes) if part]
    if parts and all(part in PAIRS or _measure(part) for part in parts):
        return parts, digits
    return [measure.unit.other], digits


def _result(
    call: Call,
    code: str,
    values: list[float],
    numbers: list[_Number],
    between: list[str],
    measure: _Measure,
    digits: int | None,
) -> str | None:
    pair = PAIRS.get(code)
    target = _measure(pair[0] if pair else code)
    if target is None or target.unit.kind != measure.unit.kind:
        return None
    if pair is not None:
        return _joined([_as_pair(call, value, pair, digits or 0) for value in values], between)
    results = [target.from_si(value) for value in values]
    decimals = digits
    if decimals is None:
        each = [
            _decimals(number, result, value, target)
            for number, result, value in zip(numbers, results, values, strict=True)
        ]
        decimals = max(each)
    texts = [_rounded(call, result, decimals) for result in results]
    whole = call.value("abbr") in ("off", "in")
    shown = _joined([grouped(text, call.language).replace("-", "−") for text in texts], between)
    return shown + target.named(shown, whole=whole)


def _decimals(number: _Number, result: float, si: float, target: _Measure) -> int:
    """Decimals of a result: about the precision of what is given, and two significant figures at least."""
    if target.unit.kind == "temperature":
        least = 2 if abs(si) < 1e-8 else 2 - math.floor(math.log10(abs(si)) + _FUDGE)
        return max(math.floor(number.decimals), least)
    if not number.value or not result:
        return 0
    if number.in_two_units and target.unit.kind == "length":
        return max(math.floor(number.decimals + math.log10(target.unit.scale) + 2 + math.log10(2)), 0)
    least = 1 - math.floor(math.log10(abs(result)) + _FUDGE)
    return max(math.floor(number.decimals + math.log10(abs(number.value / result)) + math.log10(2)), least)


def _rounded(call: Call, value: float, decimals: int) -> str:
    significant = call.value("sigfig")
    if significant.isdigit() and int(significant) and value:
        decimals = int(significant) - 1 - math.floor(math.log10(abs(value)) + _FUDGE)
    step = call.value("round")
    if is_number(step) and float(step) > 0:
        value, decimals = (
            round(value / float(step)) * float(step),
            0 if float(step) >= 1 else len(step.partition(".")[2]),
        )
    text = f"{_half_up(value, decimals):.{max(decimals, 0)}f}"
    return text.lstrip("-") if not float(text) else text


def _half_up(value: float, decimals: int) -> float:
    """Rounded to some decimals, halves away from zero."""
    scale = 10.0**decimals
    return math.copysign(math.floor(abs(value) * scale + 0.5 + 1e-9), value) / scale


def _as_pair(call: Call, value: float, pair: tuple[str, str, int], decimals: int) -> str:
    """``5 ft 11 in``."""
    small = _half_up(value / UNITS[pair[1]].scale, decimals)
    sign = "−" if small < 0 else ""
    large, rest = divmod(abs(small), pair[2])
    text = f"{rest:.{max(decimals, 0)}f}"
    whole = call.value("abbr") in ("off", "in")
    first, second = (_Measure(UNITS[code]) for code in pair[:2])
    number = grouped(str(int(large)), call.language)
    return f"{sign}{number}{first.named(number, whole=whole)} {text}{second.named(text, whole=whole)}"


def _from_pair(call: Call, first: _Number, second: _Number, code: str, other: str, rest: list[str]) -> str:
    """``{{convert|5|ft|11|in|cm}}``."""
    large, small = _Measure(UNITS[code]), _Measure(UNITS[other])
    if call.value("adj") == "on" and call.value("abbr") != "on":
        shown = f"{first.shown}-{large.unit.singular}-{second.shown}-{small.unit.singular}"
    else:
        whole = call.value("abbr") in ("off", "out")
        parts = ((first.shown, large), (second.shown, small))
        shown = " ".join(number + measure.named(number, whole=whole) for number, measure in parts)
    value = (large.to_si(first.value) + small.to_si(second.value)) / small.unit.scale
    number = _Number(value, shown, max(second.decimals, 0), in_two_units=True)
    codes = rest if rest and not rest[0].lstrip("-").isdigit() else [large.unit.other, *rest]
    return _with_results(call, shown, [number], [], small, codes)
