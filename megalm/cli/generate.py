"""``megalm generate``."""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from megalm.cli.command import add_run, parse, tell_unused
from megalm.cli.table import COMMANDS
from megalm.errors import ExitCode
from megalm.runs.folder import run_folder_of


def main(arguments: Sequence[str], prog: str) -> int:
    """Run the command; ``prog`` is what it was called as. Returns its exit code."""
    options = parse(prog, COMMANDS["generate"].help, arguments, _add_options)
    tell_unused("generate", options.overrides)
    from megalm.generate.run import run_generate

    text = run_generate(
        run_folder_of(options.run),
        options.prompt,
        max_new_tokens=options.max_new_tokens,
        temperature=options.temperature,
        top_k=options.top_k,
        seed=options.seed,
        overrides=options.overrides,
    )
    print(text)
    return ExitCode.DONE


def _add_options(parser: argparse.ArgumentParser) -> None:
    add_run(parser)
    parser.add_argument("--prompt", required=True, help="text to continue; any text, quoted for the shell alone")
    parser.add_argument("--max-new-tokens", type=int, default=120, metavar="N", help="default: %(default)s")
    parser.add_argument("--temperature", type=float, default=0.8, metavar="T", help="default: %(default)s; 0: greedy")
    parser.add_argument("--top-k", type=int, default=40, metavar="K", help="default: %(default)s; 0: no limit")
    parser.add_argument("--seed", type=int, default=1234, metavar="S", help="of the draws; default: %(default)s")
