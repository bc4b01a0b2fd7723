"""``megalm dryrun``."""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from megalm.cli.command import parse_config
from megalm.cli.table import COMMANDS
from megalm.config.arguments import user_path
from megalm.config.schema import Config
from megalm.errors import ConfigError, ExitCode
from megalm.mesh.topology import Topology

_RANKS = "rank="
_NAMED = ("first", "middle", "last")


def main(arguments: Sequence[str], prog: str) -> int:
    """Run the command; ``prog`` is what it was called as. Returns its exit code."""
    asked = [argument.removeprefix(_RANKS) for argument in arguments if argument.startswith(_RANKS)]
    others = [argument for argument in arguments if not argument.startswith(_RANKS)]
    options = parse_config(prog, COMMANDS["dryrun"].help, others, _add_options)
    if options is None:
        return ExitCode.DONE
    if options.png is not None and not Path(options.png).parent.is_dir():
        raise ConfigError(f"--png {options.png}: name a file in a folder that exists")
    from megalm.config.compose import composition
    from megalm.config.job import planned_world_size_of, topology_of
    from megalm.plan.preflight import check_config
    from megalm.runs.source_model import source_model

    config = composition(options.overrides, source_model).config
    world_size = planned_world_size_of(config)
    check_config(config, world_size)
    config = _with_vocabulary(config)
    ranks = ranks_asked(asked[-1] if asked else "first,middle,last", topology_of(config, world_size))
    device = "cpu" if config.launch.device == "cpu" else "cuda"
    from megalm.dryrun.processes import reports
    from megalm.dryrun.text import lines
    from megalm.plan.pipeline import pipeline_rows
    from megalm.plan.summary import note_lines

    found = reports(config, ranks, world_size, device=device)
    if options.png is not None:
        from megalm.dryrun.figure import save_figure

        save_figure(found, options.png)
    if options.json:
        as_json = [report.as_json() for report in found]
        print(json.dumps(as_json[0] if len(as_json) == 1 else as_json, indent=2))
    else:
        topology = topology_of(config, world_size)
        job = pipeline_rows(config, topology) if topology.pp > 1 else {}
        print(*(f"{name:15}{text}" for name, text in job.items()), sep="\n", end="\n\n" if job else "")
        print("\n\n".join("\n".join(lines(report)) for report in found))
        notes = note_lines(config, world_size)
        print(*notes, sep="\n", end="\n" if notes else "")
    return ExitCode.DONE


def ranks_asked(text: str, topology: Topology) -> list[int]:
    """Numbers of ranks: ``512``, ``first,middle,last``, ``0,5``; each once.

    Raises:
        ConfigError: there is no such rank.
    """
    size = topology.world_size
    named = {"first": 0, "middle": topology.rank_at(pp=topology.pp // 2), "last": size - 1}
    ranks = []
    for name in text.split(","):
        rank = named.get(name.strip())
        if rank is None and name.strip().isdecimal():
            rank = int(name)
        if rank is None or rank >= size:
            raise ConfigError(f"rank={text}: {name.strip()!r} is no rank; 0 to {size - 1}, {', '.join(_NAMED)}")
        ranks.append(rank)
    return list(dict.fromkeys(ranks))


def _with_vocabulary(config: Config) -> Config:
    """A config that says how many words there are, as the data say it where they are.

    Raises:
        ConfigError: neither says it.
    """
    if config.model.vocab_size is not None:
        return config
    from megalm.plan.preflight import datasets_here

    datasets = datasets_here(config)
    if not datasets:
        where = ", ".join(config.data.path)
        raise ConfigError(
            f"model.vocab_size=null: taken from the data, and {where} is no dataset of this machine; "
            "the number of words, such as model.vocab_size=50257"
        )
    return replace(config, model=replace(config.model, vocab_size=datasets[0].vocab_size))


def _add_options(parser: argparse.ArgumentParser) -> None:
    parser.epilog = (
        "rank=NUMBER[,NUMBER …], or first, middle, last; by default these three. cluster.gpus=N is the size of the job."
    )
    parser.add_argument("--json", action="store_true", help="print an object per rank; several are a list")
    parser.add_argument("--png", type=user_path, metavar="FILE", help="draw the memory over the step")
