#!/usr/bin/env python3
"""Show what a checkpoint holds, and optionally prove that every byte of it is intact.

    tools/inspect_checkpoint.py runs/quickstart
    tools/inspect_checkpoint.py runs/quickstart/checkpoints/step-00000200 --verify

Exit codes: 0 done, 2 bad arguments, 3 no such checkpoint, or a damaged one.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Mapping
from math import prod
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from megalm.checkpoint.manifest import Manifest, TensorRecord, read_manifest
from megalm.checkpoint.store import locate
from megalm.errors import ExitCode, MegalmError


def main(arguments: list[str] | None = None) -> int:
    """Run the tool; returns its exit code."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("path", metavar="PATH", help="a checkpoint, or a run: then its newest complete checkpoint")
    parser.add_argument("--verify", action="store_true", help="read every tensor and check its sha256")
    options = parser.parse_args(arguments)
    console = Console()
    try:
        info = locate(options.path)
        manifest = read_manifest(info.path)
        console.print(_summary(str(info.path), manifest), _tensors(manifest))
        faults = _find_faults(console, info.path) if options.verify else []
    except MegalmError as error:
        print(error, file=sys.stderr)
        return error.exit_code
    for fault in faults:
        print(fault, file=sys.stderr)
    if options.verify and not faults:
        print(f"{info.path}: every tensor is whole and every sha256 is right")
    return ExitCode.BAD_DATA if faults else ExitCode.DONE


def _find_faults(console: Console, path: Any) -> list[str]:
    from megalm.checkpoint.reader import CheckpointReader  # torch, which a look at the manifest does not need

    with console.status("reading every tensor"):
        return list(CheckpointReader(path).find_corruption())


def _summary(path: str, manifest: Manifest) -> Table:
    table = Table(show_header=False, box=None)
    parameters = sum(prod(record.shape) for record in manifest.tensors.values())
    rows = {
        "checkpoint": path,
        "step": f"{manifest.step:,}",
        "written by": f"megalm {manifest.megalm_version}",
        "parameters": f"{parameters:,}",
        "layout": _pairs(manifest.topology),
        "model": _pairs(manifest.config.get("model", {})),
        "progress": _pairs(manifest.training.get("progress", {})),
        "optimizer": _pairs(manifest.training.get("engine", {})),
        "data": _pairs(manifest.data),
    }
    for name, value in rows.items():
        table.add_row(f"[bold]{name}[/bold]", escape(value))
    return table


def _tensors(manifest: Manifest) -> Table:
    table = Table(title=f"{len(manifest.tensors)} tensors")
    for column in ("tensor", "shape", "sliced along", "kinds"):
        table.add_column(column)
    for column in ("pieces", "files", "MiB"):
        table.add_column(column, justify="right")
    for name, record in manifest.tensors.items():
        stored_bytes = 4 * sum(piece.length for piece in record.pieces)  # fp32, the only type that is written
        table.add_row(
            escape(name),
            "×".join(map(str, record.shape)),
            _slicing(record),
            escape(" ".join(sorted({piece.kind for piece in record.pieces}))),
            str(len(record.pieces)),
            str(len({piece.file for piece in record.pieces})),
            f"{stored_bytes / 2**20:.2f}",
        )
    return table


def _slicing(record: TensorRecord) -> str:
    """How tensor parallelism cut a tensor: ``dim 0, 2 ways`` or ``whole``."""
    cuts = {(piece.dim, piece.ranges) for piece in record.pieces if piece.dim is not None}
    dims = sorted({dim for dim, _ in cuts if dim is not None})
    return f"dim {', '.join(map(str, dims))}, {len(cuts)} way{'s' if len(cuts) > 1 else ''}" if cuts else "whole"


def _pairs(mapping: Mapping[str, Any]) -> str:
    return "  ".join(f"{name}={json.dumps(value)}" for name, value in mapping.items() if value is not None)


if __name__ == "__main__":
    sys.exit(main())
