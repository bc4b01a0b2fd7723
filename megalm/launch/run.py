"""Runs a job, whoever has started this process. Ranks alone import torch."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence

from megalm.errors import ExitCode
from megalm.launch.discovery import discover
from megalm.launch.job import load_job
from megalm.launch.local import LocalJob, run_local


def run_job(job: str, arguments: Sequence[str]) -> int:
    """Run a job: as one of its ranks if torchrun, srun or mpirun has started this process, else on ranks of its own.

    Args:
        job: ``module:name``; see ``job.py``.
        arguments: of the command line.

    Returns:
        The exit code of the job. A rank that a launcher has started ends its process instead, with that code.

    Raises:
        MegalmError: the job cannot run; from the process that starts ranks itself.
    """
    rank = discover(os.environ)
    if rank is not None:
        from megalm.launch.worker import run_launched

        run_launched(rank, job, list(arguments))
    return run_on_own_ranks(job, arguments)


def run_on_own_ranks(job: str, arguments: Sequence[str]) -> int:
    """Run a job on ranks that this process starts on this machine; see :func:`run_job`."""

    def say(line: str) -> None:
        print(line, file=sys.stderr, flush=True)

    with load_job(job).prepare(arguments, None, say=say, cancelled=lambda: False) as prepared:
        assignment = prepared.assignment
        if assignment.nothing_to_do:
            print(*assignment.nothing_to_do, sep="\n")
            return ExitCode.DONE
        ranks = LocalJob(
            world_size=assignment.world_size,
            threads_per_rank=assignment.threads_per_rank,
            run_dir=assignment.folder,
            plan=assignment.to_json(),
            inherited=prepared.descriptors,
        )
        return run_local(ranks, say)
