import subprocess
import sys

import pytest

from megalm.training.metrics import StepTimer, mfu, tokens_per_second


class FakeClock:
    def __init__(self):
        self.now = 100.0

    def __call__(self):
        return self.now


def test_a_lap_covers_the_time_since_the_last_one():
    clock = FakeClock()
    timer = StepTimer(clock)
    clock.now += 2
    with timer.waiting_for_data():
        clock.now += 0.5
    assert timer.lap() == (2.5, 0.5)
    clock.now += 1
    assert timer.lap() == (1.0, 0.0)


def test_restart_leaves_out_what_came_between_steps():
    clock = FakeClock()
    timer = StepTimer(clock)
    with timer.waiting_for_data():
        clock.now += 60
    timer.restart()
    clock.now += 3
    assert timer.lap() == (3.0, 0.0)


def test_data_time_counts_even_when_the_loader_raises():
    clock = FakeClock()
    timer = StepTimer(clock)
    with pytest.raises(OSError), timer.waiting_for_data():
        clock.now += 4
        raise OSError
    assert timer.lap() == (4.0, 4.0)


def test_tokens_per_second():
    assert tokens_per_second(4096, 2.0) == 2048
    assert tokens_per_second(4096, 0.0) == 0


def test_mfu_of_the_published_megatron_run():
    # Narayanan et al. 2021, table 1: 145.6B parameters on 1,536 A100s, 148 TFLOP/s per GPU of 312.
    flops_per_token = 1e12
    throughput = 148e12 * 1536 / flops_per_token
    assert mfu(flops_per_token, throughput, 1536, 312e12) == pytest.approx(148 / 312)


def test_mfu_is_none_where_the_peak_is_unknown():
    assert mfu(1e9, 1e6, 4, None) is None


def test_peak_memory_sees_what_the_process_has_held():
    # In a process of its own: a peak never falls, and this one's may be higher already.
    code = (
        "from megalm.training.metrics import peak_memory_gib as peak\n"
        "before = peak('cpu'); block = bytearray(b'x') * 2**28; print(before, peak('cpu') - before)"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    before, grown = map(float, result.stdout.split())
    assert 0 < before < 8
    assert 0.2 < grown < 0.5
