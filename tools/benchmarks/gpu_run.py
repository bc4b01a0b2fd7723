"""A run that measures itself and ends: ``python -m benchmarks.gpu_run RESULT WARM_UP STEPS OVERRIDE...``.

It is ``megalm train`` as one rank of a launcher, with one more callback, which ends the process after the last step
that is measured: nothing is saved, since a checkpoint of 1.3 billion parameters is 16 GB.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any, NoReturn

from benchmarks.gpu_profile import StepProfile
from megalm.launch.discovery import TORCHRUN, RankInfo
from megalm.launch.worker import run_launched
from megalm.training import setup
from megalm.training.callbacks.base import Callback, RunContext, StepMetrics
from megalm.training.job import TRAIN


class Measure(Callback):
    """Keeps the rows of timed steps, profiles one step more, writes both, and ends the process.

    Args:
        result: the file.
        warm_up: steps that are not counted.
        steps: timed steps.
    """

    essential = True

    def __init__(self, result: Path, warm_up: int, steps: int) -> None:
        self._result, self._warm_up, self._steps = result, warm_up, steps
        self._rows: list[dict[str, Any]] = []
        self._seen = 0
        self._device = "cpu"
        self._profile: StepProfile | None = None

    def on_start(self, context: RunContext) -> None:
        """What the device is."""
        self._device = "cpu" if context.device == "CPU" else "cuda"

    def on_step(self, metrics: StepMetrics) -> None:
        """After each step."""
        self._seen += 1
        if self._profile is not None:
            shares, kernels = self._profile.end()
            found = {"steps": self._rows, "shares": shares, "kernels": kernels}
            self._result.write_text(json.dumps(found), encoding="utf-8")
            os._exit(0)
        if self._seen > self._warm_up:
            self._rows.append(metrics.row())
        if len(self._rows) == self._steps:
            self._profile = StepProfile(self._device)


def main(arguments: list[str]) -> NoReturn:
    """Run, and end within a step."""
    result, warm_up, steps, *overrides = arguments
    measure, made = Measure(Path(result), int(warm_up), int(steps)), setup._make_callbacks
    setup._make_callbacks = lambda *given: [*made(*given), measure]
    rank = RankInfo(
        rank=0, world_size=1, local_rank=0, local_world_size=1, launcher=TORCHRUN, master_addr="", master_port=0
    )
    run_launched(rank, TRAIN, overrides)


if __name__ == "__main__":
    main(sys.argv[1:])
