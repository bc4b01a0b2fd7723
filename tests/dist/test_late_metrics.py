"""``train.late_metrics``: when a step's values are looked at changes neither what is recorded nor what is saved."""

from __future__ import annotations

import os
import signal
from pathlib import Path
from typing import Any

import pytest
from cli_runs import losses_of, run, start, steps_of, wait_for_step

from megalm.checkpoint.manifest import read_manifest
from megalm.errors import ExitCode
from megalm.runs.record import read_metrics

TIMES = {
    "step_seconds",
    "tokens_per_second",
    "data_seconds",
    "bubble_fraction",
    "memory_gib",
    "mfu",
    "stall_seconds",
    "write_seconds",
    "waited_seconds",
    "checkpoint",
    "tasks_seconds",
}
DP2 = ["parallel.tp=1", "parallel.pp=1", "launch.ranks=2"]
LAYOUTS = {
    "tp2·pp2": ["parallel.tp=2", "parallel.pp=2"],
    "dp2·fp16": [*DP2, "engine.dtype=fp16", "engine.initial_loss_scale=1e6", "engine.loss_scale_window=3"],
}
EVENTS = [
    "train.steps=11",
    "train.validate_every=4",
    "train.validation_samples=8",
    "checkpoint.every=3",
    "checkpoint.keep_last=0",
]

pytestmark = pytest.mark.slow


def rows(folder: Path) -> list[dict[str, Any]]:
    """What a run recorded, without times. A checkpoint's row comes when it is complete, so it has no fixed place."""
    found = [
        {key: value for key, value in row.items() if key not in TIMES and key not in ("config", "changes")}
        for row in read_metrics(folder / "metrics.jsonl")
    ]
    return sorted(found, key=lambda row: (row["step"], "gigabytes" in row, sorted(row)))


def hashes(folder: Path) -> dict[str, Any]:
    """What is saved: of each checkpoint the hash of every piece of every tensor, and all numbers besides."""
    found = {}
    for path in sorted((folder / "checkpoints").glob("step*")):
        manifest = read_manifest(path)
        pieces = {name: tuple(record.pieces) for name, record in manifest.tensors.items()}
        found[path.name] = (pieces, manifest.data, manifest.training)
    return found


def one(folder: Path, dataset: Path, name: str, overrides: tuple[str, ...]) -> tuple[int, str, Path]:
    code, output = run([f"data.path={dataset}", f"run.dir={folder}", f"run.name={name}", *overrides])
    return code, output, folder / name


@pytest.mark.parametrize("layout", LAYOUTS)
def test_rows_and_checkpoints_are_the_same(tiny_dataset: Path, tmp_path: Path, layout: str) -> None:
    found, overrides = [], (*LAYOUTS[layout], *EVENTS)
    for late in ("false", "true"):
        code, output, folder = one(tmp_path, tiny_dataset, late, (*overrides, f"train.late_metrics={late}"))
        assert code == ExitCode.DONE, output
        found.append((rows(folder), hashes(folder)))
    assert found[0] == found[1]
    recorded, saved = found[0]
    assert [row["step"] for row in recorded if "loss" in row] == list(range(1, 12))
    assert len(saved) == 4, "at 3, 6, 9 and the end"


def test_a_run_that_diverges_ends_at_the_same_step_and_saves_nothing_of_it(tiny_dataset: Path, tmp_path: Path) -> None:
    hot = (*DP2, "train.steps=40", "optim.lr=1e18", "optim.schedule=constant", "optim.clip_grad_norm=0")
    every_step, never = ("checkpoint.every=1", "checkpoint.keep_last=0"), ("checkpoint.every=0",)
    found = []
    for late in ("false", "true"):
        told = []
        for name, saves in (("saving", every_step), ("not-saving", never)):
            overrides = (*hot, *saves, f"train.late_metrics={late}")
            code, output, folder = one(tmp_path, tiny_dataset, f"{name}-{late}", overrides)
            assert code == ExitCode.DIVERGED, output
            error = next(line for line in output.splitlines() if "training diverged" in line)
            told.append((error.partition(";")[0], rows(folder), hashes(folder)))
        found.append(told)
    assert found[0] == found[1]
    (_, recorded, saved), (_, unsaved, nothing) = found[0]
    diverged = recorded[-1]["step"]
    assert [*saved] == [f"step-{step:08d}" for step in range(1, diverged)], "every good step, and no other"
    assert [row["step"] for row in unsaved if "loss" in row] == list(range(1, diverged + 1)), "and no row after it"
    assert not nothing


def test_a_stopped_run_saves_one_step_later_at_most_and_goes_on_as_if_it_had_not_been_stopped(
    tiny_dataset: Path, tmp_path: Path
) -> None:
    common = [*LAYOUTS["tp2·pp2"], "train.steps=60", "checkpoint.every=0", "train.late_metrics=true"]
    code, output, straight = one(tmp_path, tiny_dataset, "straight", tuple(common))
    assert code == ExitCode.DONE, output
    stopped = tmp_path / "stopped"
    overrides = [f"data.path={tiny_dataset}", f"run.dir={tmp_path}", "run.name=stopped", *common]
    with start(overrides) as process:
        wait_for_step(stopped, 5, process)
        os.kill(process.pid, signal.SIGTERM)
        output = process.communicate(timeout=120)[0]
    assert process.returncode == ExitCode.REQUEUE, output
    (saved,) = hashes(stopped)
    assert int(saved.removeprefix("step-")) == steps_of(stopped)[-1] < 60, "every step that was taken has a row"
    code, output, _ = one(tmp_path, tiny_dataset, "stopped", tuple(common))
    assert code == ExitCode.DONE, output
    assert losses_of(stopped) == losses_of(straight)
    assert hashes(stopped)["step-00000060"][0] == hashes(straight)["step-00000060"][0]
