"""The batch size over samples: published values, and totals against stepping through a run."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megalm.config.schema import Train
from megalm.data.stream.batch_size import BatchSize

GPT3 = BatchSize.of(
    Train(
        steps=95_000,
        micro_batch_size=1,
        global_batch_size=1536,
        batch_ramp_start=16,
        batch_ramp_increment=16,
        batch_ramp_tokens=5_859_375 * 2048,
    ),
    sequence_length=2048,
)
"""Megatron-LM's example for GPT-3 175B: ``--rampup-batch-size 16 16 5859375`` (samples) and a batch of 1,536."""


def test_constant_without_a_ramp() -> None:
    constant = BatchSize.of(Train(steps=10, micro_batch_size=1, global_batch_size=6), sequence_length=4)
    assert [constant.at(samples) for samples in (0, 6, 10**15)] == [6, 6, 6]
    assert constant.samples_after(10) == 60
    assert constant.tokens_after(10) == 240


@pytest.mark.parametrize(
    ("samples", "size"),
    # 95 increments of 16 over 5,859,375 samples: 61,677.6 samples at each size.
    [
        (0, 16),
        (61_677, 16),
        (61_678, 32),
        (123_355, 32),
        (123_356, 48),
        (2_929_687, 768),
        (5_797_697, 1504),
        (5_797_698, 1520),
        (5_859_374, 1520),
        (5_859_375, 1536),
        (10**12, 1536),
    ],
)
def test_gpt3_175b_rises_as_in_megatron(samples: int, size: int) -> None:
    assert GPT3.at(samples) == size


def test_increment_is_the_start_where_it_is_not_given() -> None:
    train = Train(steps=1, micro_batch_size=1, global_batch_size=12, batch_ramp_start=4, batch_ramp_tokens=80)
    assert list(BatchSize.of(train, sequence_length=1).sizes) == [4, 8, 12]


@given(
    start=st.integers(1, 9),
    increment=st.integers(1, 9),
    increments=st.integers(0, 6),
    ramp_tokens=st.integers(1, 3000),
    sequence_length=st.integers(1, 9),
    steps=st.integers(0, 80),
)
def test_totals_are_those_of_stepping_through_a_run(
    start: int, increment: int, increments: int, ramp_tokens: int, sequence_length: int, steps: int
) -> None:
    ramp = BatchSize(start + increments * increment, start, increment, ramp_tokens, sequence_length)
    samples, sizes = 0, []
    for _ in range(steps):
        sizes.append(ramp.at(samples))
        samples += sizes[-1]
    assert ramp.samples_after(steps) == samples
    assert ramp.tokens_after(steps) == samples * sequence_length
    assert sizes == sorted(sizes)
    assert set(sizes) <= set(ramp.sizes)
    assert ramp.at(-(-ramp_tokens // sequence_length)) == ramp.final
