"""Arithmetic of ``{{#expr:…}}``.

Grammar: https://www.mediawiki.org/wiki/Help:Extension:ParserFunctions; functions of it that articles hardly use are not
evaluated.
"""

from __future__ import annotations

import ast
import math
import operator
import re
from collections.abc import Callable

_OPERATORS: dict[type[ast.operator], Callable[[float, float], float]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
    ast.Mod: math.fmod,
    ast.Pow: math.pow,
}
_SAFE = re.compile(r"[\d\s.+*/()%^−-]*")
_ROUND = re.compile(r"(.*)\bround\s*(-?\d+)\s*", re.DOTALL)
_NEGATIVE_POWER = re.compile(r"(?:^|[-(*/^+])\s*[-−]\s*[\d.]+\s*\^")
"""A sign before a power, which binds in MediaWiki otherwise than in Python."""
_LONGEST = 200


def evaluated(expression: str) -> str | None:
    """The value of an expression as MediaWiki writes it; None: it is not arithmetic of numbers."""
    rounded = _ROUND.fullmatch(expression)
    text, digits = (rounded[1], int(rounded[2])) if rounded is not None else (expression, None)
    text = re.sub(r"\bmod\b", "%", text)
    if not text.strip() or len(text) > _LONGEST or not _SAFE.fullmatch(text) or _NEGATIVE_POWER.search(text):
        return None
    try:
        value = _value(ast.parse(text.replace("^", "**").replace("−", "-").strip(), mode="eval").body)
        value = value if digits is None else round(value, digits)
        return f"{value:.14g}" if math.isfinite(value) and abs(value) < 1e14 else None
    except (SyntaxError, ValueError, ArithmeticError, RecursionError):
        return None


def _value(node: ast.expr) -> float:
    if isinstance(node, ast.Constant) and isinstance(node.value, int | float):
        return float(node.value)
    if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub | ast.UAdd):
        value = _value(node.operand)
        return -value if isinstance(node.op, ast.USub) else value
    if isinstance(node, ast.BinOp) and type(node.op) in _OPERATORS:
        return _OPERATORS[type(node.op)](_value(node.left), _value(node.right))
    raise ValueError("no arithmetic")
