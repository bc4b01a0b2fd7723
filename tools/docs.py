#!/usr/bin/env python3
"""Make the pages of docs/ that follow from the code: every config field, every command, and the drawing of the imports.

tools/docs.py              write docs/config.md, docs/commands.md, docs/exit-codes.md, docs/architecture.svg
tools/docs.py --check      say which of them are not what the code says, and exit 1
"""

# ruff: noqa: E402 - the checkout and its tools are found by the paths that are added first
from __future__ import annotations

import argparse
import ast
import contextlib
import io
import os
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from xml.sax.saxutils import escape

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tools")]

from structure import imports_of, layers_of, modules_of

from megalm.cli.main import main as megalm
from megalm.cli.table import COMMANDS
from megalm.config.support import BOUNDS, CHOICES

MADE = "<!-- made by tools/docs.py; change the code instead -->"
SCHEMA = ROOT / "megalm" / "config" / "schema.py"
ROW_HEIGHT, BOX_HEIGHT, BOX_WIDTH, GAP, WIDTH = 92, 46, 190, 26, 980


_HEAD = "| field | type | default | legal values | meaning |\n| --- | --- | --- | --- | --- |"


def config_page() -> str:
    """A table per group of settings: field, type, default, legal values, meaning."""
    tree = ast.parse(SCHEMA.read_text(encoding="utf-8"))
    classes = {node.name: node for node in tree.body if isinstance(node, ast.ClassDef)}
    parts = [
        "# Every config field",
        MADE,
        "Set any of them as `group.field=value`, on the command line or in a file: see [settings](settings.md). `null` "
        "means that megalm derives the value; the last column says from what. `megalm check --yaml` prints a resolved "
        "config with where each value is from.",
    ]
    for field, annotation, _, _ in _fields(classes["Config"]):
        group = classes[annotation]
        parts += [f"## {field}", _plain(ast.get_docstring(group) or "")]
        rows = [
            f"| `{field}.{n}` | `{_escaped(kind)}` | {_code(default)} | {_legal(f'{field}.{n}')} | {_plain(doc)} |"
            for n, kind, default, doc in _fields(group)
        ]
        parts.append("\n".join([_HEAD, *rows]))
    return "\n\n".join(parts) + "\n"


def _fields(node: ast.ClassDef) -> Iterator[tuple[str, str, str, str]]:
    """(name, type, default, docstring) of a dataclass's fields."""
    following = [*node.body[1:], None]
    for statement, after in zip(node.body, following, strict=True):
        if not isinstance(statement, ast.AnnAssign) or not isinstance(statement.target, ast.Name):
            continue
        text = ""
        if isinstance(after, ast.Expr) and isinstance(after.value, ast.Constant) and isinstance(after.value.value, str):
            text = after.value.value
        default = "" if statement.value is None else ast.unparse(statement.value)
        yield statement.target.id, ast.unparse(statement.annotation), default, text


def _legal(field: str) -> str:
    if field in CHOICES:
        return ", ".join(f"`{choice}`" for choice in CHOICES[field])
    return str(BOUNDS.get(field, "")).replace("2147483647", "2³¹ − 1").replace("9223372036854775807", "2⁶³ − 1")


def _code(default: str) -> str:
    text = {"None": "null", "True": "true", "False": "false"}.get(default, default).strip("'\"")
    return f"`{text}`" if text else "(required)"


def _plain(docstring: str) -> str:
    """ReStructuredText marks as Markdown, on one line."""
    text = re.sub(r":\w+:`~?([^`]+)`", r"`\1`", " ".join(docstring.split())).replace("``", "`")
    return _escaped(text)


def _escaped(text: str) -> str:
    return text.replace("|", "\\|")


def commands_page() -> str:
    """The help of every command, as it prints it."""
    parts = [
        "# Every command",
        MADE,
        "`megalm COMMAND --help` prints the same. In a checkout, `tools/prepare_data.py`, `train_tokenizer.py`, "
        "`convert_checkpoint.py` and `inspect_checkpoint.py` are `megalm prepare`, `tokenizer`, `convert` and "
        "`inspect`. Exit codes: [exit-codes.md](exit-codes.md).",
    ]
    for name, command in COMMANDS.items():
        parts += [f"## megalm {name}", command.help, f"```text\n{_help(name)}\n```"]
    return "\n\n".join(parts) + "\n"


def _help(name: str) -> str:
    out = io.StringIO()
    before = os.environ.get("COLUMNS")
    os.environ["COLUMNS"] = "110"
    try:
        with contextlib.redirect_stdout(out):
            megalm([name, "--help"])
    finally:
        os.environ.pop("COLUMNS") if before is None else os.environ.update(COLUMNS=before)
    cores = os.cpu_count() or 1
    return out.getvalue().rstrip().replace(f"(default: {cores})", "(default: one per core)")


EXIT_CODES = {
    "DONE": ("done", "all", "nothing"),
    "PEER_FAILED": (
        "a rank lost the others, and cannot ask why",
        "`train` under srun",
        "see the rank that failed first",
    ),
    "BAD_CONFIG": ("config, layout or command line are wrong", "all", "each line says what would be right"),
    "BAD_DATA": ("data or a checkpoint is missing, damaged, or another run's", "all", "the line names the file"),
    "DIVERGED": ("loss or gradient norm is not finite", "`train`", "a lower `optim.lr`, or bf16 for fp16"),
    "NOT_PROVEN": ("a layout does not train like one process", "`verify`", "do not train on it; see the certificate"),
    "BUG": ("a bug in megalm", "all", "report it with the traceback and `config.yaml`"),
    "REQUEUE": ("saved after a scheduler's signal", "`train`", "queue the same command again"),
    "INTERRUPTED": ("interrupted; a run has saved", "all", "the same command goes on"),
    "BROKEN_PIPE": ("the reader of its output has left", "commands that only print", "nothing"),
}
"""What each exit code means, who returns it, and what to do."""


def exit_codes_page() -> str:
    """A row per member of ``ExitCode``."""
    from megalm.errors import ExitCode

    rows = [f"| {code.value} | {' | '.join(EXIT_CODES[code.name])} |" for code in ExitCode]
    return (
        "\n\n".join(
            [
                "# Exit codes",
                MADE,
                "Scripts may rely on these under `megalm train`, mpirun and srun. torchrun turns every code but 0 "
                "into 1. Under srun the job's code is that of the rank that failed first. `megalm inspect --diff` "
                "exits 1 where two checkpoints differ, as diff(1) does.",
                "\n".join(["| code | meaning | of | what to do |", "| ---: | --- | --- | --- |", *rows]),
            ]
        )
        + "\n"
    )


ROOMS = {
    "cli": "one file per command",
    "api": "import megalm",
    "dryrun": "a step without devices",
    "training": "loop, callbacks, saving",
    "verify": "proof of a layout",
    "evaluate": "perplexity, tasks",
    "convert": "other formats",
    "generate": "text from a run",
    "plan": "checks and sizes of a run",
    "runs": "a run's folder and record",
    "engine": "ZeRO, buckets, AdamW",
    "checkpoint": "manifest, writer, reader",
    "launch": "jobs of ranks",
    "objectives": "what is learnt",
    "models": "the Transformer",
    "data": "text to shards to batches",
    "core": "parallel layers, pipeline",
    "config": "schema, rules, composition",
    "mesh": "axes, groups, parameters",
    "figure": "pictures without display",
    "ownership": "one process per folder",
    "errors": "errors and exit codes",
    "version": "the version",
}
"""What is in each room, in a few words."""


def drawing() -> str:
    """Packages by layer, and their imports; an arrow that follows from others is left out."""
    modules = modules_of(ROOT)
    layers = layers_of(ROOT)
    rooms = [room for row in layers for room in row if f"{room}" != "megalm.__main__"]
    edges = _edges(imports_of(modules), rooms)
    rows = [[room for room in row if room in rooms] for row in layers]
    rows = [row for row in rows if row]
    places = {}
    for height, row in enumerate(rows):
        start = (WIDTH - len(row) * BOX_WIDTH - (len(row) - 1) * GAP) / 2
        for number, room in enumerate(row):
            places[room] = (start + number * (BOX_WIDTH + GAP), 20 + height * ROW_HEIGHT)
    parts = [_arrow(places[a], places[b]) for a, b in sorted(edges)]
    parts += [_box(room, *places[room]) for room in rooms]
    height = 20 + len(rows) * ROW_HEIGHT
    style = (
        "text{font-family:sans-serif;fill:#1f2d3d}.n{font-size:16px;font-weight:600}.l{font-size:11px;fill:#5b6b7b}"
        "rect{fill:#eef3f9;stroke:#3366a8;stroke-width:1.2}path{fill:none;stroke:#8a9bb0;stroke-width:1.2}"
    )
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height}" width="{WIDTH}" height="{height}">\n'
        f"<style>{style}</style>\n"
        '<defs><marker id="a" viewBox="0 0 8 8" refX="7" refY="4" markerWidth="7" markerHeight="7" orient="auto">'
        '<path d="M0 0L8 4L0 8z" style="fill:#8a9bb0;stroke:none"/></marker></defs>\n'
        f'<rect x="0" y="0" width="{WIDTH}" height="{height}" style="fill:#ffffff;stroke:none"/>\n'
        + "\n".join(parts)
        + "\n</svg>\n"
    )


def _edges(imports: dict[str, set[str]], rooms: list[str]) -> set[tuple[str, str]]:
    """Imports between rooms, without those that follow from a chain of others."""

    def room_of(name: str) -> str | None:
        return next((room for room in rooms if name == room or name.startswith(f"{room}.")), None)

    direct: dict[str, set[str]] = {room: set() for room in rooms}
    for name, others in imports.items():
        for other in others:
            a, b = room_of(name), room_of(other)
            if a and b and a != b:
                direct[a].add(b)
    reached: dict[str, set[str]] = {}

    def reach(room: str) -> set[str]:
        if room not in reached:
            reached[room] = set().union(*({b} | reach(b) for b in direct[room])) if direct[room] else set()
        return reached[room]

    return {(a, b) for a in rooms for b in direct[a] if not any(b in reach(c) for c in direct[a] if c != b)}


def _arrow(start: tuple[float, float], end: tuple[float, float]) -> str:
    x1, y1 = start[0] + BOX_WIDTH / 2, start[1] + BOX_HEIGHT
    x2, y2 = end[0] + BOX_WIDTH / 2, end[1] - 2
    middle = (y1 + y2) / 2
    curve = f"M{x1:.0f} {y1:.0f}C{x1:.0f} {middle:.0f} {x2:.0f} {middle:.0f} {x2:.0f} {y2:.0f}"
    return f'<path d="{curve}" marker-end="url(#a)"/>'


def _box(room: str, x: float, y: float) -> str:
    name, centre = room.removeprefix("megalm."), x + BOX_WIDTH / 2
    about = escape(ROOMS[name])
    return (
        f'<rect x="{x:.0f}" y="{y:.0f}" width="{BOX_WIDTH}" height="{BOX_HEIGHT}" rx="7"/>'
        f'<text class="n" x="{centre:.0f}" y="{y + 20:.0f}" text-anchor="middle">{name}</text>'
        f'<text class="l" x="{centre:.0f}" y="{y + 37:.0f}" text-anchor="middle">{about}</text>'
    )


PAGES = {
    "config.md": config_page,
    "commands.md": commands_page,
    "exit-codes.md": exit_codes_page,
    "architecture.svg": drawing,
}


def main() -> int:
    """Write the pages, or check them."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="write nothing")
    check = parser.parse_args().check
    stale = []
    for name, make in PAGES.items():
        path, text = ROOT / "docs" / name, make()
        if not path.exists() or path.read_text(encoding="utf-8") != text:
            stale.append(name)
            if not check:
                path.write_text(text, encoding="utf-8")
                print(f"docs/{name}: written")
    if check and stale:
        print(f"{', '.join(stale)}: not what the code says; run tools/docs.py", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
