"""The saver: one save at a time, told of once, and never in the way of the training that goes on."""

from __future__ import annotations

import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from megalm.checkpoint import save as save_module
from megalm.checkpoint.reader import CheckpointReader
from megalm.checkpoint.store import checkpoints_set_aside, complete_checkpoints
from megalm.config.schema import Checkpoint, Config, Data, Model, Optim, Run, Train
from megalm.core.parameters import StatePiece
from megalm.errors import CheckpointError, ConfigError
from megalm.mesh.groups import ParallelContext
from megalm.mesh.parameter import ParameterRecord
from megalm.mesh.slices import ShardSpec
from megalm.ownership import owned
from megalm.runs.start import StartMode, StartPoint
from megalm.training.callbacks.base import ValidationMetrics
from megalm.training.progress import Progress
from megalm.training.saving import RunState, Saver, is_fault_of_disk

SLOW = 0.3


@pytest.fixture
def config(tmp_path: Path) -> Config:
    return Config(
        run=Run(name="try1", dir=str(tmp_path)),
        model=Model(num_layers=1, hidden_size=8, num_heads=1, sequence_length=8, vocab_size=8),
        data=Data(path=("unused",)),
        optim=Optim(lr=1e-3),
        train=Train(steps=4, micro_batch_size=1, global_batch_size=1),
        checkpoint=Checkpoint(keep_last=1, keep_every=3, keep_best=1),
    )


@pytest.fixture
def slow_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    write = save_module.write_rank

    def slowly(*arguments, **keywords):
        time.sleep(SLOW)
        write(*arguments, **keywords)

    monkeypatch.setattr(save_module, "write_rank", slowly)


def _state(step: int, val_loss: float | None = None) -> RunState:
    validation = None
    if val_loss is not None:
        validation = ValidationMetrics(
            step=step,
            samples=0,
            tokens=0,
            scores={
                "val_loss": val_loss,
                "val_perplexity": 1.0,
                "val_accuracy": 0.0,
                "val_commonest": 0.0,
                "val_tokens": 1,
            },
        )
    return RunState({"consumed_samples": step}, {"optimizer_steps": step}, Progress(step), validation)


def _pieces(values: torch.Tensor) -> list[StatePiece]:
    return [StatePiece(ParameterRecord("norm.weight", ShardSpec.replicated(4)), "weight", 0, values)]


def _start(saver: Saver, values: torch.Tensor, state: RunState) -> None:
    saver.start(_pieces(values), state, stall_began=time.perf_counter())


def test_training_stands_still_for_the_copy_alone(config: Config, tmp_path: Path, slow_disk) -> None:
    saver = Saver(config, ParallelContext.single(), tmp_path)
    values = torch.zeros(4)
    saver.start(_pieces(values), _state(1), stall_began=time.perf_counter(), waited_seconds=0.01)
    values += 1  # the next step, before anything is written
    assert saver.newly_complete() is None
    with pytest.raises(AssertionError, match="finish"):  # a second save waits for the first
        _start(saver, values, _state(2))
    told = saver.finish()
    assert told is not None and (told.step, told.waited_seconds) == (1, 0.01)
    assert told.stall_seconds < SLOW / 2 < SLOW <= told.write_seconds
    assert saver.finish() is None, "told of once"
    reader = CheckpointReader(Path(told.checkpoint))
    assert reader.read_local("norm.weight", "weight", ShardSpec.replicated(4)).tolist() == [0.0] * 4


def test_a_complete_save_is_told_of_while_training_goes_on(config: Config, tmp_path: Path) -> None:
    saver = Saver(config, ParallelContext.single(), tmp_path)
    _start(saver, torch.zeros(4), _state(1))
    deadline = time.monotonic() + 30
    while (told := saver.newly_complete()) is None:
        assert time.monotonic() < deadline
        time.sleep(0.01)
    assert (told.step, told.gigabytes) == (1, 16e-9)
    assert saver.finish() is None


def test_where_saving_is_not_asynchronous_the_stall_is_the_write(config: Config, tmp_path: Path, slow_disk) -> None:
    waiting = replace(config, checkpoint=replace(config.checkpoint, asynchronous=False))
    saver = Saver(waiting, ParallelContext.single(), tmp_path)
    _start(saver, torch.zeros(4), _state(1))
    assert saver.finish(training_waits=True).stall_seconds >= SLOW


def test_what_is_kept_is_what_the_config_says(config: Config, tmp_path: Path) -> None:
    saver = Saver(config, ParallelContext.single(), tmp_path)
    for step, loss in enumerate((3.0, 1.0, 2.0, None, None), start=1):
        _start(saver, torch.zeros(4), _state(step, loss))
        saver.finish()
    saver.close()  # older ones are deleted while training goes on
    assert [info.step for info in complete_checkpoints(tmp_path / "checkpoints")] == [2, 3, 5]


def test_a_run_that_was_passed_over_saves_nothing_more(config: Config, tmp_path: Path, slow_disk) -> None:
    with owned(tmp_path / "owner.lock", "run.name=try1", "wait") as ownership:
        saver = Saver(config, ParallelContext.single(), tmp_path, claim=ownership.claim)
        saver._agree = lambda error: error  # without a process group
        _start(saver, torch.zeros(4), _state(1))
        assert saver.finish() is not None
        _start(saver, torch.zeros(4), _state(2))
        (tmp_path / "owner.lock" / ownership.claim.token).unlink()  # while it is written
        with pytest.raises(CheckpointError, match=r"step 2 was not saved: run.name=try1: its lock .* was removed"):
            saver.finish()
        with pytest.raises(ConfigError, match="was removed"):
            _start(saver, torch.zeros(4), _state(3))
        with pytest.raises(ConfigError, match="was removed"):  # before what another has begun to write is cleared away
            Saver(config, ParallelContext.single(), tmp_path, claim=ownership.claim)
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["step-00000001"]


def test_a_full_disk_passes_and_a_lost_tensor_does_not() -> None:
    assert is_fault_of_disk(
        "checkpoint of step 5 was not saved: runs/a/rank-00000.safetensors: No space left on device"
    )
    assert not is_fault_of_disk("checkpoint of step 5 was not saved: qkv.weight: no rank wrote exp_avg rows 3 onwards")
    assert not is_fault_of_disk("checkpoint of step 5 was not saved: ZeroDivisionError: division by zero")


def test_going_back_sets_the_other_course_aside_and_says_where_the_run_came_from(
    config: Config, tmp_path: Path
) -> None:
    saver = Saver(config, ParallelContext.single(), tmp_path)
    for step in (2, 3):
        _start(saver, torch.zeros(4), _state(step))
        saver.finish()
    saver.close()
    start = StartPoint(StartMode.RESUME, tmp_path / "checkpoints" / "step-00000002", 2, is_named=True)
    again = Saver(config, ParallelContext.single(), tmp_path, lineage={"resumed_from": {"step": 2}}, start=start)
    assert [path.name for path in checkpoints_set_aside(tmp_path / "checkpoints")] == ["step-00000003.set-aside"]
    _start(again, torch.zeros(4), _state(3))
    again.finish()
    again.close()
    saved = CheckpointReader(tmp_path / "checkpoints" / "step-00000003").manifest
    assert saved.training["resumed_from"] == {"step": 2}


def test_a_new_life_clears_what_the_last_one_left(config: Config, tmp_path: Path) -> None:
    torn = tmp_path / "checkpoints" / ".unfinished-step-00000009-1"
    torn.mkdir(parents=True)
    Saver(config, ParallelContext.single(), tmp_path)
    assert not torn.exists()


def test_a_rank_that_fails_lets_the_save_become_complete_first(config: Config, tmp_path: Path, slow_disk) -> None:
    saver = Saver(config, ParallelContext.single(), tmp_path)
    _start(saver, torch.zeros(4), _state(1))
    assert complete_checkpoints(tmp_path / "checkpoints") == []
    saver.linger()
    assert [info.step for info in complete_checkpoints(tmp_path / "checkpoints")] == [1]
