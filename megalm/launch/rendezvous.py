"""How ranks find each other, before any process group exists: one TCP store, which rank 0 hosts.

The store carries the config from rank 0 to the others, lets them agree on devices and on who reports an error, and is
what the process group is made from. torch is imported here, in functions.
"""

from __future__ import annotations

import os
import socket
import time
from collections.abc import Mapping
from dataclasses import dataclass, replace
from datetime import timedelta
from typing import TYPE_CHECKING

from megalm.errors import ConfigError
from megalm.launch.discovery import MPIRUN, TORCHRUN, RankInfo

if TYPE_CHECKING:
    from torch.distributed import Store

LOOPBACK = "127.0.0.1"

_START_TIMEOUT = timedelta(minutes=15)
"""Rank 0 may wait for a slow file system, and others for rank 0, but not for ever."""


def free_port_listener(address: str = LOOPBACK) -> socket.socket:
    """A socket that listens on a port nobody else can take between now and the store's start."""
    listener = socket.socket(socket.AF_INET, socket.SOCK_STREAM)
    listener.bind((address, 0))
    listener.listen(1024)
    return listener


def meet_over_mpi(rank: RankInfo) -> tuple[RankInfo, socket.socket | None]:
    """Let all ranks that mpirun started know where rank 0 listens; rank 0 also gets the listening socket.

    MPI is finalised again: it is not needed any more, and mpirun calls an exit without that an abort.
    """
    from mpi4py import MPI

    listener = None
    place: tuple[str, int] | None = None
    if rank.rank == 0:
        is_one_machine = rank.local_world_size == rank.world_size
        listener = free_port_listener(LOOPBACK if is_one_machine else "")
        place = (LOOPBACK if is_one_machine else _own_address(), listener.getsockname()[1])
    address, port = MPI.COMM_WORLD.bcast(place, root=0)
    MPI.Finalize()
    return replace(rank, master_addr=address, master_port=port), listener


def _own_address() -> str:
    """The address under which other machines reach this one: that of the interface with the default route."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            probe.connect(("10.255.255.255", 1))  # sends nothing
            return str(probe.getsockname()[0])
        except OSError:
            return socket.gethostname()


def open_store(rank: RankInfo, listener: socket.socket | None, environ: Mapping[str, str] = os.environ) -> Store:
    """The store of a run, hosted by rank 0 (or by torchrun's agent); every rank calls this.

    Raises:
        ConfigError: rank 0's port is taken, or rank 0 cannot be reached.
    """
    if rank.launcher == MPIRUN and not rank.master_addr:
        raise ValueError("ranks of mpirun meet over MPI first")
    from torch.distributed import DistError, PrefixStore, TCPStore

    agent_hosts = rank.launcher == TORCHRUN and environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
    # The store takes ownership of the descriptor, hence detach.
    given = {} if listener is None else {"master_listen_fd": listener.detach()}
    try:
        store = TCPStore(
            rank.master_addr,
            rank.master_port,
            is_master=rank.rank == 0 and not agent_hosts,
            timeout=_START_TIMEOUT,
            wait_for_workers=False,
            multi_tenant=False,
            use_libuv=True,
            **given,
        )
    except (DistError, RuntimeError) as error:
        reason = str(error).splitlines()[0]
        raise ConfigError(
            f"MASTER_ADDR={rank.master_addr}, MASTER_PORT={rank.master_port}: rank {rank.rank} found no meeting place "
            f"there ({reason}); set both to the host of rank 0 and a free port"
        ) from None
    return PrefixStore(f"megalm-{environ.get('TORCHELASTIC_RESTART_COUNT', '0')}", store)


@dataclass(frozen=True)
class Meeting:
    """What ranks tell each other through the store, outside any process group."""

    store: Store
    rank: RankInfo

    def publish(self, text: str) -> None:
        """Rank 0 tells the others what to do."""
        self.store.set("plan", text)

    def receive(self) -> str:
        """What rank 0 published; waits for it."""
        return self.store.get("plan").decode()

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

    def leave_together(self, timeout_seconds: float) -> None:
        """Wait until all ranks have ended; rank 0, who hosts the store, leaves last.

        mpirun and srun end the whole job when the first rank leaves with an exit code, and rank 0 may still be drawing.
        """
        from torch.distributed import DistError

        try:
            self._wait_for_count("ended", self.rank.world_size, timeout_seconds)
            self.store.add("left", 1)
            if self.rank.rank == 0:
                self._wait_for_value("left", self.rank.world_size, 5.0)
        except (DistError, RuntimeError):
            return  # the host has left: so has everybody else

    def _wait_for_count(self, key: str, count: int, timeout_seconds: float = _START_TIMEOUT.total_seconds()) -> None:
        """Count this rank, and wait until ``count`` ranks have been; the last one opens the gate."""
        if self.store.add(key, 1) == count:
            self.store.set(f"{key}-all", "1")
        self.store.wait([f"{key}-all"], timedelta(seconds=timeout_seconds))

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
