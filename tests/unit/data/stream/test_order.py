"""The order of samples: a pure function that visits every sequence once per epoch."""

from __future__ import annotations

import tracemalloc
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megalm.data.stream.order import PERIOD, BlendedOrder, SampleOrder, permute, quotas_of, samples_of_each

orders = st.builds(
    SampleOrder,
    num_sequences=st.integers(1, 400),
    seed=st.integers(0, 2**31),
    block_sequences=st.integers(1, 9),
    lanes=st.integers(1, 5),
    window_blocks=st.integers(1, 5),
)


@settings(max_examples=200, deadline=None)
@given(order=orders, epoch=st.integers(0, 3))
def test_every_epoch_visits_every_sequence_once(order: SampleOrder, epoch: int) -> None:
    samples = np.arange(epoch * order.num_sequences, (epoch + 1) * order.num_sequences)
    epochs, sequences = order(samples)
    assert set(epochs.tolist()) == {epoch}
    assert sorted(sequences.tolist()) == list(range(order.num_sequences))


@settings(max_examples=50, deadline=None)
@given(order=orders, start=st.integers(0, 2000), cut=st.integers(0, 60))
def test_it_is_pure_however_it_is_asked(order: SampleOrder, start: int, cut: int) -> None:
    samples = np.arange(start, start + 60)
    whole = order(samples)[1]
    parts = np.concatenate([order(samples[:cut])[1], order(samples[cut:])[1]]) if 0 < cut < 60 else whole
    assert np.array_equal(whole, parts)
    assert [int(order(int(s))[1][0]) for s in samples[:5]] == whole[:5].tolist()


@given(order=orders, epoch=st.integers(0, 3))
@settings(max_examples=100, deadline=None)
def test_the_sample_of_a_sequence_is_the_inverse(order: SampleOrder, epoch: int) -> None:
    samples = np.arange(epoch * order.num_sequences, (epoch + 1) * order.num_sequences)
    assert np.array_equal(order.sample_of(*order(samples)), samples)


def test_the_inverse_needs_no_walk_through_an_epoch() -> None:
    order = SampleOrder(10**13, seed=0, block_sequences=64, lanes=1024, window_blocks=8)
    samples = np.arange(10**14, 10**14 + 64)
    assert np.array_equal(order.sample_of(*order(samples)), samples)


def test_golden_values_never_change() -> None:
    """A run that began with one megalm is resumed with the next: these numbers are a promise."""
    plain = SampleOrder(1000, seed=7)
    levels = SampleOrder(1003, seed=7, block_sequences=4, lanes=8, window_blocks=2)
    assert plain(np.arange(8))[1].tolist() == GOLDEN_PLAIN
    assert levels(np.arange(1003, 1011))[1].tolist() == GOLDEN_LEVELS


GOLDEN_PLAIN = [501, 883, 682, 60, 820, 991, 266, 200]
GOLDEN_LEVELS = [56, 964, 764, 669, 70, 199, 978, 935]


def test_epochs_and_seeds_give_different_orders() -> None:
    first = SampleOrder(500, seed=1)
    assert not np.array_equal(first(np.arange(500))[1], first(np.arange(500, 1000))[1])
    assert not np.array_equal(first(np.arange(500))[1], SampleOrder(500, seed=2)(np.arange(500))[1])


def test_the_order_looks_random() -> None:
    sequences = SampleOrder(4096, seed=3)(np.arange(4096))[1]
    assert abs(np.corrcoef(sequences[:-1], sequences[1:])[0, 1]) < 0.06
    halves = np.bincount(sequences[:1024] * 16 // 4096, minlength=16)
    assert halves.min() > 30, "the first quarter is spread over the whole dataset"


def test_a_huge_dataset_needs_no_table() -> None:
    order = SampleOrder(10**13, seed=0, block_sequences=64, lanes=1024, window_blocks=8)
    epochs, sequences = order(np.arange(10**12, 10**12 + 64))
    assert set(epochs.tolist()) == {0}
    assert len(set(sequences.tolist())) == 64
    assert sequences.max() < 10**13


def test_blocks_stay_together_within_a_window() -> None:
    order = SampleOrder(640, seed=5, block_sequences=16, lanes=1, window_blocks=1)
    for start in range(0, 640, 16):
        block = order(np.arange(start, start + 16))[1]
        assert block.max() - block.min() == 15


@pytest.mark.parametrize("n", [1, 2, 3, 4, 5, 17, 256, 257])
def test_permute_is_a_bijection(n: int) -> None:
    values = permute(np.arange(n), n, np.array([99], dtype=np.uint64))
    assert sorted(values.tolist()) == list(range(n))


GOLDEN_BILLIONS = [537879888519, 16302258902, 679271207298, 106632941139, 887940890795]


def test_golden_values_of_a_million_million_sequences_in_little_memory() -> None:
    order = SampleOrder(10**12, seed=7)
    tracemalloc.start()
    sequences = order(np.array([0, 1, 10**12 - 1, 10**12, 5 * 10**13]))[1]
    peak_bytes = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert sequences.tolist() == GOLDEN_BILLIONS
    assert peak_bytes < 2**20


def test_a_lane_reads_its_own_blocks_in_whole_windows() -> None:
    sequences = SampleOrder(240, seed=9, block_sequences=5, lanes=2, window_blocks=4)(np.arange(240))[1]
    for lane in (0, 1):
        own = sequences[lane::2]
        for start in range(0, 120, 20):
            blocks = own[start : start + 20] // 5
            assert len(set(blocks.tolist())) == 4, "twenty sequences of a lane come from four blocks of five"


blends = st.integers(1, 4).flatmap(
    lambda corpora: st.builds(
        BlendedOrder.of,
        st.lists(st.integers(1, 300), min_size=corpora, max_size=corpora),
        st.one_of(
            st.just(()),
            st.lists(st.floats(0.01, 100).map(lambda x: round(x, 4)), min_size=corpora, max_size=corpora),
        ),
        seed=st.integers(0, 2**31),
        block_sequences=st.integers(1, 5),
        lanes=st.integers(1, 4),
        window_blocks=st.integers(1, 4),
    )
)


@settings(max_examples=100, deadline=None)
@given(order=blends, samples=st.integers(1, 3000))
def test_a_blend_reads_every_corpus_exactly_once_per_epoch(order: BlendedOrder, samples: int) -> None:
    """With one lane strictly; lanes run side by side, so that one may begin an epoch a little before another."""
    corpus, epoch, sequence = order(np.arange(samples))
    lanes = order.orders[0].lanes
    for number, own in enumerate(order.orders):
        mine = corpus == number
        read = set(zip(epoch[mine].tolist(), sequence[mine].tolist(), strict=True))
        assert len(read) == mine.sum(), "no sequence twice in an epoch"
        if lanes == 1:
            whole, rest = divmod(int(mine.sum()), own.num_sequences)
            counts = np.bincount(epoch[mine], minlength=whole + 1)
            assert counts[:whole].tolist() == [own.num_sequences] * whole
            assert counts[whole] == rest


@settings(max_examples=100, deadline=None)
@given(order=blends, start=st.integers(0, 10**12))
def test_the_inverse_of_a_blend(order: BlendedOrder, start: int) -> None:
    samples = np.arange(start, start + 200)
    corpus, epoch, sequence = order(samples)
    for number in range(len(order.orders)):
        mine = corpus == number
        if mine.any():
            assert np.array_equal(order.sample_of(number, epoch[mine], sequence[mine]), samples[mine])


def test_one_corpus_repeats_while_another_does_not() -> None:
    order = BlendedOrder.of([100, 1000], [1, 1], seed=3)
    corpus, epoch, _ = order(np.arange(1600))
    assert epoch[corpus == 0].max() == 7
    assert epoch[corpus == 1].max() == 0
    assert [float(times) for times in order.epochs_after(1600)] == [8.0, 0.8]


@settings(max_examples=100, deadline=None)
@given(order=blends, start=st.integers(0, 2**40))
def test_every_stretch_of_a_blend_holds_its_weights(order: BlendedOrder, start: int) -> None:
    """Evenly spread: over any 500 samples each corpus is within a few samples of its share, in every lane."""
    corpus, _, _ = order(np.arange(start, start + 500))
    slack = 2 * len(order.orders) * order.orders[0].lanes
    for number, quota in enumerate(order.quotas):
        assert abs((corpus == number).sum() - 500 * quota / PERIOD) <= slack


@settings(max_examples=100, deadline=None)
@given(order=blends, samples=st.integers(0, 3000))
def test_samples_of_each_corpus_are_counted_without_looking_at_them(order: BlendedOrder, samples: int) -> None:
    counts = samples_of_each(order.quotas, order.orders[0].lanes, samples)
    corpus, _, _ = order(np.arange(samples))
    assert counts == np.bincount(corpus, minlength=len(order.orders)).tolist()
    assert order.epochs_after(samples) == [
        Fraction(count, each.num_sequences) for count, each in zip(counts, order.orders, strict=True)
    ]


def test_weights_default_to_sizes_and_are_exact_to_the_period() -> None:
    assert BlendedOrder.of([300, 100], seed=0).quotas == (PERIOD * 3 // 4, PERIOD // 4)
    assert sum(quotas_of([1, 1, 1])) == PERIOD
    assert quotas_of([0.1, 0.2]) == quotas_of([1, 2])


def test_a_weight_that_would_never_be_drawn_is_refused() -> None:
    with pytest.raises(ValueError, match="less than one sample in 65536"):
        quotas_of([1, 1e-7])


def test_golden_values_of_a_blend_never_change() -> None:
    order = BlendedOrder.of([1000, 503], [0.7, 0.3], seed=7, block_sequences=4, lanes=2, window_blocks=2)
    corpus, epoch, sequence = order(np.arange(5000, 5012))
    assert corpus.tolist() == GOLDEN_BLEND[0]
    assert epoch.tolist() == GOLDEN_BLEND[1]
    assert sequence.tolist() == GOLDEN_BLEND[2]


GOLDEN_BLEND = [
    [0, 0, 1, 0, 0, 0, 0, 1, 1, 0, 0, 0],
    [3, 3, 2, 3, 3, 3, 3, 2, 2, 3, 3, 3],
    [244, 950, 169, 138, 246, 951, 300, 237, 239, 139, 301, 136],
]


@settings(max_examples=60, deadline=None)
@given(
    sizes=st.lists(st.integers(1, 60), min_size=1, max_size=3),
    lanes=st.integers(1, 5),
    block=st.integers(1, 4),
    samples=st.integers(0, 700),
)
def test_times_read_are_those_of_the_samples(sizes: list[int], lanes: int, block: int, samples: int) -> None:
    order = BlendedOrder.of(sizes, seed=5, block_sequences=block, lanes=lanes, window_blocks=2)
    corpora, _, sequences = order(np.arange(samples)) if samples else (np.empty(0, np.int64),) * 3
    for corpus, size in enumerate(sizes):
        counted = np.bincount(sequences[corpora == corpus], minlength=size)
        assert order.times_read(corpus, np.arange(size), samples).tolist() == counted.tolist()


def test_times_read_of_a_long_run_look_up_its_last_epoch_alone() -> None:
    order = BlendedOrder.of([10**9, 10**6], [1, 1], seed=0, block_sequences=64, lanes=1024, window_blocks=8)
    counts = order.times_read(1, np.arange(1000), 2 * 10**12)
    assert set(counts.tolist()) <= {999_999, 1_000_000, 1_000_001}
