"""Runs a function on gloo ranks, for tests."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from typing import Any

from fork_server import ForkedProcess, server

from megalm.launch.function_ranks import RankFailure, call_on_ranks, run_on_ranks


def run_ranks(world_size: int, function: Callable[..., Any], *args: Any, timeout_seconds: float = 180.0) -> list[Any]:
    """Call ``function(*args)`` on ``world_size`` ranks of an initialised gloo world; returns the results by rank.

    The ranks are forks of the session's server. ``function`` must be importable (defined at the top of a module). A
    failure raises, with the first failing rank's line and the tracebacks of all that failed; after ``timeout_seconds``,
    with the stacks of all ranks.
    """
    return call_on_ranks(world_size, function, *args, timeout_seconds=timeout_seconds, start=_fork)


def run_ranks_on_each(
    world_size: int, function: Callable[[Any], Any], items: Sequence[Any], *, timeout_seconds: float = 180.0
) -> list[list[Any]]:
    """Call ``function(item)`` for each item in turn, on the same ranks in a world of its own; by item, then rank."""
    results = run_on_ranks(world_size, function, items, timeout_seconds=timeout_seconds, start=_fork)
    for item, result in zip(items, results, strict=True):
        if isinstance(result, RankFailure):
            raise RuntimeError(f"{item}: {result.summary}\n{result.report}")
    return results  # type: ignore[return-value]


def _fork(target: Callable[..., None], arguments: tuple[Any, ...]) -> ForkedProcess:
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return server().fork(target, *arguments, environment=environment, new_session=False)
