"""Which device ranks take; the number of GPUs is all that is made up."""

from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch.distributed import HashStore

from megalm.errors import ConfigError
from megalm.launch import RankInfo, device
from megalm.launch.rendezvous import Meeting
from megalm.launch.waiting import Patience


def choose(monkeypatch, wanted, gpus, *, nodes=1, ranks_per_node=4):
    """What each rank of ``nodes`` machines chooses; ``gpus`` by machine."""
    store = HashStore()
    world_size = nodes * ranks_per_node
    infos = [
        RankInfo(
            rank=rank,
            world_size=world_size,
            local_rank=rank % ranks_per_node,
            local_world_size=ranks_per_node,
            launcher="srun",
            master_addr="",
            master_port=0,
        )
        for rank in range(world_size)
    ]
    import threading

    here = threading.local()
    monkeypatch.setattr(device, "_gpu_count", lambda: gpus[here.node])

    def run(info):
        here.node = info.rank // ranks_per_node
        try:
            return device.choose_device(wanted, Meeting(store, info, Patience(info)))
        except ConfigError as error:
            return error

    with ThreadPoolExecutor(world_size) as pool:
        return list(pool.map(run, infos))


def test_one_gpu_per_rank(monkeypatch):
    assert choose(monkeypatch, "auto", [4]) == [(f"cuda:{rank}", None) for rank in range(4)]


def test_too_few_gpus_are_said_so(monkeypatch):
    assert choose(monkeypatch, "auto", [2]) == [("cpu", "2 GPUs for 4 ranks: computing on the CPU")] * 4


def test_none_at_all_is_no_news(monkeypatch):
    assert choose(monkeypatch, "auto", [0]) == [("cpu", None)] * 4


def test_ranks_of_all_machines_agree(monkeypatch):
    found = choose(monkeypatch, "auto", [2, 1], nodes=2, ranks_per_node=2)
    assert [name for name, _ in found] == ["cpu"] * 4


def test_cuda_is_refused_on_every_rank_where_it_is_missing_on_one(monkeypatch):
    found = choose(monkeypatch, "cuda", [2, 1], nodes=2, ranks_per_node=2)
    assert all(isinstance(error, ConfigError) for error in found)
    assert "1 GPU for 2 ranks" in str(found[2])
    assert "another machine" in str(found[0])


def test_cpu_asks_nobody(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: pytest.fail("asked"))
    info = RankInfo(
        rank=0, world_size=2, local_rank=0, local_world_size=2, launcher="local", master_addr="", master_port=0
    )
    assert device.choose_device("cpu", Meeting(HashStore(), info, Patience(info))) == ("cpu", None)


@pytest.mark.parametrize(
    ("where", "dtype", "capability", "is_slow"),
    [
        ("cpu", "bf16", "AVX2", True),
        ("cpu", "fp16", "NO AVX", True),
        ("cpu", "fp32", "AVX2", False),
        ("cpu", "bf16", "AVX512", False),
        ("cpu", "bf16", "SVE256", False),
        ("cuda:0", "bf16", "AVX2", False),
    ],
)
def test_a_processor_that_emulates_the_format_is_told_of(monkeypatch, where, dtype, capability, is_slow):
    monkeypatch.setattr(device, "_cpu_capability", lambda: capability)
    line = device.slow_format(where, dtype)
    assert (line is not None) == is_slow
    assert line is None or (f"engine.dtype={dtype}: " in line and "engine=fp32_zero1" in line)
