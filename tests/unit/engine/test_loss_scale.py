from __future__ import annotations

from megalm.engine.loss_scale import LossScale


def test_an_overflow_halves_and_starts_to_count_anew() -> None:
    scale = LossScale(1024.0, 2, window=3)
    assert scale.after(overflowed=True) == LossScale(512.0, 0, 3)


def test_a_window_of_good_steps_doubles() -> None:
    scale = LossScale(8.0, 0, window=3)
    values = []
    for _ in range(7):
        values.append(scale.value)
        scale = scale.after(overflowed=False)
    assert values == [8.0, 8.0, 8.0, 16.0, 16.0, 16.0, 32.0]


def test_a_smaller_window_after_a_resume_still_grows() -> None:
    assert LossScale(8.0, 1500, window=1000).after(overflowed=False) == LossScale(16.0, 0, 1000)


def test_it_never_falls_below_one() -> None:
    assert LossScale(1.0, 0, window=3).after(overflowed=True).value == 1.0
