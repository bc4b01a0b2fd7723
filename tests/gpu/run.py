#!/usr/bin/env python3
"""Everything that a first GPU is to show, in under eight minutes on one: parity, runs, and a table of speed.

    make gpu                                         or: python tests/gpu/run.py
    python tests/gpu/run.py --list                   the parts, and how long each may take
    python tests/gpu/run.py --only documents tp2     parts whose name contains one of these words
    python tests/gpu/run.py --device cpu             the same code on small models, without a GPU

Parts, in order: each case of ``suite/cases.py`` by the engine against plain PyTorch on the CPU in fp32; runs of the
command line that are compared with the CPU, saved and resumed, and generate; the speed of training 125M and 1.3B, eager
and compiled; with several GPUs, layouts over NCCL against one rank. A part that does not fit into the time that is left
is skipped and listed. It needs megalm and what it depends on, a C compiler for torch.compile, and no network.

Exit codes: 0 all that was tried passed, 1 a part failed, 2 bad arguments.
"""

# ruff: noqa: E402 - the tests' own folder and the bench come onto the path first
from __future__ import annotations

import argparse
import json
import shutil
import sys
import tempfile
import time
from dataclasses import asdict
from functools import partial
from pathlib import Path

# The tests' own folder, the bench, and a checkout that is not installed.
sys.path[:0] = [str(Path(__file__).resolve().parents[number] / folder) for number, folder in ((0, ""), (2, "tools"))]
sys.path.append(str(Path(__file__).resolve().parents[2]))

from benchmarks import gpu
from benchmarks.gpu_data import prepare_own_source
from suite import runs
from suite.budget import FAILED, SKIPPED, Part, Result, SkippedError, run_parts
from suite.cases import CASES, LAYOUTS, Case, Layout
from suite.parity import begin, check

SECONDS = {"cuda": 460.0, "cpu": 36_000.0}
"""For all parts: on a GPU eight minutes, less what starting and ending take."""

_QUICK = {"gpt3_1_3b": (8, 4, 2), "gpt3_125m": (16, 8)}
"""Micro-batches of the speed parts, the first that fits; ``tools/bench.py gpu`` tries them all."""


class Suite:
    """The parts, and what they share.

    Args:
        device: ``cuda`` or ``cpu``.
        folder: for datasets and runs.
    """

    def __init__(self, device: str, folder: Path) -> None:
        self.device, self.folder = device, folder
        self.measured: list[gpu.Measured] = []
        self._dataset: Path | None = None

    def parts(self) -> list[Part]:
        """In the order in which they are tried."""
        slower = 1.0 if self.device == "cuda" else 30.0  # cores that others may use, too
        parts = [Part(case.name, slower * case.seconds, partial(self._case, case)) for case in CASES]
        parts += [
            Part("run: like the CPU", 60 * slower, lambda: runs.trains_like_the_cpu(self._place())),
            Part("run: save and resume", 60 * slower, lambda: runs.saves_and_resumes(self._place())),
            Part("run: generation", 60 * slower, lambda: runs.generates_like_the_cpu(self._place())),
        ]
        parts += [
            Part(
                f"speed: {workload.name} {'compiled' if compiled else 'eager'}",
                100.0 * slower if compiled else 60.0 * slower,
                partial(self._speed, workload, compiled),
            )
            for workload in gpu.WORKLOADS[self.device][::-1]
            for compiled in (False, True)
        ]
        return parts + [Part(f"ranks: {layout.name}", 60 * slower, partial(self._layout, layout)) for layout in LAYOUTS]

    def _case(self, case: Case) -> str:
        if case.compiles:
            _need_a_compiler()
        return check(case, self.device)

    def _layout(self, layout: Layout) -> str:
        import torch

        if self.device == "cuda" and torch.cuda.device_count() < layout.ranks:
            raise SkippedError(f"{torch.cuda.device_count()} GPUs, {layout.ranks} are needed")
        return runs.trains_on_ranks(self._place(), layout)

    def _speed(self, workload: gpu.Workload, compiled: bool) -> str:
        if (reason := gpu.missing(self.device)) is not None:
            raise SkippedError(reason)
        if compiled:
            _need_a_compiler()
        quick = _QUICK.get(workload.name, workload.micro_batches[:1])
        chosen = gpu.Workload(workload.name, workload.overrides, quick, workload.target)
        options = gpu.Options(steps=6, warm_up=3, device=self.device)
        self.measured.append(gpu.largest_that_fits(chosen, compiled, self._data(), options))
        last = self.measured[-1]
        return f"{last.seconds:.3f} s a step" + ("" if last.mfu is None else f", {100 * last.mfu:.1f} % MFU")

    def _place(self) -> runs.Workplace:
        return runs.Workplace(self.folder, self._data(), self.device)

    def _data(self) -> Path:
        if self._dataset is None:
            self._dataset = prepare_own_source(self.folder / "data")
        return self._dataset


def _need_a_compiler() -> None:
    if not any(shutil.which(name) for name in ("cc", "gcc", "clang", "g++")):
        raise SkippedError("no C compiler, which torch.compile needs")


def main(arguments: list[str] | None = None) -> int:
    """Run the suite; returns its exit code."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    parser.add_argument("--seconds", type=float, help=f"for all parts; default on a GPU: {SECONDS['cuda']:.0f}")
    parser.add_argument(
        "--only", nargs="+", metavar="WORD", default=[""], help="parts whose name contains one of these"
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the results there, too")
    parser.add_argument("--list", action="store_true", help="show the parts, and try none")
    options = parser.parse_args(arguments)
    with tempfile.TemporaryDirectory(prefix="megalm-gpu-") as name:
        suite = Suite(options.device, Path(name))
        parts = [part for part in suite.parts() if any(word in part.name for word in options.only)]
        if not parts:
            parser.error(f"--only {' '.join(options.only)}: no part has such a name; --list shows them")
        if options.list:
            print("\n".join(f"{part.seconds:5.0f} s  {part.name}" for part in parts))
            return 0
        if (reason := _no_device(options.device)) is not None:
            print(f"{reason}; --device cpu shows on small models that the suite works")
            return 0
        began = time.monotonic()
        begin(options.device)
        seconds = SECONDS[options.device] if options.seconds is None else options.seconds
        results = run_parts(parts, seconds - (time.monotonic() - began), sys.stdout)
        print(f"\n{summary(results, time.monotonic() - began)}")
        if suite.measured:
            print(f"\n{gpu.table_of(suite.measured)}")
        if options.json is not None:
            options.json.write_text(_as_json(results, suite.measured), encoding="utf-8")
    return 1 if any(result.outcome == FAILED for result in results) else 0


def _no_device(device: str) -> str | None:
    import torch

    return "no CUDA device" if device == "cuda" and not torch.cuda.is_available() else None


def summary(results: list[Result], seconds: float) -> str:
    """How many parts passed, and by name those that did not."""
    lines = [f"{sum(r.outcome not in (FAILED, SKIPPED) for r in results)} parts passed in {seconds:.0f} s"]
    for outcome in (FAILED, SKIPPED):
        names = [result.name for result in results if result.outcome == outcome]
        if names:
            lines.append(f"{outcome}: {', '.join(names)}")
    return "\n".join(lines)


def _as_json(results: list[Result], measured: list[gpu.Measured]) -> str:
    return json.dumps(
        {"parts": [asdict(result) for result in results], "speed": [asdict(each) for each in measured]}, indent=2
    )


if __name__ == "__main__":
    sys.exit(main())
