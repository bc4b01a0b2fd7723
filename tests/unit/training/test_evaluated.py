"""Results of ``megalm evaluate`` in the record of a run, and in the copies of it."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from megalm.config.schema import Config, Logging
from megalm.ownership import owned
from megalm.plan.preflight import OWNER_LOCK
from megalm.runs.record import read_metrics
from megalm.training import evaluated
from megalm.training.callbacks import wandb
from megalm.training.evaluated import record_evaluation

SCORES = {"sums/exact_match": 0.25, "sums/exact_match_low": 0.125, "sums/exact_match_high": 0.5}


@pytest.fixture
def found(config: Config, tmp_path: Path) -> Any:
    (tmp_path / "metrics.jsonl").write_text('{"step": 10, "loss": 2.0}\n')
    checkpoint = tmp_path / "checkpoints" / "step-00000010"
    return SimpleNamespace(run=tmp_path, checkpoint=checkpoint, config=config, manifest=SimpleNamespace(step=10))


def test_a_row_is_added_and_nothing_else_of_a_run_that_has_no_copies(found: Any) -> None:
    assert record_evaluation(found, SCORES) is None
    assert sorted(path.name for path in found.run.iterdir()) == ["metrics.jsonl"]
    first, second = map(json.loads, (found.run / "metrics.jsonl").read_text().splitlines())
    assert first == {"step": 10, "loss": 2.0}
    assert second == {"step": 10, "evaluated": str(found.checkpoint), **SCORES}


def test_a_last_line_that_a_crash_left_unfinished_spoils_no_row(found: Any) -> None:
    with (found.run / "metrics.jsonl").open("a") as file:
        file.write('{"step": 11, "lo')
    assert record_evaluation(found, SCORES) is None
    assert [row["step"] for row in read_metrics(found.run / "metrics.jsonl")] == [10, 10]


def test_a_model_that_was_converted_has_no_record(found: Any) -> None:
    (found.run / "metrics.jsonl").unlink()
    assert record_evaluation(found, SCORES) is None
    assert list(found.run.iterdir()) == []


def test_a_run_that_is_training_writes_its_record_alone(found: Any) -> None:
    with owned(found.run / OWNER_LOCK, "run.name=try1", "wait"):
        problem = record_evaluation(found, SCORES)
    assert problem is not None
    assert problem.startswith(f"not added to {found.run}/metrics.jsonl: run.name=try1: in use by another process: ")
    assert (found.run / "metrics.jsonl").read_text() == '{"step": 10, "loss": 2.0}\n'


def test_tensorboard_has_a_copy(found: Any) -> None:
    (found.run / "tensorboard").mkdir()
    record_evaluation(found, SCORES)
    shown = EventAccumulator(str(found.run / "tensorboard"))
    shown.Reload()
    assert {name: [(e.step, e.value) for e in shown.Scalars(name)] for name in shown.Tags()["scalars"]} == {
        f"tasks/{name}": [(10, value)] for name, value in SCORES.items()
    }


def test_the_run_of_wandb_is_continued(found: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    (found.run / "wandb_id").write_text("abc123\n")
    found.config = Config(**{**vars(found.config), "logging": Logging(wandb="offline")})
    started: list[tuple[Any, ...]] = []
    rows: list[tuple[dict[str, Any], int | None]] = []
    codes: list[int] = []

    class Run:
        def log(self, row: dict[str, Any], step: int | None) -> None:
            rows.append((row, step))

        def finish(self, exit_code: int) -> None:
            codes.append(exit_code)

    def start(*arguments: Any) -> Run:
        started.append(arguments)
        return Run()

    monkeypatch.setattr(wandb, "_start_run", start)
    assert evaluated.record_evaluation(found, SCORES) is None
    assert started == [(found.config, found.run, "abc123", "offline")]
    assert rows == [({**SCORES, "tasks/step": 10}, None)], "W&B drops rows of steps that it is past"
    assert codes == [0]
