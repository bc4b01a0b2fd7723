"""How ``megalm evaluate --task`` shows what it found: tables, or one JSON object. No torch."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from pathlib import Path

from rich import box
from rich.console import Console
from rich.markup import escape
from rich.table import Column, Table

from megalm.config.schema import Config
from megalm.evaluate.tasks import compare, results
from megalm.evaluate.tasks.compare import MetricComparison
from megalm.evaluate.tasks.run import TaskResult

_LEAST_WIDTH = 120


def show_results(found: Sequence[TaskResult], config: Config, files: Sequence[Path], *, as_json: bool) -> None:
    """Print what a run reached.

    Args:
        found: of its tasks.
        config: of the run.
        files: where it is kept.
        as_json: one object ``{"results": [...], "files": [...]}`` instead of a table.
    """
    if as_json:
        records = [results.as_json(each, config) for each in found]
        print_json({"results": records, "files": [str(file) for file in files]})
        return
    print_table(results.HEADINGS, results.table(found))
    for line in (*results.signatures(found), *(note for each in found for note in each.notes())):
        print(line)
    for file in files:
        print(f"kept in  {file}, and its items in {file.with_suffix('.jsonl').name}")


def show_comparison(names: tuple[str, str], found: Sequence[MetricComparison], *, as_json: bool) -> None:
    """Print how two runs differ.

    Args:
        names: of A and of B.
        found: by task and metric.
        as_json: one object ``{"A": ..., "B": ..., "comparison": [...]}`` instead of a table.
    """
    if as_json:
        print_json({"A": names[0], "B": names[1], "comparison": [each.as_json() for each in found]})
        return
    print(f"A is {names[0]}, B is {names[1]}")
    print_table(compare.HEADINGS, [each.row() for each in found])


def print_json(value: object) -> None:
    """One JSON object on standard output."""
    print(json.dumps(value, ensure_ascii=False, allow_nan=False, indent=1))


def print_table(headings: Iterable[str], rows: Iterable[tuple[str, ...]]) -> None:
    """A table on standard output; its first column is text."""
    columns = [Column(escape(name), justify="left" if number == 0 else "right") for number, name in enumerate(headings)]
    table = Table(*columns, box=box.SIMPLE_HEAD, pad_edge=False)
    for row in rows:
        table.add_row(*map(escape, row))
    # A narrower terminal wraps lines; rich would cut names and numbers short.
    Console(highlight=False, soft_wrap=True, width=max(Console().width, _LEAST_WIDTH)).print(table)
