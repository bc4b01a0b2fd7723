"""What a run has done is a fact of its checkpoint: killed, and resumed with another batch and another length."""

from __future__ import annotations

import itertools
import json
import os
import signal
from pathlib import Path

import pytest
from cli_runs import run, start, steps_of, wait_for_step

from megalm.checkpoint.manifest import read_manifest
from megalm.checkpoint.store import CHECKPOINTS_FOLDER, find_latest
from megalm.cli.data_of_run import show_lines
from megalm.config.compose import load_run_config
from megalm.runs.history import history_of, schedule_for
from megalm.runs.record import attempt_rows, read_metrics, step_rows

LENGTH = 32
PEAK, FLOOR = 1.5e-3, 1.5e-4

pytestmark = pytest.mark.slow


def test_a_killed_run_goes_on_with_half_the_batch_to_the_new_end_of_its_schedule(
    tiny_dataset: Path, tmp_path: Path
) -> None:
    run_dir = tmp_path / "halved"
    common = ["parallel=single", f"data.path={tiny_dataset}", f"run.dir={tmp_path}", "run.name=halved"]
    common += ["checkpoint.every=5", "checkpoint.keep_last=0"]
    with start([*common, "train.global_batch_size=8", "train.steps=60"]) as process:
        wait_for_step(run_dir, 12, process)
        os.killpg(process.pid, signal.SIGKILL)
        process.communicate()
    killed_at = steps_of(run_dir)[-1]
    latest = find_latest(run_dir / CHECKPOINTS_FOLDER)
    assert latest is not None
    history = history_of(read_manifest(latest.path))
    before = {row["step"]: row for row in step_rows(read_metrics(run_dir / "metrics.jsonl"))}

    code, output = run([*common, "train.global_batch_size=4", "train.steps=60"])
    assert code == 0, output
    assert "changed  train.global_batch_size: 8 → 4" in output
    assert "learning rate: goes on from" in output
    if killed_at > latest.step:
        assert f"resumed at step {latest.step}, {killed_at - latest.step} step" in output
    rows = {row["step"]: row for row in step_rows(read_metrics(run_dir / "metrics.jsonl"))}
    rates = [rows[step]["lr"] for step in range(1, 61)]
    assert rates[: latest.step] == [before[step]["lr"] for step in range(1, latest.step + 1)]
    assert rates[latest.step] == history.schedule.at(history.tokens, 8 * LENGTH), "as if the batch were the old one"
    steps = [abs(after - earlier) for earlier, after in itertools.pairwise(rates)]
    assert steps[latest.step - 1] <= max(steps[: latest.step - 1] + steps[latest.step :])
    assert FLOOR < rates[-1] < FLOOR + 0.02 * PEAK, "the decay ends where the run does"
    total = (8 * latest.step + 4 * (60 - latest.step)) * LENGTH
    assert rows[60]["tokens"] == total == schedule_for(load_run_config(run_dir), history).total_tokens

    code, output = run([*common, "train.global_batch_size=4", "train.steps=62"])
    assert code == 0, output
    assert "it stays at its floor, 0.00015" in output and "optim.rewarm_tokens=" in output
    records = read_metrics(run_dir / "metrics.jsonl")
    assert [row["lr"] for row in step_rows(records)][60:] == pytest.approx([FLOOR, FLOOR])

    attempts = attempt_rows(records)
    assert [(row["attempt"], row["step"]) for row in attempts] == [(1, 0), (2, latest.step), (3, 60)]
    assert attempts[1]["changes"] == {"train.global_batch_size": [8, 4]}
    assert attempts[2]["changes"] == {"train.steps": [60, 62]}
    assert "global_batch_size: 8" in (run_dir / attempts[0]["config"]).read_text()
    assert (run_dir / attempts[2]["config"]).read_text() == (run_dir / "config.yaml").read_text()
    corpora = read_manifest(run_dir / CHECKPOINTS_FOLDER / "step-00000060").data["corpora"]
    assert [(entry["samples"], entry["tokens"]) for entry in corpora] == [(total // LENGTH, total)]
    for step, size in ((latest.step, 8), (latest.step + 1, 4)):
        assert len([json.loads(line) for line in show_lines(run_dir, step=step, document=None, as_json=True)]) == size
