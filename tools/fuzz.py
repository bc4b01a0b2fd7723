#!/usr/bin/env python3
"""Train random configs that megalm accepts, and compare each with one rank: the numbers must be the same on any layout.

    python tools/fuzz.py --seeds 0..19              twenty configs
    python tools/fuzz.py --seeds 0..999 --seconds 600    as many of a thousand as ten minutes allow
    python tools/fuzz.py --seeds 17                 one again, such as one that failed

A seed gives a small model, an objective, data, a number format and two layouts with their engine's settings. The run
is trained on the first layout, killed or stopped in the middle, and resumed on the second; the same run on one rank is
what losses, gradient norms and the validation at the end are held against. What fails is printed with the command lines
that do the same. On the CPU, with gloo; up to --ranks processes at a time.

Exit codes: 0 every run was as on one rank, 1 one was not, 2 bad arguments.
"""

from __future__ import annotations

import argparse
import math
import shlex
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

# The first is not there under PYTHONSAFEPATH; the second is for a checkout that is not installed.
sys.path.extend(str(folder) for folder in Path(__file__).resolve().parents[:2])

from fuzzing.draw import STEPS, Case, Fields, draw, overrides_of
from fuzzing.runs import Run, make_datasets, start_all

from megalm.runs.record import read_metrics, step_rows, validation_rows

LOSS_BOUNDS = {"fp32": 1e-5, "bf16": 2e-2, "fp16": 5e-3}
"""Nats, at any step; 16-bit weights round otherwise where sums are cut otherwise."""
NORM_BOUNDS = {"fp32": 1e-4, "bf16": 5e-2, "fp16": 2e-2}
"""Relative."""
_SMALL_NORM = 1e-2
"""Below it a norm's difference is compared with that of this one."""
_PER_ROUND = 20
"""Seeds whose runs share starts of ranks."""


def main(arguments: list[str] | None = None) -> int:
    """Run the tool; returns its exit code."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument(
        "--seeds", required=True, type=_seeds, metavar="A..B", help="the first and the last seed, or one"
    )
    parser.add_argument("--seconds", type=float, default=math.inf, help="begin no more seeds after this time")
    parser.add_argument("--ranks", type=int, default=4, help="most ranks of a run")
    options = parser.parse_args(arguments)
    if options.ranks < 1:
        parser.error("--ranks: at least 1")
    began, done, failed = time.monotonic(), 0, []
    with tempfile.TemporaryDirectory(prefix="megalm-fuzz-") as name:
        folder = Path(name)
        datasets = make_datasets(folder)
        for start in range(0, len(options.seeds), _PER_ROUND):
            if start and time.monotonic() - began > options.seconds:
                break
            cases = [draw(seed, datasets, options.ranks) for seed in options.seeds[start : start + _PER_ROUND]]
            for case, problem in zip(cases, check(cases, folder / "runs"), strict=True):
                done += 1
                print(f"seed {case.seed}: {'FAILED' if problem else 'ok'}  {_in_words(case)}", flush=True)
                if problem:
                    failed.append(case.seed)
                    print(problem, *command_lines(case), "", sep="\n", flush=True)
    which = f": {', '.join(map(str, failed))}" if failed else ""
    print(f"{done} of {len(options.seeds)} seeds, {len(failed)} failed{which}")
    return 1 if failed else 0


def check(cases: Sequence[Case], folder: Path) -> list[str | None]:
    """What is wrong with each case, if anything is."""
    names = {case.seed: {part: f"{part}-{case.seed}" for part in ("one", "cut")} for case in cases}

    def fields(case: Case, part: str, layout: Fields) -> Fields:
        return {**case.base, **layout, "run.dir": str(folder), "run.name": names[case.seed][part]}

    first = [Run(fields(case, "cut", case.first), case.cut, case.killed) for case in cases]
    problems = start_all([*first, *(Run(fields(case, "one", case.reference)) for case in cases)])
    resumed = start_all([Run(fields(case, "cut", case.second)) for case in cases])
    count = len(cases)
    found: list[str | None] = []
    for case, begun, reference, ended in zip(cases, problems[:count], problems[count:], resumed, strict=True):
        said = {"on one rank": reference, "on the first layout": begun, "resumed on the second layout": ended}
        wrong = [f"  {where}: {problem}" for where, problem in said.items() if problem]
        found.append(
            "\n".join(wrong) or difference(case, folder / names[case.seed]["cut"], folder / names[case.seed]["one"])
        )
    return found


def difference(case: Case, run: Path, reference: Path) -> str | None:
    """How a run differs from the one on one rank by more than its format's bounds; None: it does not."""
    dtype = case.base["engine.dtype"]
    got, want = (read_metrics(folder / "metrics.jsonl") for folder in (run, reference))
    mine, theirs = ({row["step"]: row for row in step_rows(rows)} for rows in (got, want))
    if sorted(mine) != list(range(1, STEPS + 1)):
        return f"  its record has the steps {sorted(mine)}"
    wrong = []
    for step in mine:
        wrong += _apart(f"step {step}", mine[step], theirs[step], dtype)
    wrong += _apart("validation", validation_rows(got)[-1], validation_rows(want)[-1], dtype)
    return "\n".join(wrong) or None


def _apart(what: str, mine: Mapping[str, Any], theirs: Mapping[str, Any], dtype: str) -> list[str]:
    """Lines about the numbers of two rows that differ too much."""
    lines = []
    for name, bound in (
        ("loss", LOSS_BOUNDS[dtype]),
        ("grad_norm", NORM_BOUNDS[dtype]),
        ("val_loss", LOSS_BOUNDS[dtype]),
    ):
        a, b = mine.get(name), theirs.get(name)
        if a is None or b is None:
            far = a is not b
        else:
            scale = max(abs(b), _SMALL_NORM) if name == "grad_norm" else 1.0
            far = not abs(a - b) / scale <= bound
        if far:
            lines.append(f"  {what}: {name} {a}, and {b} on one rank")
    for name in ("loss_tokens", "samples", "tokens", "val_tokens", "lr"):
        if mine.get(name) != theirs.get(name):
            lines.append(f"  {what}: {name} {mine.get(name)}, and {theirs.get(name)} on one rank")
    return lines


def command_lines(case: Case) -> list[str]:
    """What a person types to do the same by hand, with data and a vocabulary of their own."""
    end = "killed in" if case.killed else "stopped after"
    step = case.cut + case.killed

    def line(layout: Fields, name: str) -> str:
        return shlex.join(["megalm", "train", f"run.name={name}", *overrides_of({**case.base, **layout})])

    return [
        f"  {end} step {step}: {line(case.first, 'cut')}",
        f"  resumed: {line(case.second, 'cut')}",
        f"  one rank: {line(case.reference, 'one')}",
        f"  again: python tools/fuzz.py --seeds {case.seed}",
    ]


def _in_words(case: Case) -> str:
    def layout(fields: Fields) -> str:
        degrees = "·".join(
            f"{axis}{fields[f'parallel.{axis}']}" for axis in ("tp", "pp", "cp") if fields[f"parallel.{axis}"] > 1
        )
        zero, schedule = fields["engine.zero_stage"], fields["parallel.schedule"]
        return f"{fields['launch.ranks']} ranks {degrees or 'dp'} ZeRO-{zero} {schedule}"

    return (
        f"{case.base['engine.dtype']} {case.base['objective.name']}: {layout(case.first)}, "
        f"{'killed' if case.killed else 'stopped'}, {layout(case.second)}"
    )


def _seeds(text: str) -> range:
    first, _, last = text.partition("..")
    try:
        seeds = range(int(first), int(last or first) + 1)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text}: not A..B, such as 0..19") from None
    if not seeds:
        raise argparse.ArgumentTypeError(f"{text}: the last seed is below the first")
    return seeds


if __name__ == "__main__":
    sys.exit(main())
