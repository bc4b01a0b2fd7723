"""Convert a model between megalm's checkpoints and other formats.

    megalm convert --from megalm --to hf runs/quickstart exported/quickstart --verify
    megalm convert --from hf --to megalm models/pythia-160m runs/pythia-160m --tp 2 --pp 2
    megalm convert --from openai-gpt2 --to megalm models/124M runs/gpt2
    megalm convert --from megalm --to megatron runs/quickstart exported/megatron --tp 2

Tensors pass one by one: memory is bounded by the largest. Weights keep their dtype unless --dtype names another. DST
appears when it is complete, and not at all after an error. --verify needs memory for the whole model in fp32, in fp64
where rounding has to be told from error.
Exit codes: 0 done, 2 bad arguments, 3 a source that is damaged or cannot be converted, or failed --verify, 70 a bug,
130 interrupted by Ctrl-C or SIGTERM.
"""

from __future__ import annotations

import argparse
import signal
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Self

from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn

from megalm.config.arguments import LineParser, user_path
from megalm.errors import ExitCode
from megalm.launch.guard import guarded

if TYPE_CHECKING:
    from megalm.convert.convert import Report

_SOURCES = ("megalm", "hf", "megatron", "openai-gpt2", "deepspeed")
_TARGETS = ("megalm", "hf", "megatron")
_DTYPES = ("source", "fp32", "bf16", "fp16")
_MOST_WARNINGS = 10
_SMALLEST_SHARD_GB, _LARGEST_SHARD_GB = 0.001, 1_000_000


def main(arguments: Sequence[str], prog: str) -> int:
    """Run the command; ``prog`` is what it was called as. Returns its exit code."""
    parser = _parser(prog)
    options = parser.parse_args(arguments)
    shard_gb = options.shard_gb
    if shard_gb is not None and not _SMALLEST_SHARD_GB <= shard_gb <= _LARGEST_SHARD_GB:  # nor is NaN between them
        parser.error(f"--shard-gb {shard_gb:g}: must lie between {_SMALLEST_SHARD_GB} and {_LARGEST_SHARD_GB}")
    # Torch takes a second: mistakes in the arguments do not wait for it.
    from megalm.convert.convert import Request, convert

    request = Request(
        source_format=options.source_format,
        target_format=options.target_format,
        source=Path(options.source),
        target=Path(options.target),
        tp=options.tp,
        pp=options.pp,
        dtype=options.dtype,
        shard_bytes=None if shard_gb is None else round(shard_gb * 1e9),
        verify=options.verify,
    )

    def run() -> int:
        with _terminated_as_interrupted(), _Bar() as bar:
            _tell(convert(request, bar))
        return ExitCode.DONE

    return guarded(run, interrupted=f"interrupted; nothing was written to {request.target}")


@contextmanager
def _terminated_as_interrupted() -> Iterator[None]:
    """SIGTERM, with which a scheduler ends a job, does what Ctrl-C does."""
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _tell(report: Report) -> None:
    for warning in report.warnings[:_MOST_WARNINGS]:
        print(f"warning: {warning}", file=sys.stderr)
    if len(report.warnings) > _MOST_WARNINGS:
        print(f"warning: and {len(report.warnings) - _MOST_WARNINGS} more such tensors", file=sys.stderr)
    print(report.done, *(f"note: {note}" for note in report.notes), *report.verified, sep="\n")


class _Bar:
    """How far a conversion has come, on a terminal; nothing elsewhere."""

    def __init__(self) -> None:
        self._console = Console(stderr=True)
        self._progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            DownloadColumn(),
            TimeRemainingColumn(),
            console=self._console,
            transient=True,
            disable=not self._console.is_terminal,
        )

    def __enter__(self) -> Self:
        self._progress.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._progress.stop()

    def begin(self, what: str, total: int) -> Callable[[int], object]:
        """A phase begins; see :class:`megalm.convert.convert.Watcher`."""
        task = self._progress.add_task(what, total=total)
        return lambda size: self._progress.advance(task, size)


def _parser(prog: str) -> argparse.ArgumentParser:
    parser = LineParser(
        prog=prog, description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    add = parser.add_argument
    add("--from", required=True, choices=_SOURCES, dest="source_format", help="format of SRC")
    add("--to", required=True, choices=_TARGETS, dest="target_format", help="format of DST")
    add("source", type=user_path, metavar="SRC", help="folder or file to read; megalm: a run or a checkpoint")
    add("target", type=user_path, metavar="DST", help="folder to write; megalm: a run to evaluate, or to start from")
    add("--tp", type=int, default=1, metavar="N", help="megalm, megatron: tensor-parallel degree of DST (default: 1)")
    add("--pp", type=int, default=1, metavar="N", help="megalm, megatron: pipeline-parallel degree of DST (default: 1)")
    add("--dtype", choices=_DTYPES, default="source", help="cast weights; 16 bits lose precision (default: source)")
    add("--shard-gb", type=float, metavar="X", help="hf: most GB in one file of weights (default: 5)")
    add(
        "--verify",
        action="store_true",
        help="read DST again, compare every tensor byte for byte, and the logits of random sequences",
    )
    return parser
