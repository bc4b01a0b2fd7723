"""What a failed save does to a run: goes on, ends it, or has the job queued again."""

from __future__ import annotations

import time

import pytest

from megalm.config.schema import Checkpoint
from megalm.errors import CheckpointError
from megalm.training.callbacks.base import Callback, Outcome
from megalm.training.save_policy import SavePolicy

DISK = "checkpoint of step 5 was not saved: rank-00000.safetensors: No space left on device"
LOST = "checkpoint of step 5 was not saved: qkv.weight: no rank wrote exp_avg"


class FailedSaver:
    """A save of step 5 is pending, and fails."""

    pending_step = 5

    def __init__(self, reason: str, *, has_checkpoints: bool = True) -> None:
        self.reason = reason
        self.has_checkpoints = has_checkpoints
        self.was_cancelled = False

    def cancel(self) -> None:
        self.was_cancelled = True

    def finish(self, **_):
        raise CheckpointError(self.reason)


class Heard(Callback):
    def __init__(self) -> None:
        self.failures: list[tuple[int, str]] = []

    def on_checkpoint_failed(self, step: int, reason: str) -> None:
        self.failures.append((step, reason))


def policy_with(saver: FailedSaver, on_failure: str = "continue") -> tuple[SavePolicy, Heard]:
    heard = Heard()
    return SavePolicy(Checkpoint(every=3, on_failure=on_failure), saver, heard, lambda: ([], None)), heard


def test_a_run_saves_every_so_many_steps_or_never() -> None:
    policy, _ = policy_with(FailedSaver(DISK))
    assert [step for step in range(1, 10) if policy.is_due(step, minutes_are_up=False)] == [3, 6, 9]
    never = SavePolicy(Checkpoint(every=0), FailedSaver(DISK), Heard(), lambda: ([], None))
    assert not any(never.is_due(step, minutes_are_up=False) for step in range(1, 10))


def test_a_full_disk_is_cancelled_everywhere_told_of_and_trained_on() -> None:
    saver = FailedSaver(DISK)
    policy, heard = policy_with(saver)
    policy.after_step(failed=True, tolerant=False)
    assert saver.was_cancelled
    assert heard.failures == [(5, DISK)]


@pytest.mark.parametrize(("on_failure", "reason"), [("stop", DISK), ("continue", LOST)])
def test_it_stops_where_that_is_asked_for_or_no_later_save_could_do_better(on_failure: str, reason: str) -> None:
    policy, heard = policy_with(FailedSaver(reason), on_failure)
    with pytest.raises(CheckpointError, match="was not saved"):
        policy.after_step(failed=True, tolerant=False)
    assert heard.failures == []


def test_divergence_is_not_hidden_by_a_failed_save() -> None:
    policy, heard = policy_with(FailedSaver(LOST), "stop")
    policy.after_step(failed=True, tolerant=True)
    assert heard.failures == [(5, LOST)]


@pytest.mark.parametrize(
    ("stop", "has_checkpoints", "ends"),
    [(Outcome.REQUEUE, True, False), (Outcome.REQUEUE, False, True), (Outcome.INTERRUPTED, True, True)],
)
def test_a_preempted_job_goes_on_from_an_older_checkpoint(
    monkeypatch: pytest.MonkeyPatch, stop: Outcome, has_checkpoints: bool, ends: bool
) -> None:
    policy, heard = policy_with(FailedSaver(DISK, has_checkpoints=has_checkpoints))
    monkeypatch.setattr(policy, "_begin", lambda: None)
    if ends:
        with pytest.raises(CheckpointError):
            policy.save_and_stop(stop, 7)
    else:
        policy.save_and_stop(stop, 7)
        assert heard.failures == [(7, DISK)]


def test_what_a_save_waited_for_the_one_before_is_part_of_its_record() -> None:
    slow, said = 0.2, {}
    saver = type(
        "Slow",
        (),
        {"pending_step": 5, "finish": lambda *_, **__: time.sleep(slow), "start": lambda *_, **k: said.update(k)},
    )
    policy, _ = policy_with(saver())
    before = time.perf_counter()
    policy._begin()
    assert before <= said["stall_began"] <= time.perf_counter() - said["waited_seconds"]
    assert said["waited_seconds"] >= slow
