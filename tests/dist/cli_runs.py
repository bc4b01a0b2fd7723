"""Runs of the command line as a user starts them: other processes, real signals, a run folder on disk."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

from fork_server import ForkedProcess, run_megalm, server

from megalm.runs.record import read_metrics, step_rows

TINY = (
    "experiment=quickstart",
    "model.num_layers=3",
    "model.hidden_size=32",
    "model.num_heads=4",
    "model.sequence_length=32",
    "engine.dtype=fp32",
    "train.micro_batch_size=2",
    "train.global_batch_size=4",
    "train.validate_every=0",
    "optim.warmup_tokens=0",
    "optim.clip_grad_norm=0.5",
    "logging.wandb=disabled",
    "logging.tensorboard=false",
    "report.plot=false",
    "report.prompt=null",
)
"""A few milliseconds a step; clipping is active."""

TWENTY_STEPS = ("parallel.tp=2", "parallel.pp=2", "train.steps=20", "checkpoint.every=0")
"""What every launcher is compared on."""

MEGALM = (sys.executable, "-m", "megalm")


Running = subprocess.Popen[str] | ForkedProcess


def start(overrides: list[str], *, command: tuple[str, ...] = MEGALM) -> Running:
    """Start ``megalm train`` in a session of its own, so that all of it can be killed at once.

    Without a launcher it is forked, and so are its ranks: see ``fork_server.py``.
    """
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    if command == MEGALM:
        arguments = ["train", *TINY, *overrides]
        return server().fork(
            run_megalm, arguments, environment=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
        )
    return subprocess.Popen(
        [*command, "train", *TINY, *overrides],
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )


def run(overrides: list[str], *, command: tuple[str, ...] = MEGALM, timeout_seconds: float = 150) -> tuple[int, str]:
    """Run ``megalm train`` to its end: (exit code, everything it printed)."""
    with start(overrides, command=command) as process:
        try:
            output, _ = process.communicate(timeout=timeout_seconds)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, 9)
            output, _ = process.communicate()
            raise AssertionError(f"still running after {timeout_seconds} s:\n{output}") from None
    return process.returncode, output


def wait_for_step(run_dir: Path, step: int, process: Running, timeout_seconds: float = 120) -> None:
    """Return once ``metrics.jsonl`` has a step; an end of the process before that is an error."""
    deadline = time.monotonic() + timeout_seconds
    while time.monotonic() < deadline:
        if (run_dir / "metrics.jsonl").exists() and steps_of(run_dir)[-1:] >= [step]:
            return
        if process.poll() is not None:
            raise AssertionError(f"ended with {process.returncode} before step {step}:\n{process.communicate()[0]}")
        time.sleep(0.01)
    raise AssertionError(f"no step {step} after {timeout_seconds} s")


def steps_of(run_dir: Path) -> list[int]:
    """Steps in ``metrics.jsonl``, in order."""
    return [row["step"] for row in step_rows(read_metrics(run_dir / "metrics.jsonl"))]


def losses_of(run_dir: Path) -> list[tuple[float, float]]:
    """(loss, gradient norm) of every step, to the last bit."""
    return [(row["loss"], row["grad_norm"]) for row in step_rows(read_metrics(run_dir / "metrics.jsonl"))]
