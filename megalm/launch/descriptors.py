"""How many connections the process that hosts the store can hold: one or two for each rank. No torch.

A process may have as many descriptors as its soft limit says, often 1,024, and may raise that to its hard limit, which
is commonly far higher. A server that has no descriptor left resets connections of ranks that have met already.
"""

from __future__ import annotations

import contextlib
import os
import resource
from collections.abc import Callable

from megalm.errors import ConfigError

SPARE = 64
"""Descriptors of the host that are no rank's: its log, its libraries, its own connections."""


def raise_limit() -> int | None:
    """Raise this process's soft limit of descriptors to the hard one; what it is now, None: there is none."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != hard:
        with contextlib.suppress(OSError, ValueError):  # a system may allow less than it says
            resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    return _finite(resource.getrlimit(resource.RLIMIT_NOFILE)[0])


def limit_of_parent() -> int | None:
    """The soft limit of the process that has started this one; None: there is none, or nobody can say."""
    prlimit: Callable[[int, int], tuple[int, int]] | None = getattr(resource, "prlimit", None)
    if prlimit is None:
        return None
    try:
        return _finite(prlimit(os.getppid(), resource.RLIMIT_NOFILE)[0])
    except OSError:
        return None


def check_room(ranks: int, limit: int | None, host: str) -> None:
    """Refuse more ranks than the store's host can hold, before the first of them is lost.

    Args:
        ranks: how many will connect.
        limit: descriptors that the host may have; None: any number.
        host: which process that is, in words.

    Raises:
        ConfigError: naming the limit, and what to do.
    """
    if limit is not None and ranks > limit - SPARE:
        raise ConfigError(
            f"world_size={ranks}: {host} may open {limit} files (`ulimit -n`), enough for {max(0, limit - SPARE)} "
            f"ranks; raise its hard limit to at least {ranks + SPARE} (`ulimit -Hn`, limits.conf, LimitNOFILE)"
        )


def connections_per_rank(ranks: int, limit: int | None) -> int:
    """2 where there is room for it: one on which a rank waits for others, and one to look for failures meanwhile."""
    return 2 if limit is None or 2 * ranks <= limit - SPARE else 1


def _finite(limit: int) -> int | None:
    return None if limit == resource.RLIM_INFINITY else limit
