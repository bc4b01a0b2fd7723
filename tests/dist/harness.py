"""Runs a function on gloo ranks, for tests."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from megalm.launch.function_ranks import call_on_ranks


def run_ranks(world_size: int, function: Callable[..., Any], *args: Any, timeout_seconds: float = 180.0) -> list[Any]:
    """Call ``function(*args)`` on ``world_size`` ranks of an initialised gloo world; returns the results by rank.

    ``function`` must be importable (defined at the top of a module). A failure raises, with the first failing rank's
    line and the tracebacks of all that failed; after ``timeout_seconds``, with the stacks of all ranks.
    """
    return call_on_ranks(world_size, function, *args, timeout_seconds=timeout_seconds)
