"""Dry runs of several ranks, each in a process of its own: a process group, fake or not, is one per process."""

from __future__ import annotations

import multiprocessing
import os
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace

from megalm.config.schema import Config
from megalm.dryrun.report import RankReport


def reports(config: Config, ranks: Sequence[int], world_size: int, *, device: str) -> list[RankReport]:
    """What dry runs of some ranks found; see :func:`megalm.dryrun.run.dry_run`.

    Started anew rather than forked: torch's threads do not survive a fork.
    """
    context = multiprocessing.get_context("spawn")
    workers = min(len(ranks), os.cpu_count() or 1)
    with ProcessPoolExecutor(workers, mp_context=context, max_tasks_per_child=1) as pool:
        found = [pool.submit(_report, config, rank, world_size, device) for rank in ranks]
        return [future.result() for future in found]


def _report(config: Config, rank: int, world_size: int, device: str) -> RankReport:
    import torch

    torch.set_num_threads(1)
    from megalm.dryrun.run import dry_run

    found = dry_run(config, rank, world_size, device=device)
    recompute = _recomputation_to_try(config, found)
    if recompute is None:
        return found
    other_config = replace(config, engine=replace(config.engine, recompute=recompute))
    other = dry_run(other_config, rank, world_size, device=device)
    return replace(found, notes=(*found.notes, _comparison(recompute, found, other)))


def _recomputation_to_try(config: Config, found: RankReport) -> str | None:
    """None where what is recomputed might be kept; all where it does not fit otherwise; else there is no question."""
    if found.memory_limit_gib is None:
        return None
    if config.engine.recompute != "none":
        return "none"
    return None if found.fits else "full"


def _comparison(recompute: str, found: RankReport, other: RankReport) -> str:
    """Whether a device holds the step with another recomputation, and what it computes."""
    change = sum(other.flops.values()) / sum(found.flops.values()) - 1.0
    return (
        f"engine.recompute={recompute} {'fits' if other.fits else 'does not fit'}: peak {other.peak_gib:.2f} GiB of "
        f"{found.memory_limit_gib:g}, for {abs(change):.1%} {'more' if change > 0 else 'fewer'} FLOPs"
    )
