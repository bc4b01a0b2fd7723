"""The learning rate over tokens."""

from __future__ import annotations

from dataclasses import replace

import pytest

from megalm.config.schema import Optim
from megalm.engine.lr_schedule import LearningRate

COSINE = LearningRate(Optim(lr=1.0, warmup_tokens=100, decay_tokens=1100, min_lr_ratio=0.1), total_tokens=5000)


def test_warm_up_is_linear_and_the_first_step_already_learns() -> None:
    assert COSINE.at(0, 10) == pytest.approx(0.1)
    assert COSINE.at(40, 10) == pytest.approx(0.5)
    assert COSINE.at(90, 10) == pytest.approx(1.0)


def test_cosine_falls_to_the_floor_and_stays() -> None:
    assert COSINE.at(100, 10) == pytest.approx(1.0)
    assert COSINE.at(600, 10) == pytest.approx(0.55)
    assert COSINE.at(1100, 10) == pytest.approx(0.1)
    assert COSINE.at(4000, 10) == pytest.approx(0.1)


def test_decay_ends_with_the_run_where_the_config_gives_no_end() -> None:
    linear = LearningRate(Optim(lr=2.0, schedule="linear", min_lr_ratio=0.0), total_tokens=1000)
    assert linear.at(0, 10) == pytest.approx(2.0)
    assert linear.at(500, 10) == pytest.approx(1.0)
    assert linear.at(1000, 10) == pytest.approx(0.0)


def test_constant_stays() -> None:
    constant = LearningRate(Optim(lr=3.0, schedule="constant", warmup_tokens=20), total_tokens=100)
    assert [constant.at(t, 10) for t in (0, 10, 20, 90)] == pytest.approx([1.5, 3.0, 3.0, 3.0])


WSD = Optim(lr=1.0, schedule="wsd", warmup_tokens=100, min_lr_ratio=0.1)


def test_wsd_is_stable_and_decays_over_the_last_tenth() -> None:
    rate = LearningRate(WSD, total_tokens=2000)
    tokens = (0, 50, 90, 100, 1000, 1799, 1800, 1900, 1950, 2000, 3000)
    assert [rate.at(t, 10) for t in tokens] == pytest.approx([0.1, 0.6, 1, 1, 1, 1, 1, 0.55, 0.325, 0.1, 0.1])


def test_wsd_cooldown_has_a_length_an_end_and_a_shape() -> None:
    given = replace(WSD, cooldown_tokens=400, decay_tokens=1000, cooldown="sqrt")
    rate = LearningRate(given, total_tokens=5000)
    tokens = (600, 604, 700, 900, 1000, 5000)
    assert [rate.at(t, 10) for t in tokens] == pytest.approx(
        [1, 0.1 + 0.9 * 0.9, 0.1 + 0.9 * 0.5, 0.1 + 0.9 * (1 - 0.75**0.5), 0.1, 0.1]
    )


def test_wsd_in_a_run_too_short_for_its_phases_warms_up_first() -> None:
    rate = LearningRate(replace(WSD, cooldown_tokens=10**9), total_tokens=300)
    assert [rate.at(t, 10) for t in (40, 100, 200, 300)] == pytest.approx([0.5, 1.0, 0.55, 0.1])


@pytest.mark.parametrize("schedule", ["cosine", "linear", "wsd", "constant"])
def test_a_rate_depends_on_tokens_alone_and_never_rises_after_the_warm_up(schedule: str) -> None:
    optim = replace(WSD, schedule=schedule, lr=3e-4)
    rate = LearningRate(optim, total_tokens=5000)
    rates = [rate.at(t, 7) for t in range(100, 6000, 7)]
    assert rates == sorted(rates, reverse=True)
    assert rates[-1] == pytest.approx(3e-4 if schedule == "constant" else 3e-5)
    assert rates == [LearningRate(optim, 5000).at(t, 7) for t in range(100, 6000, 7)]
