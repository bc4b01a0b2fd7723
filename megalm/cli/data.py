"""``megalm data show``: a dataset's text and documents, or what of its data a run has read. No torch."""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Sequence
from pathlib import Path

from megalm.cli.command import parse
from megalm.config.arguments import user_path
from megalm.data.shards.store import is_remote
from megalm.errors import ConfigError, ExitCode
from megalm.runs.folder import CONFIG_FILE, run_folder_of

_DESCRIPTION = (
    "Of a dataset: its text, document by document, as a model sees it. Of a run: which documents a step read, and "
    "which steps read a document."
)
_OF_RUN, _OF_DATASET = ("step", "document"), ("documents", "find", "split", "limit")


def main(arguments: Sequence[str], prog: str) -> int:
    """Run the command; ``prog`` is what it was called as. Returns its exit code."""
    options = parse(prog, _DESCRIPTION, arguments, _add_options)
    for line in _lines(options):
        print(line)
    return ExitCode.DONE


def _lines(options: argparse.Namespace) -> Iterator[str]:
    of_run = [name for name in _OF_RUN if getattr(options, name) is not None]
    of_dataset = [name for name in _OF_DATASET if getattr(options, name)]
    run = run_folder_of(options.what)
    is_run = (run / CONFIG_FILE).exists()
    is_dataset = is_remote(options.what) or (Path(options.what) / "train").is_dir()
    if is_dataset and of_run:
        raise ConfigError(
            f"--{of_run[0]}: {options.what} is a dataset, and this is an option for a run, such as runs/quickstart; "
            "--find TEXT finds documents of a dataset"
        )
    if is_run and of_dataset:
        raise ConfigError(f"--{of_dataset[0]}: {options.what} is a run; give a dataset, such as the run's data.path")
    if is_run or of_run:
        from megalm.cli.data_of_run import show_lines

        yield from show_lines(
            run, step=options.step, document=options.document, as_json=options.json, overrides=options.overrides
        )
        return
    from megalm.cli.data_of_dataset import dataset_lines

    yield from dataset_lines(
        options.what,
        split=options.split or "train",
        listed=options.documents,
        find=options.find,
        limit=options.limit,
        as_json=options.json,
    )


def _add_options(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("action", choices=["show"], help="show what there is")
    add("what", type=user_path, metavar="DATASET|RUN", help="a prepared dataset (folder or address), or a run")
    add("--json", action="store_true", help="one JSON object a line")
    dataset = parser.add_argument_group("of a dataset").add_argument
    dataset("--split", choices=("train", "val"), help="which split (default: train)")
    dataset("--documents", action="store_true", help="list names and lengths instead of text")
    dataset("--find", metavar="TEXT", help="only documents whose name contains this, in any case")
    dataset("--limit", type=int, metavar="N", help="most documents (default: 5, or all with --documents)")
    run = parser.add_argument_group("of a run").add_argument
    run("--step", type=int, metavar="N", help="list the documents and shards of this step")
    run("--document", metavar="NAME", help="list the steps so far that read this document")
