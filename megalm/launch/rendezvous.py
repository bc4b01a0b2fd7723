"""How ranks find each other, before any process group exists: one TCP store, which rank 0 hosts.

The store carries the config from rank 0 to the others, lets them agree on devices and on who reports an error, and is
what the process group is made from. torch is imported here, in functions.
"""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Callable, MutableMapping
from dataclasses import dataclass
from datetime import timedelta
from typing import TYPE_CHECKING

from megalm.errors import ConfigError, ExitCode
from megalm.launch.discovery import LOCAL, RankInfo
from megalm.launch.store import START_TIMEOUT, another_connection
from megalm.launch.waiting import Patience, StoppedError
from megalm.launch.watch import interval_seconds
from megalm.mesh.transport import NCCL, transport_of

if TYPE_CHECKING:
    from torch.distributed import Store

_FAILURE = "failure"
"""Key under which the first rank that fails says so."""

_CONNECTIONS = "connections"
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

    def allow(self, connections: int) -> None:
        """Rank 0 says how many connections each rank may have to the store; before :meth:`publish`."""
        self.store.set(_CONNECTIONS, str(connections))

    def failures(self) -> Failures:
        """What this rank's watch looks at, over a connection of its own where the store's host has room for that.

        Without one it waits while this rank waits in the store.
        """
        return Failures(another_connection(self.store) if int(self.store.get(_CONNECTIONS)) > 1 else self.store)

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

    def tell(self, key: str, value: str) -> None:
        """Leave something for other ranks to read, which :meth:`all_agree` makes sure of."""
        self.store.set(key, value)

    def told(self, keys: list[str]) -> list[str]:
        """What ranks have left; one request. A rank that has left nothing is waited for."""
        values = self.patience.call(lambda: self.store.multi_get(keys), self._others)
        return [value.decode() for value in values]

    def count(self, key: str) -> int:
        """How many ranks have counted something, this one included."""
        return self.store.add(key, 1)

    def note(self, topic: str, text: str) -> None:
        """Say something that is enough to be said by one rank: the first one's is kept."""
        self.store.compare_set(topic, "", text)

    def noted(self, topic: str) -> str:
        """What the first rank to :meth:`note` has said; waits for it."""
        return self.patience.call(lambda: self.store.get(topic), self._others).decode()

    def claim_failure(self, exit_code: int) -> tuple[int, int] | None:
        """Record that this rank failed, unless another has before; who failed first, and with which exit code.

        None when the store is gone, which means that rank 0 is.
        """
        from torch.distributed import DistError

        try:
            return _failure(self.store.compare_set(_FAILURE, "", f"{self.rank.rank}:{exit_code}"))
        except (DistError, RuntimeError):
            return None

    def first_failure(self, within_seconds: float) -> tuple[int, int] | None:
        """Which rank failed first, and its exit code; None if none says so in time, or the store is gone."""
        from torch.distributed import DistError

        try:
            self.store.wait([_FAILURE], timedelta(seconds=within_seconds))
            return _failure(self.store.get(_FAILURE))
        except (DistError, RuntimeError):
            return None

    def leave_together(self, timeout_seconds: float, when_ended: Callable[[], None] = lambda: None) -> None:
        """Wait until all ranks have ended; rank 0, who hosts the store, leaves last.

        ``when_ended`` is called once all have: the store may be gone at any moment from then on.

        mpirun and srun end the whole job when the first rank leaves with an exit code, and rank 0 may still be drawing.
        A signal that comes now ends the wait: what there was to save is saved.
        """
        from torch.distributed import DistError

        # The host may have left: so has everybody else. What stopped the run before stops no wait now.
        with contextlib.suppress(DistError, RuntimeError, StoppedError):
            self._wait_for_count("ended", self.rank.world_size, timeout_seconds, self.patience.anew())
            when_ended()
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


@dataclass(frozen=True)
class Failures:
    """Failures as a rank's watch sees them.

    Attributes:
        store: where they are recorded; best a connection of its own: a call waits while another thread's call waits.
    """

    store: Store

    def known_failure(self) -> tuple[int, int] | None:
        """The first one; the host's, rank 0, when the store is gone."""
        from torch.distributed import DistError

        try:
            return _failure(self.store.get(_FAILURE)) if self.store.check([_FAILURE]) else None
        except (DistError, RuntimeError):
            return 0, int(ExitCode.PEER_FAILED)


def _failure(value: bytes) -> tuple[int, int]:
    rank, _, code = value.decode().partition(":")
    return int(rank), int(code)


def init_process_group(
    store: Store, rank: RankInfo, timeout_seconds: int, environ: MutableMapping[str, str] = os.environ
) -> None:
    """Make torch.distributed's default group: of gloo on CPUs, of NCCL on GPUs, never of both.

    gloo connects each process with every other one, over which 1,024 ranks take minutes and a thousand descriptors; on
    GPUs all that ranks tell each other is in device tensors or goes through the store.

    Raises:
        ConfigError: torch's debug mode is on, which makes such a gloo group for each group of NCCL.
    """
    import torch
    import torch.distributed as dist

    transport, device = transport_of(rank.device), torch.device(rank.device)
    if transport == NCCL:
        if environ.get("TORCH_DISTRIBUTED_DEBUG", "").upper() == "DETAIL":
            raise ConfigError(
                "TORCH_DISTRIBUTED_DEBUG=DETAIL: torch would connect every rank with every other one over gloo for "
                "each group; INFO, or unset it"
            )
        # torch looks into the store, too, from every rank once a second.
        environ.setdefault("TORCH_NCCL_COORD_CHECK_MILSEC", f"{1000 * interval_seconds(rank.world_size):.0f}")
        torch.cuda.set_device(device)
    dist.init_process_group(
        transport,
        store=store,
        rank=rank.rank,
        world_size=rank.world_size,
        timeout=timedelta(seconds=timeout_seconds),
        device_id=device if transport == NCCL else None,
    )


def abort_communicators() -> None:
    """End NCCL's collectives that are under way: what waits for them gets an error, and no group is left."""
    import torch.distributed as dist

    if dist.is_initialized():
        dist.distributed_c10d._abort_process_group()
