"""The learning rate over tokens."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megalm.config.schema import Optim
from megalm.engine.lr_schedule import Course, LearningRate

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


SHAPES = st.sampled_from(
    [("cosine", "linear"), ("linear", "linear"), ("wsd", "linear"), ("wsd", "sqrt"), ("constant", "linear")]
)


@given(
    shape=SHAPES,
    warmup=st.integers(0, 300),
    floor=st.sampled_from([0.0, 0.1]),
    lives=st.lists(st.tuples(st.integers(1, 32), st.integers(1, 12), st.integers(0, 30)), min_size=1, max_size=6),
)
def test_the_rate_is_continuous_whatever_batch_and_length_a_run_is_resumed_with(
    shape: tuple[str, str], warmup: int, floor: float, lives: list[tuple[int, int, int]]
) -> None:
    """No jump at a resume is larger than the largest change from step to step that a schedule followed has itself."""
    optim = Optim(lr=1.0, schedule=shape[0], cooldown=shape[1], warmup_tokens=warmup, min_lr_ratio=floor)
    tokens, natural, rates, jumps, changes = 0, 0.0, [], [], [0.0]
    schedule: LearningRate | None = None
    for step_tokens, steps, more in lives:
        total = tokens + (steps + more) * step_tokens
        schedule = LearningRate(optim, total) if schedule is None else schedule.resumed(optim, tokens, total)
        planned = [schedule.at(t, step_tokens) for t in range(tokens, total, step_tokens)]
        changes += [abs(after - before) for before, after in pairwise(planned)]
        if rates:
            jumps.append(abs(planned[0] - rates[-1]))
            changes.append(abs(natural - rates[-1]))  # the step that the life before would have taken next
            changes.append(step_tokens / max(warmup, 1) if tokens < warmup else 0.0)
        rates += planned[:steps]
        tokens += steps * step_tokens
        natural = schedule.at(tokens, step_tokens)
        schedule = LearningRate(optim, total, Course.from_dict(schedule.course.to_dict()))
    assert all(jump <= max(changes) + 1e-12 for jump in jumps)
    assert schedule is not None
    if optim.schedule != "constant" and schedule.course.decay_end > schedule.course.decay_start:
        assert schedule.at(schedule.total_tokens, 1) == pytest.approx(floor)


PLAIN = Optim(lr=1.0, min_lr_ratio=0.1)


def test_an_unchanged_run_goes_on_to_the_last_bit() -> None:
    for name in ("cosine", "linear", "wsd", "constant"):
        before = LearningRate(replace(WSD, schedule=name), total_tokens=5000)
        for tokens in (0, 37, 100, 1234, 4900, 5000):
            after = before.resumed(replace(WSD, schedule=name), tokens, 5000)
            assert [after.at(t, 7) for t in range(tokens, 6000, 7)] == [before.at(t, 7) for t in range(tokens, 6000, 7)]


def test_another_batch_spreads_what_is_left_of_the_decay() -> None:
    before = LearningRate(PLAIN, total_tokens=1000)
    for total in (750, 1500):  # at 500 tokens: half the batch, twice the batch
        after = before.resumed(PLAIN, 500, total)
        assert after.at(500, 10) == before.at(500, 10) == pytest.approx(0.55)
        assert after.at((500 + total) // 2, 10) == pytest.approx(before.at(750, 10))
        assert after.at(total, 10) == pytest.approx(0.1)


def test_a_cooldown_comes_and_ends_at_the_horizon_with_any_batch() -> None:
    before = LearningRate(WSD, total_tokens=2000)
    for total in (1500, 3000):
        after = before.resumed(WSD, 1000, total)
        assert [after.at(t, 10) for t in (1000, total * 9 // 10, total)] == pytest.approx([1.0, 1.0, 0.1])
        assert after.at(total * 19 // 20, 10) == pytest.approx(0.55)


def test_a_cooldown_that_has_begun_goes_on_to_the_new_end() -> None:
    after = LearningRate(WSD, total_tokens=2000).resumed(WSD, 1900, 2400)
    assert [after.at(t, 10) for t in (1900, 2150, 2400)] == pytest.approx([0.55, 0.325, 0.1])


def test_a_finished_run_stays_at_its_floor_and_does_so_at_every_resume() -> None:
    after = LearningRate(PLAIN, total_tokens=1000).resumed(PLAIN, 1000, 2000)
    again = after.resumed(PLAIN, 1500, 3000)
    assert [after.at(t, 10) for t in (1000, 1990)] == [again.at(1500, 10), again.at(2990, 10)] == [0.1, 0.1]


def test_a_longer_decay_is_a_new_schedule_for_a_finished_run_and_a_stretch_for_another() -> None:
    longer = replace(PLAIN, decay_tokens=2000)
    finished = LearningRate(PLAIN, total_tokens=1000).resumed(longer, 1000, 2000)
    assert finished.at(1000, 10) == LearningRate(longer, 2000).at(1000, 10) == pytest.approx(0.55)
    assert finished.resumed(longer, 1500, 2000).at(1500, 10) == finished.at(1500, 10), "a requeued job goes on"
    unfinished = LearningRate(PLAIN, total_tokens=1000).resumed(longer, 500, 2000)
    assert [unfinished.at(t, 10) for t in (500, 1250, 2000)] == pytest.approx([0.55, 0.1 + 0.9 * 0.1464466, 0.1])


def test_a_rewarm_rises_from_where_the_rate_is_and_is_done_once() -> None:
    asked = replace(PLAIN, rewarm_tokens=200)
    after = LearningRate(PLAIN, total_tokens=1000).resumed(asked, 1000, 2200)
    assert [after.at(t, 10) for t in (990, 1090, 1190, 1200, 1700, 2200)] == pytest.approx([0.1, 0.55, 1, 1, 0.55, 0.1])
    again = after.resumed(asked, 1100, 2200)
    assert [again.at(t, 10) for t in range(1100, 2200, 10)] == [after.at(t, 10) for t in range(1100, 2200, 10)]


def test_another_shape_begins_where_the_rate_is() -> None:
    before = LearningRate(PLAIN, total_tokens=1000)
    for name, end in (("linear", 0.1), ("wsd", 0.1), ("constant", 0.55)):
        after = before.resumed(replace(PLAIN, schedule=name), 500, 2000)
        assert after.at(500, 10) == pytest.approx(0.55), name
        assert after.at(2000, 10) == pytest.approx(end), name
    held = LearningRate(replace(PLAIN, schedule="constant"), 1000).resumed(PLAIN, 500, 1000)
    assert [held.at(t, 10) for t in (500, 750, 1000)] == pytest.approx([1.0, 0.55, 0.1])


def test_a_warm_up_goes_on_with_another_batch_and_another_length() -> None:
    before = LearningRate(PLAIN, 1000)
    assert before.at(0, 10) == 1.0
    warm = replace(PLAIN, warmup_tokens=100)
    after = LearningRate(warm, 1000).resumed(warm, 40, 2000)
    assert [after.at(t, 5) for t in (40, 95, 1050)] == pytest.approx([0.45, 1.0, 0.55])
    longer = LearningRate(warm, 1000).resumed(replace(warm, warmup_tokens=200), 40, 1000)
    assert [longer.reached(t) for t in (40, 120, 200)] == pytest.approx([0.4, 0.7, 1.0])
