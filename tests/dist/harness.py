"""Runs a function on gloo ranks, for tests."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

from fork_server import ForkedProcess, server

from megalm.launch.function_ranks import call_on_ranks


def run_ranks(world_size: int, function: Callable[..., Any], *args: Any, timeout_seconds: float = 180.0) -> list[Any]:
    """Call ``function(*args)`` on ``world_size`` ranks of an initialised gloo world; returns the results by rank.

    The ranks are forks of the session's server. ``function`` must be importable (defined at the top of a module). A
    failure raises, with the first failing rank's line and the tracebacks of all that failed; after ``timeout_seconds``,
    with the stacks of all ranks.
    """
    return call_on_ranks(world_size, function, *args, timeout_seconds=timeout_seconds, start=_fork)


def _fork(target: Callable[..., None], arguments: tuple[Any, ...]) -> ForkedProcess:
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return server().fork(target, *arguments, environment=environment, new_session=False)
