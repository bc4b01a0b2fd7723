"""The ``megalm`` command. torch is imported by the commands that compute, never by those that check.

A run's folder and options are read here, before Hydra's grammar meets the overrides: a prompt may hold anything.
"""

from __future__ import annotations

import argparse
import os
import re
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from megalm import __version__
from megalm.config.arguments import user_path
from megalm.errors import ConfigError, ExitCode
from megalm.launch.console import run_on_console
from megalm.launch.guard import check_text, guarded
from megalm.launch.isolation import shield

_OVERRIDES_HELP = (
    "GROUP=OPTION (experiment=quickstart, model=gpt3_125m, parallel=tp2) and FIELD=VALUE (train.steps=50, "
    "run.name=try1); every field, its default and its meaning: megalm/config/schema.py"
)


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command.

    Returns:
        The exit code: see :class:`megalm.errors.ExitCode`.
    """
    arguments = list(sys.argv[1:] if argv is None else argv)
    works = bool(arguments) and arguments[0] in _WORKING
    shield()
    return run_on_console(lambda: guarded(lambda: _dispatch(arguments)), works=works)


@dataclass(frozen=True)
class _Command:
    """One subcommand: what it does, its options, its code."""

    help: str
    add_options: Callable[[argparse.ArgumentParser], None]
    run: Callable[[argparse.Namespace], int]


def _dispatch(arguments: list[str]) -> int:
    parser = _main_parser()
    if not arguments:
        parser.print_help()
        return ExitCode.DONE
    name, *rest = arguments
    if name not in _COMMANDS:
        parser.parse_args(arguments)  # --help, --version, or a command that does not exist
        return ExitCode.DONE
    command = _COMMANDS[name]
    own = argparse.ArgumentParser(prog=f"megalm {name}", description=command.help, allow_abbrev=False)
    command.add_options(own)
    own.add_argument("overrides", nargs="*", metavar="OVERRIDE", help=_OVERRIDES_HELP)
    if name in _COMPOSING:
        return _composed(command, own, rest)
    return command.run(_parsed(own, rest))


def _composed(command: _Command, parser: argparse.ArgumentParser, arguments: list[str]) -> int:
    """Run a command that composes a config; what finds and shows configs is imported for it alone."""
    from megalm.cli.config_options import add_config_options, check_hydra_options, config_arguments, shown

    add_config_options(parser)
    check_hydra_options(arguments)
    options = _parsed(parser, arguments)
    text = shown(options)
    if text is not None:
        print(text, end="")
        return ExitCode.DONE
    options.overrides = config_arguments(options)
    return command.run(options)


def _parsed(parser: argparse.ArgumentParser, arguments: list[str]) -> argparse.Namespace:
    options = parser.parse_intermixed_args([_override_of(argument) for argument in arguments])
    check_text([*options.overrides, *([options.prompt] if "prompt" in options else [])])
    return options


def _override_of(argument: str) -> str:
    """``--train.steps=3`` is no option to be refused with the usage of all, but a setting to be spelled right."""
    return f"+{argument.lstrip('-')}" if re.match(r"--?[a-z_]+\.[a-z_0-9]+(=|$)", argument) else argument


def _main_parser() -> argparse.ArgumentParser:
    lines = "\n".join(f"  {name:9} {command.help}" for name, command in _COMMANDS.items())
    parser = argparse.ArgumentParser(
        prog="megalm",
        description="Pretrain GPT-style language models in 3-D parallel, from a laptop to 1,024 GPUs.",
        epilog=f"commands:\n{lines}\n\n`megalm COMMAND --help` tells more.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        usage="megalm COMMAND ...",
    )
    parser.add_argument("--version", action="version", version=f"megalm {__version__}")
    parser.add_argument("command", choices=list(_COMMANDS), metavar="COMMAND", help="one of the commands below")
    return parser


def _train(options: argparse.Namespace) -> int:
    from megalm.launch.run import run_job, run_on_own_ranks
    from megalm.train.job import TRAIN

    if not options.multirun:
        return run_job(TRAIN, options.overrides)
    from megalm.cli.sweep import run_sweep
    from megalm.launch import discover

    rank = discover(os.environ)
    if rank is not None:
        raise ConfigError(
            f"-m: {rank.launcher} has started ranks, which train one run; megalm train -m starts ranks of its own, "
            "for one run after another"
        )
    return run_sweep(options.overrides, lambda overrides: run_on_own_ranks(TRAIN, overrides))


def _check(options: argparse.Namespace) -> int:
    from megalm.config.compose import composition
    from megalm.config.job import planned_world_size_of
    from megalm.config.resolved import resolved_yaml
    from megalm.plan.preflight import check_config, check_data
    from megalm.plan.summary import note_lines, summary_lines
    from megalm.runs.source_model import source_model

    composed = composition(options.overrides, source_model)
    config = composed.config
    world_size = planned_world_size_of(config)
    check_config(config, world_size)
    if options.yaml:
        print(*composed.notes, sep="\n", end="\n" if composed.notes else "", file=sys.stderr)
        print(resolved_yaml(composed), end="")
        return ExitCode.DONE
    lines = [*summary_lines(config, world_size), check_data(config), *composed.notes, *note_lines(config, world_size)]
    print(*lines, "ok", sep="\n")
    return ExitCode.DONE


def _verify(options: argparse.Namespace) -> int:
    from megalm.verify.run import run_verify

    return run_verify(options.overrides, options.json)


def _evaluate(options: argparse.Namespace) -> int:
    from megalm.evaluate.perplexity import run_evaluate

    _tell_unused("evaluate", options.overrides)
    for name, value in run_evaluate(_run_dir(options.run), options.overrides).items():
        print(f"{name:15} {value:,.6g}" if isinstance(value, float) else f"{name:15} {value}")
    return ExitCode.DONE


def _generate(options: argparse.Namespace) -> int:
    from megalm.generate.run import run_generate

    _tell_unused("generate", options.overrides)
    text = run_generate(
        _run_dir(options.run),
        options.prompt,
        max_new_tokens=options.max_new_tokens,
        temperature=options.temperature,
        top_k=options.top_k,
        seed=options.seed,
        overrides=options.overrides,
    )
    print(text)
    return ExitCode.DONE


def _tell_unused(command: str, overrides: Sequence[str]) -> None:
    from megalm.config.unused import unused_overrides

    for line in unused_overrides(command, overrides):
        print(line, file=sys.stderr)


def _data(options: argparse.Namespace) -> int:
    from megalm.cli.data_show import show_lines

    lines = show_lines(
        _run_dir(options.run),
        step=options.step,
        document=options.document,
        as_json=options.json,
        overrides=options.overrides,
    )
    for line in lines:
        print(line)
    return ExitCode.DONE


def _run_dir(run: str) -> Path:
    """The folder of a run that is given as one, or by its name where that is no folder but ``runs/NAME`` is."""
    folder, by_name = Path(run), Path("runs") / run
    return by_name if not folder.exists() and by_name.is_dir() else folder


def _train_options(parser: argparse.ArgumentParser) -> None:
    help_text = "train a run with each of the values in FIELD=A,B, one after another, each with a name of its own"
    parser.add_argument("--multirun", "-m", action="store_true", help=help_text)


def _check_options(parser: argparse.ArgumentParser) -> None:
    help_text = "print the resolved config, with where each value is from: file and line, command line, default, a run"
    parser.add_argument("--yaml", action="store_true", help=help_text)


def _run_options(parser: argparse.ArgumentParser) -> None:
    help_text = "folder of a run, such as runs/quickstart, or its name in runs/"
    parser.add_argument("run", type=user_path, metavar="RUN", help=help_text)


def _data_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("action", choices=["show"], help="list what steps have read, or which steps read a document")
    _run_options(parser)
    parser.add_argument("--step", type=int, metavar="N", help="list the documents and shards of this step")
    parser.add_argument("--document", metavar="NAME", help="list the steps so far that saw this document")
    parser.add_argument("--json", action="store_true", help="one JSON object a line")


def _verify_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--json",
        type=user_path,
        metavar="FILE",
        help="where the layout certificate is written; default: layout_certificate.json in the run's folder",
    )


def _generate_options(parser: argparse.ArgumentParser) -> None:
    _run_options(parser)
    parser.add_argument("--prompt", required=True, help="text to continue; any text, quoted for the shell alone")
    parser.add_argument("--max-new-tokens", type=int, default=120, metavar="N", help="default: %(default)s")
    parser.add_argument("--temperature", type=float, default=0.8, metavar="T", help="default: %(default)s; 0: greedy")
    parser.add_argument("--top-k", type=int, default=40, metavar="K", help="default: %(default)s; 0: no limit")
    parser.add_argument("--seed", type=int, default=1234, metavar="S", help="of the draws; default: %(default)s")


_COMMANDS = {
    "train": _Command(
        "Train a run, or resume it; starts its own ranks unless torchrun, srun or mpirun has.", _train_options, _train
    ),
    "evaluate": _Command("Loss and perplexity of a run over its whole validation split.", _run_options, _evaluate),
    "generate": _Command("Let a run continue a prompt.", _generate_options, _generate),
    "data": _Command("Which documents a step of a run saw, and which steps saw a document.", _data_options, _data),
    "verify": _Command(
        "Prove that a config's layout trains like one process: shrunk, on this machine's CPU, in a minute.",
        _verify_options,
        _verify,
    ),
    "check": _Command(
        "Validate a configuration in a second, by itself, for cluster.gpus GPUs.", _check_options, _check
    ),
}

_COMPOSING = ("train", "check", "verify")
"""Commands that compose a config; the others take that of a run."""

_WORKING = ("train", "verify")
"""Commands that leave something on the disk: who watches them may go. The others only print."""
