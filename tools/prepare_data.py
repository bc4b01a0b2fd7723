#!/usr/bin/env python3
"""Prepare a corpus for training: documents ▶ tokens ▶ shards, split into training and validation.

    tools/prepare_data.py --corpus stdlib --tokenizer-vocab 4096 --out data/quickstart
    tools/prepare_data.py --corpus text --input books/ --tokenizer tokenizer.json --out data/books
    tools/prepare_data.py --verify data/books

Exit codes: 0 done, 2 bad arguments, 3 bad data.
"""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path
from typing import NoReturn

from megalm.data.corpora import CORPORA
from megalm.data.dataset import SPLITS, inspect_dataset
from megalm.data.prepare import Recipe, prepare
from megalm.data.progress import PrepareProgress, summary
from megalm.data.shards import find_corruption
from megalm.data.tokenizer import SMALLEST_VOCABULARY
from megalm.errors import ExitCode, MegalmError


def main(arguments: list[str] | None = None) -> int:
    """Run the tool; returns its exit code."""
    parser = _parser()
    options = parser.parse_args(arguments)
    try:
        return _verify(Path(options.verify)) if options.verify else _prepare(parser, options)
    except MegalmError as error:
        print(error, file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt:
        print("interrupted; nothing was written", file=sys.stderr)
        return ExitCode.INTERRUPTED
    except OSError as error:  # no permission, disk full
        print(f"{error.filename or options.out}: {error.strerror}", file=sys.stderr)
        return ExitCode.BAD_DATA


def _prepare(parser: argparse.ArgumentParser, options: argparse.Namespace) -> int:
    if problems := _problems(options):
        parser.error("\n".join(problems))
    recipe = Recipe(
        corpus=options.corpus,
        inputs=tuple(options.input),
        tokenizer=options.tokenizer,
        tokenizer_vocab=options.tokenizer_vocab,
        val_fraction=options.val_fraction,
        chunk_tokens=options.chunk_tokens,
    )
    out = Path(options.out)
    with PrepareProgress() as progress:
        counts = prepare(recipe, out, workers=options.workers, overwrite=options.overwrite, progress=progress.update)
    info = inspect_dataset(out)
    print(summary(info, counts))
    return ExitCode.DONE


def _verify(folder: Path) -> int:
    faults = [fault for split in SPLITS for fault in find_corruption(folder / split)]
    for fault in faults:
        print(fault, file=sys.stderr)
    if faults:
        return ExitCode.BAD_DATA
    print(f"{folder}: every chunk of {' and '.join(SPLITS)} is as it was written")
    return ExitCode.DONE


def _problems(options: argparse.Namespace) -> list[str]:
    problems = []
    if options.corpus is None or options.out is None:
        problems.append("--corpus and --out are needed (or --verify DIR)")
    if (options.tokenizer is None) == (options.tokenizer_vocab is None):
        problems.append("give either --tokenizer with a tokenizer.json, or --tokenizer-vocab to train one")
    if options.tokenizer_vocab is not None and options.tokenizer_vocab < SMALLEST_VOCABULARY:
        problems.append(f"--tokenizer-vocab {options.tokenizer_vocab}: must be at least {SMALLEST_VOCABULARY}")
    if not 0.0 < options.val_fraction < 1.0:
        problems.append(f"--val-fraction {options.val_fraction}: must lie between 0 and 1")
    if options.chunk_tokens < 1:
        problems.append(f"--chunk-tokens {options.chunk_tokens}: must be positive")
    if options.workers < 1:
        problems.append(f"--workers {options.workers}: must be at least 1")
    return problems


class _Parser(argparse.ArgumentParser):
    """Reports mistakes as lines that say what would be right, without the usage of every option above them."""

    def error(self, message: str) -> NoReturn:
        self.exit(ExitCode.BAD_CONFIG, f"{message}\n")


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)
    parser.add_argument("--corpus", choices=sorted(CORPORA), help="kind of corpus")
    parser.add_argument("--input", nargs="+", default=[], metavar="PATH", help="files or folders (corpus text)")
    parser.add_argument("--tokenizer", metavar="FILE", help="tokenizer.json to use")
    parser.add_argument("--tokenizer-vocab", type=int, metavar="N", help="train a byte-level BPE of N tokens instead")
    parser.add_argument("--out", metavar="DIR", help="dataset to write")
    parser.add_argument("--val-fraction", type=float, default=Recipe.val_fraction, help="share of validation documents")
    parser.add_argument(
        "--chunk-tokens", type=int, default=Recipe.chunk_tokens, help="tokens per chunk; sequence lengths divide it"
    )
    parser.add_argument(
        "--workers", type=int, default=os.cpu_count() or 1, help="processes; does not change the output"
    )
    parser.add_argument("--overwrite", action="store_true", help="replace DIR if it was prepared differently")
    parser.add_argument("--verify", metavar="DIR", help="read all of a dataset and name each corrupt chunk")
    return parser


if __name__ == "__main__":
    sys.exit(main())
