"""A run whose batch grows: what it counts, and that it goes on in the middle of the ramp, on another layout too."""

from __future__ import annotations

from pathlib import Path

import pytest
from cli_runs import losses_of, run

from megalm.config.compose import load_run_config
from megalm.data.stream.batch_size import BatchSize
from megalm.engine.lr_schedule import LearningRate
from megalm.runs.record import read_metrics, step_rows

SEQUENCE = 32
RAMP = (
    "train.global_batch_size=16",
    "train.batch_ramp_start=4",
    f"train.batch_ramp_tokens={36 * SEQUENCE}",
    "optim.schedule=wsd",
    "optim.cooldown=sqrt",
    f"optim.warmup_tokens={20 * SEQUENCE}",
    f"optim.cooldown_tokens={40 * SEQUENCE}",
    f"optim.decay_tokens={96 * SEQUENCE}",
    "model.dropout=0.1",
)
SIZES = [4, 4, 4, 8, 8, 12, 16, 16, 16]
STEPS = len(SIZES)

pytestmark = pytest.mark.slow


def test_a_ramp_counts_what_it_takes_and_resumes_in_its_middle(tiny_dataset: Path, tmp_path: Path) -> None:
    common = [*RAMP, f"data.path={tiny_dataset}", f"run.dir={tmp_path}"]

    def train(*overrides: str) -> str:
        code, output = run([*common, *overrides])
        assert code == 0, output
        return output

    output = train("run.name=straight", f"train.steps={STEPS}", "parallel=single")
    assert "4 rising to 16 x 32 tokens" in output
    rows = step_rows(read_metrics(tmp_path / "straight" / "metrics.jsonl"))
    assert [row["samples"] for row in rows] == [sum(SIZES[: step + 1]) for step in range(STEPS)]
    assert [row["tokens"] for row in rows] == [row["samples"] * SEQUENCE for row in rows]
    config = load_run_config(tmp_path / "straight")
    rate = LearningRate(config.optim, BatchSize.of(config.train, SEQUENCE).tokens_after(STEPS))
    assert [row["lr"] for row in rows] == [
        rate.at(row["tokens"] - size * SEQUENCE, size * SEQUENCE) for row, size in zip(rows, SIZES, strict=True)
    ]

    train("run.name=moved", "train.steps=4", "parallel=single")
    train("run.name=moved", f"train.steps={STEPS}", "parallel=single", "launch.ranks=2")
    for (loss, norm), (want_loss, want_norm) in zip(
        losses_of(tmp_path / "moved"), losses_of(tmp_path / "straight"), strict=True
    ):
        assert loss == pytest.approx(want_loss, abs=1e-5)
        assert norm == pytest.approx(want_norm, abs=1e-4)
