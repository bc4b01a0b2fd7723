#!/usr/bin/env python3
"""Measure megalm's speed and memory on this machine, each figure beside its target.

    tools/bench.py cpu                 one process against Hugging Face's GPT-2 (pip install 'megalm[bench]')
    tools/bench.py generate            greedy generation against Hugging Face's, with its cache (the same), evaluation
                                       against lm-eval's hf (pip install 'megalm[harness]'), memory of a rank at tp2
    tools/bench.py pipeline            bubbles of every schedule, and DeepSpeed's PipelineEngine on the same stages
    tools/bench.py memory              activations that a layer keeps, against Korthikanti et al. 2022
    tools/bench.py dryrun              the peak memory that megalm dryrun says, beside that of real steps on the CPU
    tools/bench.py norm                the gradient norm of up to a billion elements (4 GB): error and cost
    tools/bench.py data                preparing, reading and starting on data, with other readers beside it
    tools/bench.py checkpoint          saving and loading beside a plain write, the stall, memory of converting 1 B
    tools/bench.py gpu                 utilisation of one CUDA device by GPT-3 1.3B and 125M, by megalm train, eager and
                                       compiled, and what the time of a step goes to
    tools/bench.py all --json out.json

checkpoint writes up to 17 GB to the system's folder for temporary files (TMPDIR chooses another), and removes them.
cpu      wants a machine that does nothing else: competitors step in turn and ratios are medians of paired steps, but
         threads that wait for a busy core make every figure low. torch.compile needs a C++ compiler, for Hugging Face.
gpu      wants a device that megalm/plan/hardware.yaml knows, with 80 GB for the largest micro-batches; smaller ones are
         tried too. It needs nothing compiled beforehand: torch.compile's kernels are Triton's, which torch's CUDA
         wheels bring, though Triton builds its launcher with the C compiler of the system. Without a device the part
         is skipped, says so, and is no failure.

Exit codes: 0 measured or skipped, 1 a target is missed and --strict is given, 2 bad arguments.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable
from pathlib import Path

# The first is not there under PYTHONSAFEPATH; the second is for a checkout that is not installed.
sys.path.extend(str(folder) for folder in Path(__file__).resolve().parents[:2])

from benchmarks.table import Report

from megalm.config.arguments import LineParser, user_path
from megalm.launch.guard import guarded
from megalm.launch.isolation import shield


def main(arguments: list[str] | None = None) -> int:
    """Run the tool; returns its exit code."""
    shield()
    parser = LineParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)
    parser.add_argument("parts", metavar="PART", nargs="+", choices=[*PARTS, "all"], help=", ".join([*PARTS, "all"]))
    parser.add_argument("--json", type=user_path, metavar="FILE", help="write the figures there, too")
    parser.add_argument("--rounds", type=int, help="repetitions that a median is taken of")
    parser.add_argument("--compiled", action="store_true", help="cpu: measure engine.compile=true as well")
    parser.add_argument(
        "--device", choices=["cuda", "cpu"], default="cuda", help="gpu: cpu shows on a small model that the part works"
    )
    parser.add_argument("--strict", action="store_true", help="exit with 1 when a target is missed")
    options = parser.parse_args(arguments)
    if options.rounds is not None and options.rounds < 1:
        parser.error("--rounds: at least 1")
    return guarded(lambda: _measure(options))


def _measure(options: argparse.Namespace) -> int:
    if options.json is not None:
        Path(options.json).touch()  # what cannot be written is known before an hour of measuring
    reports = []
    for part in PARTS if "all" in options.parts else dict.fromkeys(options.parts):
        reports.append(PARTS[part](options))
        print(reports[-1], flush=True)
    if options.json is not None:
        Path(options.json).write_text(json.dumps([report.as_json() for report in reports], indent=2), encoding="utf-8")
    missed = any(row.met is False for report in reports for row in report.rows)
    return 1 if missed and options.strict else 0


def _cpu(options: argparse.Namespace) -> Report:
    import importlib.util

    from benchmarks import cpu

    if importlib.util.find_spec("transformers") is None:
        return Report("cpu", skipped="transformers is not installed: pip install 'megalm[bench]'")
    return cpu.run(cpu.Options(rounds=options.rounds or cpu.Options.rounds, compiled=options.compiled))


def _generate(options: argparse.Namespace) -> Report:
    import importlib.util

    from benchmarks import generate

    if importlib.util.find_spec("transformers") is None:
        return Report("generate", skipped="transformers is not installed: pip install 'megalm[bench]'")
    return generate.run(generate.Options(rounds=options.rounds or generate.Options.rounds))


def _pipeline(options: argparse.Namespace) -> Report:
    from benchmarks import pipeline

    return pipeline.run(pipeline.Options(rounds=options.rounds or pipeline.Options.rounds))


def _memory(_: argparse.Namespace) -> Report:
    from benchmarks import memory

    return memory.run()


def _dryrun(_: argparse.Namespace) -> Report:
    from benchmarks import dryrun

    return dryrun.run()


def _norm(options: argparse.Namespace) -> Report:
    from benchmarks import norm

    return norm.run(norm.Options(rounds=options.rounds or norm.Options.rounds))


def _data(options: argparse.Namespace) -> Report:
    from benchmarks import data

    return data.run(data.Options(rounds=options.rounds or data.Options.rounds))


def _checkpoint(options: argparse.Namespace) -> Report:
    from benchmarks import checkpoint

    return checkpoint.run(checkpoint.Options(rounds=options.rounds or checkpoint.Options.rounds))


def _gpu(options: argparse.Namespace) -> Report:
    from benchmarks import gpu

    return gpu.run(gpu.Options(steps=options.rounds or gpu.Options.steps, device=options.device))


PARTS: dict[str, Callable[[argparse.Namespace], Report]] = {
    "cpu": _cpu,
    "generate": _generate,
    "pipeline": _pipeline,
    "memory": _memory,
    "dryrun": _dryrun,
    "norm": _norm,
    "data": _data,
    "checkpoint": _checkpoint,
    "gpu": _gpu,
}

if __name__ == "__main__":
    sys.exit(main())
