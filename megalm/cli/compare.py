"""``megalm compare``. No torch."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from rich import box
from rich.console import Console
from rich.markup import escape
from rich.table import Column, Table

from megalm.config.arguments import LineParser, user_path
from megalm.errors import ExitCode
from megalm.runs.compare import Comparison
from megalm.runs.folder import run_folder_of

_DESCRIPTION = "What two or more runs have reached, what differs in their configs and data, and their loss curves."


def main(arguments: Sequence[str], prog: str) -> int:
    """Run the command; ``prog`` is what it was called as. Returns its exit code."""
    parser = LineParser(prog=prog, description=_DESCRIPTION, allow_abbrev=False)
    add = parser.add_argument
    add("runs", nargs="+", type=user_path, metavar="RUN", help="folder of a run, or its name in runs/")
    add("--out", type=user_path, metavar="FILE", help="draw the loss curves here: .png, .svg or .pdf")
    add("--json", action="store_true", help="one JSON object instead of tables")
    options = parser.parse_args(arguments)
    comparison = Comparison.of([run_folder_of(run) for run in options.runs])
    if options.json:
        print(json.dumps(_as_json(comparison), ensure_ascii=False, indent=1))
    else:
        _print(comparison)
    if options.out is not None:
        comparison.save_picture(Path(options.out))
        if not options.json:
            print(f"curves   {options.out}")
    return ExitCode.DONE


def _print(comparison: Comparison) -> None:
    console = Console(highlight=False, soft_wrap=True)
    console.print(_table(comparison, "", comparison.table()))
    if differences := comparison.differences():
        console.print(_table(comparison, "differs in", differences))
    else:
        console.print("their configs and data are the same")


def _table(comparison: Comparison, title: str, rows: list[tuple[str, ...]]) -> Table:
    columns = [title, *comparison.names()]
    table = Table(*(Column(escape(name), overflow="fold") for name in columns), box=box.SIMPLE_HEAD, pad_edge=False)
    for row in rows:
        table.add_row(*map(escape, row))
    return table


def _as_json(comparison: Comparison) -> dict[str, object]:
    names = comparison.names()
    return {
        "figures": {label: dict(zip(names, values, strict=True)) for label, *values in comparison.table()},
        "differences": {field: dict(zip(names, values, strict=True)) for field, *values in comparison.differences()},
    }
