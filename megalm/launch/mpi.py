"""How ranks that mpirun started learn where rank 0 listens: over MPI, which is not needed any more afterwards."""

from __future__ import annotations

import socket
import time
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from megalm.errors import ConfigError
from megalm.launch.discovery import RankInfo, variables_of
from megalm.launch.store import LOOPBACK, START_TIMEOUT, free_port_listener, own_address
from megalm.launch.waiting import Patience

_MOST_BYTES = 1024
_POLL_SECONDS = 0.01


def meet_over_mpi(
    rank: RankInfo, patience: Patience, environ: Mapping[str, str]
) -> tuple[RankInfo, socket.socket | None]:
    """Let all ranks that mpirun started know where rank 0 listens; rank 0 also gets the listening socket.

    MPI is finalised again: it is not needed any more, and mpirun calls an exit without that an abort.

    Raises:
        ConfigError: MPI cannot be loaded, does not know of the ranks that the environment tells of, or rank 0 is
            silent.
        StoppedError: a signal came first.
    """
    try:
        from mpi4py import MPI
    except (ImportError, RuntimeError) as error:
        raise ConfigError(f"mpirun: MPI cannot be loaded ({error}); load the MPI module that mpirun is from") from None
    world = MPI.COMM_WORLD
    size = world.size
    if size != rank.world_size:
        MPI.Finalize()
        told, unset = variables_of(environ)
        off = " ".join(f"-u {name}" for name in unset)
        raise ConfigError(
            f"OMPI_COMM_WORLD_SIZE={rank.world_size}: MPI itself knows of {_ranks(size)}; where "
            f"{told} are left over in this shell, `env {off} megalm train …` starts own ranks; under mpirun, it must "
            "be of the MPI that mpi4py was built for"
        )
    listener, place = None, b""
    if rank.rank == 0:
        is_one_machine = rank.local_world_size == rank.world_size
        listener = free_port_listener(LOOPBACK if is_one_machine else "")
        address = LOOPBACK if is_one_machine else own_address()
        place = f"{address} {listener.getsockname()[1]}".encode()
    address, _, port = _broadcast(world, place, patience).partition(" ")
    MPI.Finalize()
    return replace(rank, master_addr=address, master_port=int(port)), listener


def _broadcast(world: Any, text: bytes, patience: Patience) -> str:
    """Rank 0's text on every rank; asked for now and then, so that a signal is heard and no core is kept busy."""
    buffer = bytearray(text.ljust(_MOST_BYTES, b"\0"))
    request = world.Ibcast(buffer, root=0)
    remind = patience.reminder(lambda: f"1 of {world.size} ranks of mpirun: rank 0")
    deadline = time.monotonic() + START_TIMEOUT.total_seconds()
    while not request.Test():
        patience.check()
        if time.monotonic() > deadline:  # mpirun itself may have been killed, and its ranks left
            raise ConfigError(f"mpirun: rank 0 has said nothing within {START_TIMEOUT}; start all ranks anew")
        remind()
        time.sleep(_POLL_SECONDS)
    return bytes(buffer).rstrip(b"\0").decode()


def _ranks(size: int) -> str:
    return f"{size} rank{'' if size == 1 else 's'}"
