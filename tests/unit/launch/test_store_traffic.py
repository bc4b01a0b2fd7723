"""How often a rank asks the store: the same at 8, 1,024 and 16,384 ranks."""

from __future__ import annotations

import threading
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor

import pytest
from counting import CountingStore, CrowdStore
from torch.distributed import HashStore, Store

from megalm.launch import RankInfo
from megalm.launch.device import choose_device
from megalm.launch.gpus import Gpus
from megalm.launch.rendezvous import Failures, Meeting
from megalm.launch.waiting import Patience
from megalm.launch.watch import interval_seconds

PER_NODE = 8
NODE_KEYS = [f"sees/node/{local}" for local in range(PER_NODE)]


def info_of(rank: int, ranks: int) -> RankInfo:
    return RankInfo(
        rank=rank,
        world_size=ranks,
        local_rank=rank % PER_NODE,
        local_world_size=PER_NODE,
        launcher="srun",
        master_addr="",
        master_port=0,
    )


def live(store: Store, info: RankInfo) -> str:
    """A rank's whole life outside process groups; the device that it takes."""
    meeting = Meeting(store, info, Patience(info))
    if info.rank == 0:
        meeting.allow(1)
    meeting.gather()
    meeting.publish("plan") if info.rank == 0 else meeting.receive()
    assert meeting.failures().known_failure() is None
    node = f"node{info.rank // PER_NODE}" if info.world_size == PER_NODE else "node"
    seen = Gpus("node", (f"GPU-{node}-{info.local_rank}-{info.rank}",))
    device = choose_device("auto", meeting, {}, lambda: seen)
    meeting.leave_together(30)
    return device


def calls_among_threads(ranks: int) -> list[Counter[str]]:
    """Of all ranks of a job, each a thread."""
    store, calls = HashStore(), [Counter[str]() for _ in range(ranks)]
    with ThreadPoolExecutor(ranks) as pool:
        lives = pool.map(lambda rank: live(CountingStore(store, calls[rank]), info_of(rank, ranks)), range(ranks))
        assert set(lives) == {"cuda:0"}
    return calls


def calls_in_a_crowd(rank: int, ranks: int) -> Counter[str]:
    """Of one rank of a job of any size: what it asks depends on nobody else, but for who is last."""
    calls: Counter[str] = Counter()
    values = {"plan": "plan", "connections": "1"} | dict.fromkeys(NODE_KEYS, "other")
    counts = {f"{topic}-yes": ranks for topic in ("gpus-told", "gpus-suit")} | {"here": ranks, "left": ranks}
    live(CountingStore(CrowdStore(values, counts), calls), info_of(rank, ranks))
    return calls


MOST = 24
"""here, all-here, plan, connections, failure; told twice; five agreements of four calls or fewer; ended, left."""


@pytest.mark.parametrize("ranks", [8, 1024, 16_384])
def test_calls_per_rank_do_not_grow(ranks: int) -> None:
    same = calls_in_a_crowd(1, 8)
    assert sum(same.values()) <= MOST, same
    for rank in (1, 2, ranks // 2, ranks - 1):
        assert calls_in_a_crowd(rank, ranks) == same
    host = calls_in_a_crowd(0, ranks)
    assert sum(host.values()) <= MOST + 2, host


def test_a_crowd_counts_as_real_ranks_do() -> None:
    """The last to come opens each gate, which is one call more, once for each gate among all ranks."""
    ranks, gates = PER_NODE, 4
    expected = calls_in_a_crowd(1, ranks)
    found = calls_among_threads(ranks)
    for calls in found[1:]:
        assert calls - Counter(set=gates) <= expected
        assert expected <= calls
    assert sum(calls["set"] - expected["set"] for calls in found[1:]) <= gates


def test_the_watch_asks_once_an_interval_and_all_together_never_more_than_2000_times_a_second() -> None:
    calls: Counter[str] = Counter()
    failures = Failures(CountingStore(HashStore(), calls))
    for _ in range(3):
        assert failures.known_failure() is None
    assert calls == {"check": 3}
    for ranks in (8, 1024, 16_384, 65_536):
        assert ranks / interval_seconds(ranks) <= 2000
    assert [interval_seconds(ranks) for ranks in (8, 1024, 16_384)] == [1.0, 1.0, 8.192]


def test_who_asks_for_a_failure_asks_once_however_long_it_waits() -> None:
    store, calls = HashStore(), Counter[str]()
    info = info_of(1, 8)
    meeting = Meeting(CountingStore(store, calls), info, Patience(info))
    threading.Timer(0.4, lambda: store.set("failure", "3:4")).start()
    began = time.monotonic()
    assert meeting.first_failure(20) == (3, 4)
    assert time.monotonic() - began < 10
    assert calls == {"wait": 1, "get": 1}
    assert Meeting(CountingStore(HashStore(), calls), info, Patience(info)).first_failure(0.1) is None
