"""When a run saves: by steps, by minutes, by both."""

from __future__ import annotations

import pytest

from megalm.config.schema import Checkpoint
from megalm.training.save_schedule import SaveSchedule


class Clock:
    def __init__(self) -> None:
        self.seconds = 1000.0

    def __call__(self) -> float:
        return self.seconds


def steps_saved(schedule: SaveSchedule, clock: Clock, steps: int, step_seconds: float) -> list[int]:
    saved = []
    for step in range(1, steps + 1):
        clock.seconds += step_seconds
        if schedule.is_due(step, minutes_are_up=schedule.minutes_are_up()):
            saved.append(step)
            schedule.restart()
    return saved


@pytest.mark.parametrize(
    ("every", "every_minutes", "expected"),
    [
        (5, 0.0, [5, 10, 15, 20]),
        (0, 1.0, [6, 12, 18]),
        (0, 0.25, [2, 4, 6, 8, 10, 12, 14, 16, 18, 20]),
        (8, 1.0, [6, 8, 14, 16]),
        (0, 0.0, []),
    ],
)
def test_minutes_are_counted_from_the_last_save_for_whatever_reason(
    every: int, every_minutes: float, expected: list[int]
) -> None:
    clock = Clock()
    schedule = SaveSchedule(Checkpoint(every=every, every_minutes=every_minutes), clock)
    assert steps_saved(schedule, clock, 20, step_seconds=10.0) == expected


def test_what_the_ranks_agree_on_counts_not_this_ranks_clock() -> None:
    clock = Clock()
    schedule = SaveSchedule(Checkpoint(every=0, every_minutes=1.0), clock)
    assert schedule.is_due(3, minutes_are_up=True), "another rank's clock is ahead"
    clock.seconds += 60
    assert schedule.minutes_are_up() and not schedule.is_due(3, minutes_are_up=False)
