"""Runs of the command line on the device: they save and resume, generate, and train on several ranks."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from megalm.runs.folder import METRICS_FILE
from megalm.runs.record import read_metrics, step_rows

from .cases import SIZES, Layout
from .parity import MismatchError

STEPS = 6
_CHECKOUT = Path(__file__).resolve().parents[3]
_COMMON = (
    "experiment=quickstart",
    "parallel=single",
    "engine=fp32_zero1",
    "optim=adamw_constant",
    "optim.lr=1e-3",
    "optim.warmup_tokens=0",
    "optim.clip_grad_norm=0.5",
    f"train.steps={STEPS}",
    "train.validate_every=0",
    "train.validation_samples=4",
    "checkpoint.every=0",
    "logging=plain",
    "report.plot=false",
    "report.prompt=null",
)


@dataclass(frozen=True)
class Workplace:
    """Where runs happen.

    Attributes:
        folder: for runs.
        dataset: prepared.
        device: ``cpu`` or ``cuda``.
    """

    folder: Path
    dataset: Path
    device: str

    def train(self, name: str, *overrides: str, device: str | None = None) -> list[tuple[float, float]]:
        """Train a run, or resume it; (loss, gradient norm) of each of its steps.

        Raises:
            RuntimeError: it failed; with the end of what it printed.
        """
        device = device or self.device
        size = [field for field in SIZES[self.device] if not field.startswith("model.vocab_size")]
        self._megalm(
            "train",
            *_COMMON,
            *size,
            f"data.path={self.dataset}",
            f"run.dir={self.folder}",
            f"run.name={name}",
            f"launch.device={device}",
            *overrides,
        )
        rows = step_rows(read_metrics(self.folder / name / METRICS_FILE))
        return [(row["loss"], row["grad_norm"]) for row in rows]

    def generate(self, name: str, device: str) -> str:
        """What a run's model goes on with, token by token the likeliest."""
        text = self._megalm(
            "generate",
            "--prompt=def main(",
            "--temperature=0",
            "--max-new-tokens=16",
            "--json",
            str(self.folder / name),
            f"launch.device={device}",
        )
        found: str = json.loads(text.splitlines()[-1])["text"]
        return found

    def _megalm(self, *arguments: str) -> str:
        done = subprocess.run(
            [sys.executable, "-m", "megalm", *arguments],
            env=_environment(),
            capture_output=True,
            text=True,
            check=False,
        )
        if done.returncode:
            tail = "\n".join((done.stdout + done.stderr).splitlines()[-12:])
            raise RuntimeError(f"megalm {arguments[0]} ended with exit code {done.returncode}:\n{tail}")
        return done.stdout


def _environment() -> dict[str, str]:
    """This checkout's megalm, and nothing that a launcher of this process has set: runs start their own ranks."""
    path = os.pathsep.join([str(_CHECKOUT), os.environ.get("PYTHONPATH", "")])
    foreign = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
    return {**{name: value for name, value in os.environ.items() if name not in foreign}, "PYTHONPATH": path}


def saves_and_resumes(place: Workplace) -> str:
    """Three steps and three more after a resume are six steps."""
    straight = place.train("straight")
    place.train("resumed", f"train.steps={STEPS // 2}")
    resumed = place.train("resumed")
    found = _compare(resumed, straight, 1e-5)
    return f"{found}{', every bit' if resumed == straight else ''}"


def trains_like_the_cpu(place: Workplace) -> str:
    """The same run on the CPU gives the same losses; the run ``straight`` is there."""
    return _compare(place.train("straight"), place.train("on_cpu", device="cpu"), 1e-3)


def generates_like_the_cpu(place: Workplace) -> str:
    """Greedy text of the run ``straight``."""
    ours, cpus = (place.generate("straight", device) for device in (place.device, "cpu"))
    if ours != cpus:
        raise MismatchError(f"{ours!r}, on the CPU {cpus!r}")
    return f"{len(ours)} characters"


def trains_on_ranks(place: Workplace, layout: Layout) -> str:
    """A layout gives the losses of one rank; the run ``straight`` is there."""
    name = layout.name.replace(" ", "_").replace(",", "")
    return _compare(place.train(name, *layout.overrides), place.train("straight"), layout.bound)


def _compare(got: Sequence[tuple[float, float]], want: Sequence[tuple[float, float]], bound: float) -> str:
    if len(got) != STEPS or len(want) != STEPS:
        raise MismatchError(f"{len(got)} and {len(want)} steps, {STEPS} were asked for")
    loss = max(abs(a - b) for (a, _), (b, _) in zip(got, want, strict=True))
    norm = max(abs(a / b - 1.0) for (_, a), (_, b) in zip(got, want, strict=True))
    found = f"loss ±{loss:.1e}, gradient norm ±{norm:.1e}"
    if not (loss <= bound and norm <= 10 * bound):
        raise MismatchError(f"{found}; at most {bound:.0e} and {10 * bound:.0e}")
    return found
