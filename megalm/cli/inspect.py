"""Show what a checkpoint holds, prove that every byte of it is intact, or say what differs between two.

    megalm inspect runs/quickstart
    megalm inspect runs/quickstart/checkpoints/step-00000200 --verify
    megalm inspect runs/quickstart --diff runs/other

Exit codes: 0 done, or equal but for names, 1 the two differ, 2 bad arguments, 3 no such checkpoint, or a damaged one;
141 the reader of its output has left.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Mapping, Sequence
from math import prod
from pathlib import Path
from typing import Any

from rich import box
from rich.console import Console
from rich.markup import escape
from rich.table import Column, Table

from megalm.checkpoint.manifest import Manifest, combined_hash, read_manifest
from megalm.checkpoint.pieces import TensorRecord
from megalm.checkpoint.store import CheckpointInfo, describe_torn, locate, torn_checkpoints
from megalm.config.arguments import LineParser, user_path
from megalm.errors import ExitCode
from megalm.launch.guard import guarded

DIFFERENT = 1
"""Exit code of ``--diff``, as of diff(1)."""


def main(arguments: Sequence[str], prog: str) -> int:
    """Run the command; ``prog`` is what it was called as. Returns its exit code."""
    parser = LineParser(
        prog=prog, description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    add = parser.add_argument
    add("path", type=user_path, metavar="PATH", help="a checkpoint, or a run: then its newest complete checkpoint")
    add("--verify", action="store_true", help="read every tensor and check its sha256")
    add("--diff", type=user_path, metavar="OTHER", help="say what differs from this one, instead of showing PATH")
    options = parser.parse_args(arguments)
    return guarded(lambda: _inspect(options))


def _inspect(options: argparse.Namespace) -> int:
    console = Console(soft_wrap=True, highlight=False)
    shown = locate(options.path)
    other = locate(options.diff) if options.diff is not None else None
    if other is None:
        _show(console, shown)
    faults = [fault for info in (shown, other) if options.verify and info for fault in _find_faults(console, info)]
    if not faults and other is not None:
        return _diff(console, shown, other)
    for fault in faults:
        print(fault, file=sys.stderr)
    if options.verify and not faults:
        print(f"{shown.path}: every tensor is whole and every sha256 is right")
    return ExitCode.BAD_DATA if faults else ExitCode.DONE


def _show(console: Console, info: CheckpointInfo) -> None:
    manifest = read_manifest(info.path)
    console.print(_summary(info.path, manifest))
    _print_rows(console, _tensors(manifest))
    for path in torn_checkpoints(info.path.parent):
        console.print(f"ignored: {path}, {describe_torn(path)}, or one that goes on just now", markup=False)


def _find_faults(console: Console, info: CheckpointInfo) -> list[str]:
    from megalm.checkpoint.reader import CheckpointReader  # torch, which a look at the manifest does not need

    with console.status("reading every tensor"):
        return list(CheckpointReader(info.path).find_corruption())


def _diff(console: Console, first: CheckpointInfo, second: CheckpointInfo) -> int:
    """Say what differs; the exit code."""
    from megalm.checkpoint.compare import is_label, setting_differences, tensor_differences
    from megalm.checkpoint.reader import CheckpointReader

    readers = CheckpointReader(first.path), CheckpointReader(second.path)
    settings = setting_differences(readers[0].manifest, readers[1].manifest)
    with console.status("comparing tensors"):
        tensors = list(tensor_differences(*readers))
    console.print(f"first   {first.path}\nsecond  {second.path}", markup=False)
    if settings:
        console.print(
            _table(("setting", "first", "second"), [(s.name, *map(_text, (s.first, s.second))) for s in settings])
        )
    if tensors:
        _print_rows(console, _table(("tensor", "kind", "difference"), [(t.name, t.kind, t.what) for t in tensors]))
    total = sum(len(reader.manifest.tensors) for reader in readers) // 2
    if not tensors:
        console.print(f"tensors: all {total} are equal, in {', '.join(readers[0].manifest.kinds)}")
    if not settings:
        console.print("settings: equal")
    matters = [setting for setting in settings if not is_label(setting.name)]
    if settings and not matters and not tensors:
        console.print("same weights and state: the settings that differ name and show a run, and change nothing in it")
    return DIFFERENT if matters or tensors else ExitCode.DONE


def _summary(path: Path, manifest: Manifest) -> Table:
    table = Table(Column(), Column(overflow="fold"), show_header=False, box=None)
    parameters = sum(prod(record.shape) for record in manifest.tensors.values())
    config = manifest.config
    rows = {
        "checkpoint": str(path),
        "step": f"{manifest.step:,}",
        "written by": f"megalm {manifest.megalm_version}",
        "parameters": f"{parameters:,}",
        "hash": _hash(manifest),
        "layout": _pairs(manifest.topology),
        **{name: _pairs(config.get(name, {})) for name in ("model", "objective", "optim", "engine", "train")},
        "progress": _pairs(manifest.training.get("progress", {})) or "none: weights alone",
        "optimizer": _pairs(manifest.training.get("engine", {})),
        "validation": _pairs(manifest.training.get("validation", {})),
        "parent": _pairs(manifest.training.get("parent") or {}),
        "imported": _pairs(manifest.training.get("imported") or {}),
        "schedule": _pairs(manifest.training.get("schedule") or {}),
        "data": _pairs({name: value for name, value in manifest.data.items() if name != "corpora"}),
        "read": "\n".join(_read(entry) for entry in manifest.data.get("corpora", ())),
    }
    for name, value in rows.items():
        if value:
            table.add_row(f"[bold]{name}[/bold]", escape(value))
    return table


def _hash(manifest: Manifest) -> str:
    """The hash of the parameters that ``megalm train`` prints when it loads them."""
    fingerprints = manifest.fingerprints
    return "none: the format's version has no fingerprints" if fingerprints is None else combined_hash(fingerprints)


def _tensors(manifest: Manifest) -> Table:
    table = _table(("tensor", "shape", "sliced along"), [])
    for column in ("pieces", "files", "MiB"):
        table.add_column(column, justify="right")
    table.add_column("weight's hash")
    table.add_column("kinds")
    for name, record in manifest.tensors.items():
        stored_bytes = 4 * sum(piece.length for piece in record.pieces)  # fp32, the only type that is written
        table.add_row(
            escape(name),
            "×".join(map(str, record.shape)),
            _slicing(record),
            str(len(record.pieces)),
            str(len({piece.file for piece in record.pieces})),
            f"{stored_bytes / 2**20:.2f}",
            record.fingerprint or "",
            escape(" ".join(sorted({piece.kind for piece in record.pieces}))),
        )
    table.caption, table.caption_justify = f"{len(manifest.tensors)} tensors", "left"
    return table


def _slicing(record: TensorRecord) -> str:
    """How tensor parallelism cut a tensor: ``dim 0, 2 ways`` or ``whole``."""
    slices = {tuple((cut.dim, cut.ranges) for cut in piece.cuts) for piece in record.pieces if piece.cuts}
    dims = sorted({dim for cuts in slices for dim, _ in cuts})
    return f"dim {', '.join(map(str, dims))}, {len(slices)} way{'s' if len(slices) > 1 else ''}" if slices else "whole"


def _table(columns: tuple[str, ...], rows: list[tuple[str, ...]]) -> Table:
    table = Table(*(Column(name, overflow="fold") for name in columns), box=box.SIMPLE_HEAD, pad_edge=False)
    for row in rows:
        table.add_row(*map(escape, row))
    return table


def _print_rows(console: Console, table: Table) -> None:
    """A line per row, however long: names stay whole, and ``grep`` finds what belongs to them."""
    wide = Console(highlight=False, width=_UNLIMITED)
    Console(highlight=False, width=max(console.width, wide.measure(table).maximum)).print(table)


_UNLIMITED = 10_000
"""Columns; what a table needs is less."""


def _pairs(mapping: Mapping[str, Any]) -> str:
    return "  ".join(f"{name}={_text(value)}" for name, value in mapping.items() if value is not None)


def _read(entry: Mapping[str, Any]) -> str:
    """What was read of one corpus in one phase."""
    return (
        f"{entry['path']}: {entry['samples']:,} samples, {entry['tokens']:,} tokens, {entry['epochs']:.2f} epochs in "
        f"phase {entry['phase']}"
    )


def _text(value: Any) -> str:
    return "" if value is None else json.dumps(value, ensure_ascii=False)
