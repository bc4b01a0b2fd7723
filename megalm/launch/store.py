"""Opens the store in which ranks meet: rank 0 listens, the others find it. torch is imported here, in functions.

Names, ports and the wait for rank 0 are looked after in Python, where a signal ends them and an error is one line; the
C++ store then connects to what listens already.
"""

from __future__ import annotations

import contextlib
import errno
import os
import socket
import stat
import sys
import time
from collections.abc import Mapping
from dataclasses import replace
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING

from megalm.errors import ConfigError
from megalm.launch.descriptors import check_room, connections_per_rank, limit_of_parent, raise_limit
from megalm.launch.discovery import LOCAL, TORCHRUN, RankInfo, variables_of
from megalm.launch.waiting import Patience

if TYPE_CHECKING:
    from torch.distributed import Store

LOOPBACK = "127.0.0.1"

START_TIMEOUT = timedelta(minutes=15)
"""Rank 0 may wait for a slow file system, and others for rank 0, but not for ever."""

_BACKLOG = 4096
"""Connections that may wait to be accepted: many ranks come at once, while rank 0 still imports torch."""

_NAME_SECONDS = 10.0
"""How long a host's name may be unknown: an orchestrator may announce it a moment after it starts its ranks."""

_LONGEST_PAUSE_SECONDS = 1.0

_DEAD_SECONDS = 120.0
"""How long a machine may answer nothing. A switch that restarts takes less; TCP alone would wait a quarter of an hour.
"""


def free_port_listener(address: str = LOOPBACK) -> socket.socket:
    """A socket that listens on a port nobody else can take between now and the store's start."""
    listener = socket.socket(socket.AF_INET, socket.SOCK_STREAM)
    listener.bind((address, 0))
    listener.listen(_BACKLOG)
    return listener


def open_store(
    rank: RankInfo, listener: socket.socket | None, patience: Patience, environ: Mapping[str, str] = os.environ
) -> Store:
    """The store of a run, hosted by rank 0 (or by torchrun's agent); every rank calls this.

    Raises:
        ConfigError: rank 0's port is taken, its host has no such name, or it cannot be reached.
        StoppedError: a signal came first.
    """
    is_master = rank.rank == 0 and (listener is not None or not _agent_hosts(rank, environ))
    if is_master:
        if listener is None:
            _resolve(rank, patience, environ)
            listener = _listen(rank, environ)
        # Its own address is known whatever MASTER_ADDR names, such as a service in front of it.
        rank = replace(rank, master_addr=LOOPBACK, master_port=listener.getsockname()[1])
    elif rank.launcher != LOCAL:
        _await_listener(rank, patience, environ)
    patience.call(_import_torch)  # takes seconds, in which a signal is heard
    store = _connect(rank, listener, patience, is_master=is_master)
    _notice_a_dead_host(rank.master_port)
    from torch.distributed import PrefixStore

    return PrefixStore(f"megalm-{environ.get('TORCHELASTIC_RESTART_COUNT', '0')}", store)


def room(rank: RankInfo, listener: socket.socket | None, environ: Mapping[str, str] = os.environ) -> int:
    """How many connections each rank may have to the store; raises the limit of its host, which rank 0 asks about.

    Raises:
        ConfigError: the host cannot hold as many ranks.
    """
    if listener is None and _agent_hosts(rank, environ):
        limit, host = limit_of_parent(), "torchrun, which hosts the store,"
    else:
        limit, host = raise_limit(), "rank 0, which hosts the store,"
    check_room(rank.world_size, limit, host)
    return connections_per_rank(rank.world_size, limit)


def _agent_hosts(rank: RankInfo, environ: Mapping[str, str]) -> bool:
    """Whether torchrun's agent hosts the store, and not rank 0."""
    return rank.launcher == TORCHRUN and environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"


def _import_torch() -> None:
    import torch.distributed  # noqa: F401


def _connect(rank: RankInfo, listener: socket.socket | None, patience: Patience, *, is_master: bool) -> Store:
    """A client of the store, and the store itself on its host."""
    from torch.distributed import DistError, TCPStore

    # The store takes ownership of the descriptor, hence detach.
    given = {} if listener is None else {"master_listen_fd": listener.detach()}
    try:
        return patience.call(
            lambda: TCPStore(
                rank.master_addr,
                rank.master_port,
                is_master=is_master,
                timeout=START_TIMEOUT,
                wait_for_workers=False,
                multi_tenant=False,
                use_libuv=True,
                **given,
            ),
            None if rank.launcher == LOCAL else lambda: f"{patience.missing(1)}: rank 0 does not answer",
        )
    except (DistError, RuntimeError) as error:
        reason = str(error).splitlines()[0]
        raise ConfigError(
            f"MASTER_ADDR={rank.master_addr}, MASTER_PORT={rank.master_port}: rank {rank.rank} found no meeting place "
            f"there ({reason}); set both to the host of rank 0 and a free port"
        ) from None


def another_connection(store: Store) -> Store:
    """The same store, for another thread: of one connection, a call waits while another thread's waits."""
    from torch.distributed import PrefixStore

    clone = getattr(store, "clone", None)
    if clone is None:  # torch before it had one
        return store
    copy: Store = clone()
    if isinstance(copy, PrefixStore) and hasattr(copy.underlying_store, "port"):
        _notice_a_dead_host(copy.underlying_store.port)
    return copy


def _notice_a_dead_host(port: int) -> None:
    """Have the kernel end connections to the store whose host answers no more (Linux): its machine may have died.

    A busy host still answers, since its kernel does.
    """
    if sys.platform != "linux":
        return
    seconds = int(_DEAD_SECONDS)
    options = (
        (socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1),
        (socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, seconds // 2),
        (socket.IPPROTO_TCP, socket.TCP_KEEPINTVL, seconds // 8),
        (socket.IPPROTO_TCP, socket.TCP_KEEPCNT, 4),
        (socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, 1000 * seconds),
    )
    for path in Path("/proc/self/fd").iterdir():
        descriptor = int(path.name)
        with contextlib.suppress(OSError):
            if not stat.S_ISSOCK(os.fstat(descriptor).st_mode):
                continue
            with socket.socket(fileno=os.dup(descriptor)) as connection:  # options are the socket's, not the number's
                if connection.family in (socket.AF_INET, socket.AF_INET6) and connection.getpeername()[1] == port:
                    for option in options:
                        connection.setsockopt(*option)


def _listen(rank: RankInfo, environ: Mapping[str, str]) -> socket.socket:
    """Listen on the port that all ranks were told of, at every address of this machine."""
    both = socket.has_dualstack_ipv6()
    address = ("", rank.master_port)
    try:
        if not both:
            return socket.create_server(address, backlog=_BACKLOG)
        try:
            return socket.create_server(address, family=socket.AF_INET6, backlog=_BACKLOG, dualstack_ipv6=True)
        except OSError as error:  # a machine whose IPv6 is switched off
            if error.errno not in (errno.EAFNOSUPPORT, errno.EADDRNOTAVAIL):
                raise
            return socket.create_server(address, backlog=_BACKLOG)
    except OSError as error:
        raise ConfigError(
            f"MASTER_PORT={rank.master_port}: rank 0 cannot listen there ({_in_words(error)}); a free port, the same "
            f"for all ranks{_or_alone(environ)}"
        ) from None


def _await_listener(rank: RankInfo, patience: Patience, environ: Mapping[str, str]) -> None:
    """Return once something listens where rank 0 (or torchrun's agent) is to be."""
    deadline, pause, reason = time.monotonic() + START_TIMEOUT.total_seconds(), 0.05, ""
    remind = patience.reminder(lambda: f"{patience.missing(1)}: rank 0 ({reason})")
    _resolve(rank, patience, environ)
    while True:
        try:
            socket.create_connection((rank.master_addr, rank.master_port), timeout=_LONGEST_PAUSE_SECONDS).close()
        except OSError as error:
            reason = _in_words(error)
        else:
            return
        patience.check()
        if time.monotonic() > deadline:
            raise ConfigError(
                f"MASTER_ADDR={rank.master_addr}, MASTER_PORT={rank.master_port}: rank {rank.rank} found nobody there "
                f"within {START_TIMEOUT} ({reason}); set both to the host of rank 0 and a free port"
            )
        remind()
        time.sleep(pause)
        pause = min(2 * pause, _LONGEST_PAUSE_SECONDS)


def _resolve(rank: RankInfo, patience: Patience, environ: Mapping[str, str]) -> None:
    """Refuse a host whose name stays unknown.

    Raises:
        ConfigError: it does not resolve.
        StoppedError: a signal came first.
    """
    deadline = time.monotonic() + _NAME_SECONDS
    while True:
        try:
            patience.call(lambda: socket.getaddrinfo(rank.master_addr, rank.master_port, type=socket.SOCK_STREAM))
        except (OSError, UnicodeError) as error:
            patience.check()
            if time.monotonic() > deadline:
                raise ConfigError(
                    f"MASTER_ADDR={rank.master_addr}: no such host ({_in_words(error)}); the name or address of the "
                    f"machine that runs rank 0{_or_alone(environ)}"
                ) from None
            time.sleep(_LONGEST_PAUSE_SECONDS / 2)
        else:
            return


def _or_alone(environ: Mapping[str, str]) -> str:
    """How to start without the launcher whose variables are there."""
    told, unset = variables_of(environ)
    if not unset:
        return ""
    return (
        f"; where {told} are left over in this shell, `env {' '.join(f'-u {name}' for name in unset)} megalm train …`"
    )


def _in_words(error: Exception) -> str:
    text = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
    return text[:1].lower() + text[1:]


def own_address() -> str:
    """The address under which other machines reach this one: that of the interface with the default route."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe, contextlib.suppress(OSError):
        probe.connect(("10.255.255.255", 1))  # sends nothing
        return str(probe.getsockname()[0])
    return socket.gethostname()
