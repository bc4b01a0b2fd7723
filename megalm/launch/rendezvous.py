"""How ranks find each other, before any process group exists: one TCP store, which rank 0 hosts.

The store carries the config from rank 0 to the others, lets them agree on devices and on who reports an error, and is
what the process group is made from. torch is imported here, in functions.
"""

from __future__ import annotations

import contextlib
import time
from dataclasses import dataclass
from datetime import timedelta
from typing import TYPE_CHECKING

from megalm.errors import ConfigError
from megalm.launch.discovery import LOCAL, RankInfo
from megalm.launch.store import START_TIMEOUT
from megalm.launch.waiting import Patience, StoppedError

if TYPE_CHECKING:
    from torch.distributed import Store
_LONGEST_PAUSE_SECONDS = 0.2


@dataclass(frozen=True)
class Meeting:
    """What ranks tell each other through the store, outside any process group."""

    store: Store
    rank: RankInfo
    patience: Patience

    def gather(self) -> None:
        """Wait until every rank has come, before anything is begun that some of them could miss.

        Ranks that megalm starts itself are watched by it. Rank 0, who hosts the store, counts; the others ask once.

        Raises:
            ConfigError: not all have come within a quarter of an hour.
            StoppedError: a signal came first.
        """
        if self.rank.launcher == LOCAL or self.rank.world_size == 1:
            return
        self.store.add("here", 1)
        if self.rank.rank:
            self._wait("all-here")
            return
        deadline, pause = time.monotonic() + START_TIMEOUT.total_seconds(), 0.01
        remind = self.patience.reminder(self._missing)
        while self.store.add("here", 0) < self.rank.world_size:
            self.patience.check()
            if time.monotonic() > deadline:
                raise ConfigError(f"{self._missing()} have not come within {START_TIMEOUT}; start them, too")
            remind()
            time.sleep(pause)
            pause = min(2 * pause, _LONGEST_PAUSE_SECONDS)
        self.store.set("all-here", "1")

    def dismiss(self) -> None:
        """Rank 0 tells the others, as they come, that there is nothing to do."""
        self.publish("")
        self.store.set("all-here", "1")

    def publish(self, text: str) -> None:
        """Rank 0 tells the others what to do."""
        self.store.set("plan", text)

    def receive(self) -> str:
        """What rank 0 published; waits for it."""
        return self.patience.call(lambda: self.store.get("plan"), self._rank_0).decode()

    def all_agree(self, topic: str, yes: bool) -> bool:
        """Whether every rank said yes; waits for all of them."""
        self.store.add(f"{topic}-yes", int(yes))
        self._wait_for_count(f"{topic}-asked", self.rank.world_size)
        return self.store.add(f"{topic}-yes", 0) == self.rank.world_size

    def claim_failure(self, exit_code: int) -> tuple[int, int] | None:
        """Record that this rank failed, unless another has before; who failed first, and with which exit code.

        None when the store is gone, which means that rank 0 is.
        """
        from torch.distributed import DistError

        mine = f"{self.rank.rank}:{exit_code}"
        try:
            first = self.store.compare_set("failure", "", mine).decode()
        except (DistError, RuntimeError):
            return None
        rank, _, code = first.partition(":")
        return int(rank), int(code)

    def first_failure(self, within_seconds: float) -> tuple[int, int] | None:
        """Which rank failed first, and its exit code; None if none says so in time, or the store is gone."""
        from torch.distributed import DistError

        deadline = time.monotonic() + within_seconds
        try:
            while not self.store.check(["failure"]):
                if time.monotonic() > deadline:
                    return None
                time.sleep(0.05)
            rank, _, code = self.store.get("failure").decode().partition(":")
        except (DistError, RuntimeError):
            return None
        return int(rank), int(code)

    def leave_together(self, timeout_seconds: float) -> None:
        """Wait until all ranks have ended; rank 0, who hosts the store, leaves last.

        mpirun and srun end the whole job when the first rank leaves with an exit code, and rank 0 may still be drawing.
        A signal that comes now ends the wait: what there was to save is saved.
        """
        from torch.distributed import DistError

        # The host may have left: so has everybody else. What stopped the run before stops no wait now.
        with contextlib.suppress(DistError, RuntimeError, StoppedError):
            self._wait_for_count("ended", self.rank.world_size, timeout_seconds, self.patience.anew())
            self.store.add("left", 1)
            if self.rank.rank == 0:
                self._wait_for_value("left", self.rank.world_size, 5.0)

    def _wait_for_count(
        self,
        key: str,
        count: int,
        timeout_seconds: float = START_TIMEOUT.total_seconds(),
        patience: Patience | None = None,
    ) -> None:
        """Count this rank, and wait until ``count`` ranks have been; the last one opens the gate."""
        if self.store.add(key, 1) == count:
            self.store.set(f"{key}-all", "1")
        self._wait(f"{key}-all", timeout_seconds, patience)

    def _wait(
        self, key: str, timeout_seconds: float = START_TIMEOUT.total_seconds(), patience: Patience | None = None
    ) -> None:
        """Wait for a key; signals end the wait, and after a while the user hears of it."""
        limit = timedelta(seconds=timeout_seconds)
        (patience or self.patience).call(lambda: self.store.wait([key], limit), self._others)

    def _missing(self) -> str:
        return self.patience.missing(self.rank.world_size - self.store.add("here", 0))

    def _rank_0(self) -> str:
        return f"{self.patience.missing(1)}: rank 0"

    def _others(self) -> str:
        """Which ranks those are is known to the store alone, which is being asked."""
        return f"other ranks at {self.rank.master_addr}:{self.rank.master_port}"

    def _wait_for_value(self, key: str, value: int, timeout_seconds: float) -> None:
        deadline = time.monotonic() + timeout_seconds
        while self.store.add(key, 0) < value and time.monotonic() < deadline:
            time.sleep(0.01)


def init_process_group(store: Store, rank: RankInfo, timeout_seconds: int) -> None:
    """Make torch.distributed's default group; gloo for CPU tensors, NCCL besides where ranks compute on GPUs."""
    import torch
    import torch.distributed as dist

    device = torch.device(rank.device)
    is_cuda = device.type == "cuda"
    if is_cuda:
        torch.cuda.set_device(device)
    dist.init_process_group(
        "cpu:gloo,cuda:nccl" if is_cuda else "gloo",
        store=store,
        rank=rank.rank,
        world_size=rank.world_size,
        timeout=timedelta(seconds=timeout_seconds),
        device_id=device if is_cuda else None,
    )
