"""A job that is not training: ranks add up their numbers, whoever starts them.

    python -m second_job RANKS FOLDER OUTCOME [RANK]

``OUTCOME``: ``done``; ``refused``, while it is prepared; ``complete``, nothing to do; or ``bad-data``, ``diverged`` or
``bug`` on one rank alone (``RANK``, 1 by default); ``stuck``: ``diverged``, while rank 0 waits for
rank 2, which sleeps.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from megalm.errors import ConfigError, DataError, DivergedError, ExitCode
from megalm.launch import RankInfo
from megalm.launch.guard import guarded
from megalm.launch.job import Assignment, Prepared
from megalm.launch.run import run_job
from megalm.launch.signals import StopRequest

STUCK_SECONDS = 300.0

ERRORS = {
    "bad-data": DataError("numbers: a rank has none; give it one"),
    "diverged": DivergedError("the sum is not finite"),
    "stuck": DivergedError("the sum is not finite"),
    "bug": ZeroDivisionError("divides by zero"),
}


class SumJob:
    """Adds up the numbers of all ranks and writes the sum to a file of each rank."""

    @contextmanager
    def prepare(
        self,
        arguments: Sequence[str],
        world_size: int | None,
        *,
        say: Callable[[str], object],
        cancelled: Callable[[], bool],
    ) -> Iterator[Prepared]:
        ranks, folder, outcome, *failing = arguments
        if outcome == "refused":
            raise ConfigError(["numbers=none: nothing to add up; give one per rank"])
        plan = f"{folder} {outcome} {failing[0] if failing else 1}"
        nothing = ("everything is added up already",) if outcome == "complete" else ()
        yield Prepared(
            Assignment(
                job="second_job:JOB",
                plan=plan,
                world_size=world_size or int(ranks),
                threads_per_rank=1,
                folder=Path(folder),
                device="cpu",
                timeout_seconds=60,
                notes=("a second job",),
                nothing_to_do=nothing,
            )
        )

    def run(self, plan: str, rank: RankInfo, stop: StopRequest) -> ExitCode:
        import torch
        import torch.distributed as dist

        folder, outcome, failing = plan.split()
        stop.before_sudden_end((Path(folder) / f"wish-{rank.rank}").touch)
        if outcome == "stuck":
            pair = dist.new_group([0, 2])
            dist.barrier()
            if rank.rank == 2:
                time.sleep(STUCK_SECONDS)
            if rank.rank == 0:
                dist.all_reduce(torch.zeros(1), group=pair)  # over a connection that nobody closes
        if rank.rank == int(failing) and outcome in ERRORS:
            raise ERRORS[outcome]
        total = torch.tensor(rank.rank + 1)
        dist.all_reduce(total)
        (Path(folder) / f"sum-{rank.rank}").write_text(str(int(total)))
        print(f"the sum is {int(total)}", flush=True)
        return ExitCode.INTERRUPTED if outcome == "interrupted" else ExitCode.DONE


JOB = SumJob()

if __name__ == "__main__":
    sys.exit(guarded(lambda: run_job("second_job:JOB", sys.argv[1:])))
