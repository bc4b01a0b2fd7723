"""A rank whose peer has failed ends: by itself, by its aborted communicators, or at last from its watch's thread."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable

import pytest
from torch.distributed import HashStore, TCPStore

from megalm.launch import RankInfo
from megalm.launch.rendezvous import Failures, Meeting
from megalm.launch.waiting import Patience
from megalm.launch.watch import FailureWatch

INFO = RankInfo(rank=1, world_size=4, local_rank=1, local_world_size=4, launcher="srun", master_addr="", master_port=0)
ALONE = RankInfo(
    rank=0, world_size=1, local_rank=0, local_world_size=1, launcher="local", master_addr="", master_port=0
)


class Rank:
    """What a watch does to its process, in order."""

    def __init__(self, store: HashStore, info: RankInfo = INFO, abort: Callable[[], bool] = lambda: False) -> None:
        self.did: list[str] = []
        self.left = threading.Event()
        self.watch = FailureWatch(
            info,
            Failures(store),
            abort=lambda: (self.did.append("abort"), abort())[1],
            last_wish=lambda: self.did.append("wish"),
            log=lambda text: self.did.append(text.strip()),
            leave=self._leave,
            interval=0.05,
            grace=0.1,
        )
        self.watch.start()

    def _leave(self, code: int) -> None:
        self.did.append(f"leave {code}")
        self.left.set()


def test_a_rank_that_is_stuck_ends_with_the_failed_ranks_code() -> None:
    store = HashStore()
    rank = Rank(store)
    time.sleep(0.3)
    assert rank.did == [], "nothing has failed"
    store.set("failure", "3:4")
    assert rank.left.wait(20)
    said = "rank 3 failed (exit code 4), and this rank waits in vain: it ends, too"
    assert rank.did == ["abort", "wish", said, "leave 4"]


def test_a_main_thread_that_ends_by_itself_is_left_alone() -> None:
    store = HashStore()
    rank = Rank(store)
    store.set("failure", "3:4")
    rank.watch.stop()
    assert not rank.left.wait(0.5)
    assert rank.did == []


def test_a_main_thread_that_the_abort_has_freed_ends_by_itself() -> None:
    store = HashStore()
    rank = Rank(store, abort=lambda: (rank.watch.stop(), True)[1])
    store.set("failure", "3:4")
    assert not rank.left.wait(1)
    assert rank.did == ["abort"]


def test_an_abort_that_fails_ends_the_process_nevertheless() -> None:
    def fail() -> bool:
        raise RuntimeError("NCCL is gone")

    store = HashStore()
    rank = Rank(store, abort=fail)
    store.set("failure", "0:70")
    assert rank.left.wait(20)
    assert rank.did[:3] == ["abort", "communicators: RuntimeError: NCCL is gone", "wish"]
    assert rank.did[-1] == "leave 70"


def test_an_abort_that_hangs_is_not_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("megalm.launch.watch.ABORT_SECONDS", 0.2)
    store, hanging = HashStore(), threading.Event()
    rank = Rank(store, abort=lambda: hanging.wait(60))
    store.set("failure", "2:3")
    assert rank.left.wait(20)
    assert rank.did[-1] == "leave 3"
    hanging.set()


def test_its_own_failure_is_the_main_threads_business() -> None:
    store = HashStore()
    rank = Rank(store)
    store.set("failure", "1:4")
    assert not rank.left.wait(0.5)
    assert rank.did == []


def test_the_loss_of_the_store_is_the_loss_of_rank_0() -> None:
    class Gone:
        def check(self, keys: list[str]) -> bool:
            raise RuntimeError("Connection reset by peer")

    rank = Rank(Gone())  # type: ignore[arg-type]
    assert rank.left.wait(20)
    assert rank.did[-1] == "leave 1"


def test_a_rank_without_others_has_no_thread() -> None:
    before = threading.active_count()
    Rank(HashStore(), ALONE)
    assert threading.active_count() == before


def test_the_watch_looks_while_its_rank_waits_in_the_store() -> None:
    """Over one connection a call would wait until the other thread's has ended."""
    host = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    client = TCPStore("127.0.0.1", host.port, is_master=False, wait_for_workers=False)
    Meeting(host, ALONE, Patience(ALONE)).allow(2)
    failures = Meeting(client, INFO, Patience(INFO)).failures()
    waiting = threading.Thread(target=lambda: client.wait(["never"]), daemon=True)
    waiting.start()
    time.sleep(0.2)
    began = time.monotonic()
    assert failures.known_failure() is None
    assert Meeting(host, ALONE, Patience(ALONE)).claim_failure(4) == (0, 4)
    assert failures.known_failure() == (0, 4)
    assert time.monotonic() - began < 5
    assert waiting.is_alive()
    host.set("never", "")
    waiting.join(20)
