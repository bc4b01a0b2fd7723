"""The learning rate over tokens."""

from __future__ import annotations

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
