"""Training as a job of ranks. No torch until a rank trains."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

from megalm.errors import ExitCode
from megalm.launch import RankInfo
from megalm.launch.job import Assignment, Prepared
from megalm.launch.signals import StopRequest
from megalm.plan.plan import Plan

TRAIN = "megalm.training.job:JOB"
"""Where ranks find the job."""


class TrainJob:
    """Trains the run that the command line describes, in a folder that is the run's own meanwhile."""

    @contextmanager
    def prepare(
        self,
        arguments: Sequence[str],
        world_size: int | None,
        *,
        say: Callable[[str], object],
        cancelled: Callable[[], bool],
    ) -> Iterator[Prepared]:
        """Check config, data, tasks and start point, and own the run's folder; see ``megalm.launch.job.Job``."""
        # What checks a run and its tasks is imported by the one process that does so.
        from megalm.evaluate.tasks.of_config import prepared_of_config
        from megalm.plan.preflight import completion_lines, owned_plan

        planned = owned_plan(arguments, world_size, say=say, cancelled=cancelled, check=prepared_of_config)
        with planned as (plan, ownership):
            launch = plan.config.launch
            assignment = Assignment(
                job=TRAIN,
                plan=plan.to_json(),
                world_size=plan.world_size,
                threads_per_rank=launch.threads_per_rank,
                folder=plan.run_dir,
                device=launch.device,
                dtype=plan.config.engine.dtype,
                timeout_seconds=launch.timeout_seconds,
                overlaps=plan.config.parallel.overlaps,
                notes=plan.notes,
                nothing_to_do=tuple(completion_lines(plan)) if plan.complete else (),
                claim=plan.claim,
            )
            yield Prepared(assignment, (ownership.descriptor,))

    def run(self, plan: str, rank: RankInfo, stop: StopRequest) -> ExitCode:
        """Train on one rank."""
        from megalm.training.setup import run_training

        made = Plan.from_json(plan)
        return run_training(made.config, rank, stop, made.start, made.claim, made.indexes)


JOB = TrainJob()
