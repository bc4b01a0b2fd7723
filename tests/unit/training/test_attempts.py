"""The config of every start is kept, and its row says what changed."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from megalm.config.compose import load_run_config, save_config
from megalm.config.schema import Config
from megalm.runs.attempts import keep_config
from megalm.runs.record import attempt_rows, read_metrics, step_rows
from megalm.training.callbacks.base import Attempt
from megalm.training.callbacks.metrics_jsonl import MetricsJsonl


def test_the_newest_config_is_the_runs_and_the_others_stay(config: Config, tmp_path: Path) -> None:
    longer = replace(config, train=replace(config.train, steps=200))
    assert keep_config(config, tmp_path) == (1, "attempts/1.yaml")
    assert keep_config(longer, tmp_path) == (2, "attempts/2.yaml")
    assert load_run_config(tmp_path) == longer
    assert [(tmp_path / "attempts" / f"{n}.yaml").read_text().count("steps: 100") for n in (1, 2)] == [1, 0]


def test_the_config_of_an_older_version_becomes_the_first_attempt(config: Config, tmp_path: Path) -> None:
    save_config(config, tmp_path / "config.yaml")
    before = (tmp_path / "config.yaml").read_text()
    assert keep_config(replace(config, run=replace(config.run, seed=5)), tmp_path)[0] == 2
    assert (tmp_path / "attempts" / "1.yaml").read_text() == before


def test_a_start_is_a_row_that_no_step_is_taken_for(make_context, make_step, tmp_path: Path) -> None:
    for number, step in ((1, 0), (2, 2)):
        callback = MetricsJsonl()
        changes = {"optim.lr": (1e-3, 5e-4)} if step else {}
        attempt = Attempt(
            number=number,
            config=f"attempts/{number}.yaml",
            step=step,
            samples=8 * step,
            tokens=512 * step,
            changes=changes,
        )
        callback.on_start(make_context(start_step=step, attempt=attempt))
        for later in range(step + 1, step + 4):
            callback.on_step(make_step(later))
        callback.close()
    rows = read_metrics(tmp_path / "metrics.jsonl")
    assert [row["step"] for row in step_rows(rows)] == [1, 2, 3, 4, 5]
    first, second = attempt_rows(rows)
    assert (first["attempt"], first["changes"], first["began_with"]) == (1, {}, None)
    assert (second["step"], second["samples"], second["changes"]["optim.lr"]) == (2, 16, [1e-3, 5e-4])
