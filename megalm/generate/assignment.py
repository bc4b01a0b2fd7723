"""What ranks that hold a model are told before they import torch. No torch."""

from __future__ import annotations

from pathlib import Path

from megalm.launch.job import Assignment
from megalm.runs.find import FoundModel

_COLLECTIVE_SECONDS = 24 * 3600
"""Replicas whose prompts end early wait in no collective; within a model's ranks a pass never takes a day."""


def assignment_of(found: FoundModel, *, job: str, plan: str, folder: Path) -> Assignment:
    """The assignment of ranks that hold a model.

    Args:
        found: the model and its layout.
        job: what they run, as ``module:name``.
        plan: of the job.
        folder: where their logs go.
    """
    launch = found.config.launch
    return Assignment(
        job=job,
        plan=plan,
        world_size=found.world_size,
        threads_per_rank=launch.threads_per_rank,
        folder=folder,
        device=launch.device,
        dtype=found.config.engine.dtype,
        timeout_seconds=_COLLECTIVE_SECONDS,
    )
