"""A job: what ranks do once they have found each other. Training is one, proofs and evaluations are others. No torch.

One process prepares it: the one that starts ranks itself, or rank 0 of those that a launcher started. It checks what
can be wrong before torch is imported, and acquires what the job must hold while it runs, such as the lock of a run's
folder. The result is an :class:`Assignment`, which is sent to every rank. How ranks find each other, wait, log, receive
signals, report errors and end is the same for all jobs: see ``worker.py``.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass
from importlib import import_module
from pathlib import Path
from typing import Any, Protocol, cast

from megalm.errors import ExitCode
from megalm.launch.discovery import RankInfo
from megalm.launch.signals import StopRequest
from megalm.ownership import Claim


@dataclass(frozen=True)
class Assignment:
    """What every rank of a job is told before it imports torch.

    Attributes:
        job: where the job is defined, as ``module:name``; see :func:`load_job`.
        plan: the job's own plan, in a text that it can read back.
        world_size: number of ranks.
        threads_per_rank: OMP threads of each rank that megalm starts itself.
        folder: ranks write their logs to ``logs/`` in it.
        device: ``auto``, ``cpu`` or ``cuda``.
        dtype: number format in which the job computes most; a slow one on the chosen device is said.
        timeout_seconds: longest that a collective may take.
        overlaps: whether GPUs are to communicate while they compute, for which CUDA and NCCL have settings.
        notes: lines for the user, shown before the job begins.
        nothing_to_do: why there is nothing to start, as lines for the user; empty: there is.
        claim: proof that the job owns its folder; None: it needs none.
    """

    job: str
    plan: str
    world_size: int
    threads_per_rank: int
    folder: Path
    device: str = "auto"
    dtype: str = "fp32"
    timeout_seconds: int = 600
    overlaps: bool = False
    notes: tuple[str, ...] = ()
    nothing_to_do: tuple[str, ...] = ()
    claim: Claim | None = None

    def to_json(self) -> str:
        """Text that :meth:`from_json` reads on another rank."""
        return json.dumps(asdict(self), default=str)  # paths

    @classmethod
    def from_json(cls, text: str) -> Assignment:
        """The assignment that another process has sent."""
        fields: dict[str, Any] = json.loads(text)
        claim = fields.pop("claim")
        return cls(
            **{**fields, "folder": Path(fields["folder"])}
            | {name: tuple(fields[name]) for name in ("notes", "nothing_to_do")},
            claim=None if claim is None else Claim(**{**claim, "lock": Path(claim["lock"])}),
        )


@dataclass(frozen=True)
class Prepared:
    """An assignment, and the open files that keep hold of what it needs.

    Attributes:
        assignment: for every rank.
        descriptors: files that ranks inherit and keep open, such as the lock of a run's folder: it is free when all of
            them have ended.
    """

    assignment: Assignment
    descriptors: tuple[int, ...] = ()


class Job(Protocol):
    """What ranks do. The module that defines one must not import torch: it is loaded before the job is checked."""

    def prepare(
        self,
        arguments: Sequence[str],
        world_size: int | None,
        *,
        say: Callable[[str], object],
        cancelled: Callable[[], bool],
    ) -> AbstractContextManager[Prepared]:
        """Check the job, and hold what it needs while the block runs; in one process, before torch is imported.

        Args:
            arguments: of the command line.
            world_size: ranks that a launcher has started; None: as many as the job asks for.
            say: shows a line to the user.
            cancelled: polled while waiting; True ends the wait.

        Raises:
            MegalmError: the job cannot run, and why.
        """

    def run(self, plan: str, rank: RankInfo, stop: StopRequest) -> ExitCode:
        """Do the job on one rank, in an initialised process group of all ranks.

        Args:
            plan: ``Assignment.plan``.
            rank: this rank, its device chosen.
            stop: whether the job has been asked to stop.
        """


def load_job(path: str) -> Job:
    """The job at ``module:name``; layers above this one define jobs, which it therefore does not import itself."""
    module, _, name = path.partition(":")
    return cast(Job, getattr(import_module(module), name))
