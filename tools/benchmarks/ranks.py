"""Runs a function on spawned gloo ranks of this machine, one thread each."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp


def on_ranks(world_size: int, function: Callable[..., Any], *args: Any) -> list[Any]:
    """Call ``function(*args)`` on every rank of a gloo world; returns the results by rank.

    Args:
        world_size: how many processes.
        function: importable by name, since ranks are spawned.
        args: what it is called with.
    """
    with tempfile.TemporaryDirectory() as folder:
        results = mp.get_context("spawn").Manager().dict()
        mp.spawn(_rank, args=(world_size, folder, function, args, results), nprocs=world_size)
        return [results[rank] for rank in range(world_size)]


def _rank(
    rank: int,
    world_size: int,
    folder: str,
    function: Callable[..., Any],
    args: tuple[Any, ...],
    results: dict[int, Any],
) -> None:
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    torch.set_num_threads(1)
    store = dist.FileStore(str(Path(folder) / "store"), world_size)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=world_size, timeout=timedelta(seconds=120))
    results[rank] = function(*args)
    dist.barrier()
    dist.destroy_process_group()
