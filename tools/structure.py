#!/usr/bin/env python3
"""Measures the structure of megalm's code, from its imports and definitions alone: nothing of it is run.

    tools/structure.py                  this checkout
    tools/structure.py OTHER            another checkout, such as a worktree of an older commit
    tools/structure.py OTHER .          both, side by side

What is counted:
    files, lines        Python files of the package, and their lines
    median, longest     lines of a file; lines of a function, its signature and docstring included
    circles             groups of modules that import each other in a loop, imports inside functions included
    arrows that point up  imports from a lower layer to a higher one (the layers in pyproject.toml), exceptions included
    loose files         modules at the package's root, in no room
    repeated lines      lines in blocks of six or more that stand, word for word, in two places or more
"""

from __future__ import annotations

import argparse
import ast
import statistics
import sys
import tomllib
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

# This file's own checkout, which may be another one than those that it measures.
sys.path.append(str(Path(__file__).resolve().parents[1]))

from megalm.launch.console import run_on_console
from megalm.launch.isolation import shield

REPEATED_LINES = 6
"""A shorter block says the same by chance."""

PACKAGE = "megalm"


@dataclass(frozen=True)
class Module:
    """One Python file of the package.

    Attributes:
        name: dotted, ``megalm.core.linear``; a package has its ``__init__``'s.
        lines: of the file.
        tree: its syntax.
    """

    name: str
    lines: list[str]
    tree: ast.Module


def modules_of(checkout: Path) -> dict[str, Module]:
    """Every module of the package in a checkout, by its name."""
    found = {}
    for path in sorted((checkout / PACKAGE).rglob("*.py")):
        name = ".".join(path.relative_to(checkout).with_suffix("").parts).removesuffix(".__init__")
        text = path.read_text(encoding="utf-8")
        found[name] = Module(name, text.splitlines(), ast.parse(text))
    return found


def imports_of(modules: dict[str, Module]) -> dict[str, set[str]]:
    """Which modules of the package each one imports, inside functions too; no module imports itself."""
    return {name: set(_imported(module, modules)) - {name} for name, module in modules.items()}


def _imported(module: Module, known: dict[str, Module]) -> Iterator[str]:
    for node in ast.walk(module.tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names if alias.name in known)
        elif isinstance(node, ast.ImportFrom) and node.module in known:
            for alias in node.names:
                inner = f"{node.module}.{alias.name}"
                yield inner if inner in known else node.module


def circles(imports: dict[str, set[str]]) -> list[list[str]]:
    """Groups of modules that reach each other by imports (Tarjan 1972, strongly connected components)."""
    index: dict[str, int] = {}
    low: dict[str, int] = {}
    stack: list[str] = []
    found = []

    def visit(name: str) -> None:
        index[name] = low[name] = len(index)
        stack.append(name)
        for other in imports[name]:
            if other not in index:
                visit(other)
                low[name] = min(low[name], low[other])
            elif other in stack:
                low[name] = min(low[name], index[other])
        if low[name] == index[name]:
            members = stack[stack.index(name) :]
            del stack[stack.index(name) :]
            if len(members) > 1:
                found.append(sorted(members))

    for name in imports:
        if name not in index:
            visit(name)
    return found


def layers_of(checkout: Path) -> list[list[str]]:
    """The rooms of the first contract in ``pyproject.toml``, highest layer first."""
    settings = tomllib.loads((checkout / "pyproject.toml").read_text(encoding="utf-8"))
    contracts = settings["tool"]["importlinter"]["contracts"]
    rows = next(contract["layers"] for contract in contracts if contract["type"] == "layers")
    return [[room.strip() for room in row.split("|")] for row in rows]


def arrows_up(imports: dict[str, set[str]], layers: list[list[str]]) -> list[tuple[str, str]]:
    """(importer, imported) where the imported module's layer is the higher one."""

    def floor(name: str) -> int | None:
        rooms = ((-height, room) for height, row in enumerate(layers) for room in row)
        return next((height for height, room in rooms if name == room or name.startswith(f"{room}.")), None)

    pairs = [(name, other, floor(name), floor(other)) for name, others in imports.items() for other in others]
    return [(name, other) for name, other, low, high in pairs if low is not None and high is not None and high > low]


def functions_of(modules: dict[str, Module]) -> list[tuple[int, str]]:
    """(lines, name) of every function and method, longest first."""
    lengths = [
        ((node.end_lineno or node.lineno) - node.lineno + 1, f"{module.name}.{node.name}")
        for module in modules.values()
        for node in ast.walk(module.tree)
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
    ]
    return sorted(lengths, reverse=True)


def repeated_lines(modules: dict[str, Module]) -> int:
    """Lines that are part of a block of ``REPEATED_LINES`` which occurs more than once; imports and blanks left out."""
    places: dict[tuple[str, ...], list[tuple[str, list[int]]]] = defaultdict(list)
    for module in modules.values():
        imported = {
            number
            for node in ast.walk(module.tree)
            if isinstance(node, ast.Import | ast.ImportFrom)
            for number in range(node.lineno, (node.end_lineno or node.lineno) + 1)
        }
        code = [
            (number, line.strip())
            for number, line in enumerate(module.lines, start=1)
            if line.strip() and number not in imported and not line.strip().startswith("#")
        ]
        for start in range(len(code) - REPEATED_LINES + 1):
            block = code[start : start + REPEATED_LINES]
            places[tuple(text for _, text in block)].append((module.name, [number for number, _ in block]))
    repeated = {
        (name, number) for found in places.values() if len(found) > 1 for name, block in found for number in block
    }
    return len(repeated)


def measure(checkout: Path) -> dict[str, str]:
    """The figures of one checkout, by what they say."""
    modules = modules_of(checkout)
    imports = imports_of(modules)
    sizes = [len(module.lines) for module in modules.values()]
    functions = functions_of(modules)
    loose = [
        name for name in modules if name.count(".") == 1 and (checkout / PACKAGE / f"{name.split('.')[1]}.py").exists()
    ]
    return {
        "files": str(len(sizes)),
        "lines": f"{sum(sizes):,}",
        "median file": str(round(statistics.median(sizes))),
        "longest file": f"{max(sizes)} ({max(modules.values(), key=lambda m: len(m.lines)).name})",
        "functions": f"{len(functions):,}",
        "median function": str(round(statistics.median(length for length, _ in functions))),
        "longest function": f"{functions[0][0]} ({functions[0][1]})",
        "functions over 40 lines": str(sum(length > 40 for length, _ in functions)),
        "circles": str(len(circles(imports))),
        "arrows that point up": str(len(arrows_up(imports, layers_of(checkout)))),
        "loose files": str(len(loose)),
        "repeated lines": str(repeated_lines(modules)),
    }


def main() -> int:
    """Print the figures of one checkout or more, a column each."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkouts", nargs="*", type=Path, help="folders; default: the one that this file is in")
    checkouts = parser.parse_args().checkouts or [Path(__file__).resolve().parents[1]]
    if missing := [str(folder) for folder in checkouts if not (folder / PACKAGE / "__init__.py").is_file()]:
        print(f"{', '.join(missing)}: no checkout of {PACKAGE}; a folder with {PACKAGE}/ in it", file=sys.stderr)
        return 2
    columns = [measure(folder) for folder in checkouts]
    widths = [max(len(text) for text in column.values()) for column in columns]
    for name in columns[0]:
        row = "  ".join(f"{column[name]:<{width}}" for column, width in zip(columns, widths, strict=True))
        print(f"{name:24}{row}".rstrip())
    for folder in checkouts:
        modules = modules_of(folder)
        imports = imports_of(modules)
        for members in circles(imports):
            print(f"{folder}: circle: {' '.join(members)}")
        for name, other in arrows_up(imports, layers_of(folder)):
            print(f"{folder}: up: {name} -> {other}")
    return 0


if __name__ == "__main__":
    shield()
    sys.exit(run_on_console(main, works=False))
