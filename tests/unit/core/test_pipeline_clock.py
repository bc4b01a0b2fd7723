"""Time of a pass by marks in a device's stream, with a device that runs behind the host."""

from __future__ import annotations

import time
from dataclasses import replace

import pytest
import torch

from megalm.core.pipeline.clock import EventClock, HostClock, Timing, make_clock
from megalm.core.pipeline.p2p import TensorSpec
from megalm.core.pipeline.runner import PipelineRunner
from megalm.mesh.groups import ParallelContext
from megalm.mesh.topology import Topology


class Device:
    """Executes what was issued when it is told to; nothing it offers waits."""

    def __init__(self) -> None:
        self.issued = 0.0
        """Milliseconds of work that the host has issued."""
        self.done = 0.0
        """Milliseconds of it that are over."""
        self.made = 0

    def event(self) -> Mark:
        self.made += 1
        return Mark(self)

    def finish(self) -> None:
        self.done = self.issued


class Mark:
    def __init__(self, device: Device) -> None:
        self.device = device
        self.at: float | None = None

    def record(self) -> None:
        self.at = self.device.issued

    def query(self) -> bool:
        return self.at is not None and self.at <= self.device.done

    def elapsed_time(self, end: Mark) -> float:
        assert self.query() and end.query(), "torch raises, or waits"
        return end.at - self.at

    def synchronize(self) -> None:
        raise AssertionError("nothing may wait for the device")


def issue_pass(clock: EventClock, device: Device, *steps: tuple[float, float]):
    """A pass of (milliseconds of waiting, milliseconds of work) each."""
    timer = clock.start()
    for waiting, work in steps:
        device.issued += waiting
        timer.work_begins()
        device.issued += work
        timer.work_ends()
    timer.pass_ends()
    return timer


def test_a_pass_is_told_of_once_the_device_has_done_it() -> None:
    device = Device()
    clock = EventClock(device.event)
    first = issue_pass(clock, device, (1.0, 3.0), (2.0, 4.0))
    assert first.timing() == Timing(), "nothing is known yet, and nothing waits"
    device.done = device.issued - 0.5
    assert first.timing() == Timing()
    device.finish()
    timing = first.timing()
    assert timing.busy_seconds == pytest.approx(7e-3)
    assert timing.total_seconds == pytest.approx(10e-3)
    assert timing.waiting_seconds == pytest.approx(3e-3)
    assert timing.bubble_fraction == pytest.approx(0.3)


def test_a_pass_that_is_read_too_early_says_what_the_one_before_was() -> None:
    device = Device()
    clock = EventClock(device.event)
    first = issue_pass(clock, device, (1.0, 1.0))
    device.finish()
    second = issue_pass(clock, device, (3.0, 1.0))  # the first one is read at its start
    assert second.timing().bubble_fraction == pytest.approx(0.5)
    device.finish()
    assert second.timing().bubble_fraction == pytest.approx(0.75)
    assert first.timing().bubble_fraction == pytest.approx(0.5), "a pass keeps what it was"


def test_an_older_pass_does_not_replace_a_newer_one() -> None:
    device = Device()
    clock = EventClock(device.event)
    first = issue_pass(clock, device, (1.0, 1.0))
    second = issue_pass(clock, device, (3.0, 1.0))
    device.finish()
    assert second.timing().bubble_fraction == pytest.approx(0.75)
    assert first.timing().bubble_fraction == pytest.approx(0.5)
    third = issue_pass(clock, device, (0.0, 1.0))
    assert third.timing().bubble_fraction == pytest.approx(0.75), "the latest that is known"


def test_events_are_used_again() -> None:
    device = Device()
    clock = EventClock(device.event)
    for _ in range(5):
        issue_pass(clock, device, (1.0, 1.0), (1.0, 1.0))
        device.finish()
    assert device.made == 6, "one at either end, and two for each action"


def test_the_runner_marks_each_action_and_the_ends() -> None:
    device, v = Device(), 2

    def stages(stage, received, micro_batch):
        device.issued += 2.0  # forward
        x = micro_batch if received is None else received["hidden"]
        x = x * weight
        return {"loss": x.sum()} if stage == v - 1 else {"hidden": x}

    weight = torch.ones((), requires_grad=True)
    context = replace(ParallelContext.single(), topology=Topology(virtual_stages=v))
    runner = PipelineRunner(
        stages,
        context,
        schedule="gpipe",
        between_stages={"hidden": TensorSpec((2,), torch.float32)},
        clock=EventClock(device.event),
    )
    result = runner.train([torch.ones(2)] * 3)
    assert device.made == 2 * len(runner.ticks(3)) + 2
    assert result.bubble_fraction == 0.0
    device.finish()
    timing = result.timer.timing()
    assert timing.busy_seconds == pytest.approx(timing.total_seconds) == pytest.approx(2e-3 * v * 3)


def test_an_observer_sees_every_tick_before_and_after_its_work() -> None:
    seen: list[str] = []

    class Observer:
        def before(self, tick) -> None:
            seen.append(f"before {tick.action}")

        def after(self, tick) -> None:
            seen.append(f"after {tick.action}")

    def stages(stage, received, micro_batch):
        seen.append("work")
        return {"loss": (micro_batch * weight).sum()}

    weight = torch.ones((), requires_grad=True)
    runner = PipelineRunner(stages, ParallelContext.single(), schedule="1f1b", between_stages={})
    runner.train([torch.ones(2)], observer=Observer())
    assert seen == ["before F0.0", "work", "after F0.0", "before B0.0", "after B0.0"]


def test_the_host_times_itself() -> None:
    timer = HostClock().start()
    timer.work_begins()
    time.sleep(0.02)
    timer.work_ends()
    time.sleep(0.01)
    timer.pass_ends()
    timing = timer.timing()
    assert timing.busy_seconds >= 0.02
    assert timing.total_seconds >= timing.busy_seconds + 0.01
    assert 0.0 < timing.bubble_fraction < 1.0


def test_the_device_says_which_clock() -> None:
    assert isinstance(make_clock(torch.device("cpu")), HostClock)
    assert isinstance(make_clock(torch.device("cuda:0")), EventClock)
