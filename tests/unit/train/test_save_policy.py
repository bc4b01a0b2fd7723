"""What a failed save does to a run: goes on, ends it, or has the job queued again."""

from __future__ import annotations

import time
from dataclasses import replace

import pytest

from megalm.config.schema import Checkpoint, Config, Data, Model, Optim, Run, Train
from megalm.errors import CheckpointError
from megalm.train.callbacks.base import Callback, Outcome
from megalm.train.trainer import Trainer

DISK = "checkpoint of step 5 was not saved: rank-00000.safetensors: No space left on device"
LOST = "checkpoint of step 5 was not saved: qkv.weight: no rank wrote exp_avg"
CONFIG = Config(
    run=Run(name="try1"),
    model=Model(num_layers=1, hidden_size=8, num_heads=1, sequence_length=8, vocab_size=8),
    data=Data(path=("unused",)),
    optim=Optim(lr=1e-3),
    train=Train(steps=9, micro_batch_size=1, global_batch_size=1),
)


class FailedSaver:
    """A save of step 5 is pending, and fails."""

    pending_step = 5

    def __init__(self, reason: str, *, has_checkpoints: bool = True) -> None:
        self.reason = reason
        self.has_checkpoints = has_checkpoints
        self.was_called_off = False

    def call_off(self) -> None:
        self.was_called_off = True

    def finish(self, **_):
        raise CheckpointError(self.reason)


class Heard(Callback):
    def __init__(self) -> None:
        self.failures: list[tuple[int, str]] = []

    def on_checkpoint_failed(self, step: int, reason: str) -> None:
        self.failures.append((step, reason))


def trainer_with(saver: FailedSaver, policy: str = "continue") -> tuple[Trainer, Heard]:
    heard = Heard()
    unused = dict.fromkeys(
        ("context", "engine", "loader", "validator", "learning_rate", "utilisation", "stop", "progress")
    )
    config = replace(CONFIG, checkpoint=Checkpoint(on_failure=policy))
    return Trainer(config, saver=saver, callbacks=heard, **unused), heard


def test_a_full_disk_is_called_off_everywhere_told_of_and_trained_on() -> None:
    saver = FailedSaver(DISK)
    trainer, heard = trainer_with(saver)
    trainer._follow_save(failed=True, tolerant=False)
    assert saver.was_called_off
    assert heard.failures == [(5, DISK)]


@pytest.mark.parametrize(("policy", "reason"), [("stop", DISK), ("continue", LOST)])
def test_it_stops_where_that_is_asked_for_or_no_later_save_could_do_better(policy: str, reason: str) -> None:
    trainer, heard = trainer_with(FailedSaver(reason), policy)
    with pytest.raises(CheckpointError, match="was not saved"):
        trainer._follow_save(failed=True, tolerant=False)
    assert heard.failures == []


def test_divergence_is_not_hidden_by_a_failed_save() -> None:
    trainer, heard = trainer_with(FailedSaver(LOST), "stop")
    trainer._follow_save(failed=True, tolerant=True)
    assert heard.failures == [(5, LOST)]


@pytest.mark.parametrize(
    ("stop", "has_checkpoints", "ends"),
    [(Outcome.REQUEUE, True, False), (Outcome.REQUEUE, False, True), (Outcome.INTERRUPTED, True, True)],
)
def test_a_preempted_job_goes_on_from_an_older_checkpoint(
    monkeypatch: pytest.MonkeyPatch, stop: Outcome, has_checkpoints: bool, ends: bool
) -> None:
    trainer, heard = trainer_with(FailedSaver(DISK, has_checkpoints=has_checkpoints))
    trainer.progress = type("At", (), {"step": 7})
    monkeypatch.setattr(trainer, "_begin_save", lambda: None)
    if ends:
        with pytest.raises(CheckpointError):
            trainer._save_and_stop(stop)
    else:
        trainer._save_and_stop(stop)
        assert heard.failures == [(7, DISK)]


def test_what_a_save_waited_for_the_one_before_is_part_of_its_record(monkeypatch: pytest.MonkeyPatch) -> None:
    slow, said = 0.2, {}
    saver = type(
        "Slow",
        (),
        {"pending_step": 5, "finish": lambda *_, **__: time.sleep(slow), "start": lambda *_, **k: said.update(k)},
    )
    trainer, _ = trainer_with(saver())
    stub = type("Stub", (), {"__getattr__": lambda *_: lambda: {}})()
    trainer._loader = trainer._engine = stub
    before = time.perf_counter()
    trainer._begin_save()
    assert before <= said["stall_began"] <= time.perf_counter() - said["waited_seconds"]
    assert said["waited_seconds"] >= slow
