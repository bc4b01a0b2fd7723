"""Rules about the number of ranks, started here, by a launcher or planned for a cluster."""

from __future__ import annotations

from collections.abc import Iterator

from megalm.config.job import Job, Rule, needs
from megalm.config.violation import Fix, Violation

_DEGREES = ("parallel.tp", "parallel.pp", "parallel.cp")


@needs(*_DEGREES, "launch.ranks", "cluster.gpus")
def layout_fills_ranks(job: Job) -> Iterator[Violation]:
    """Ranks form whole replicas: their number is a multiple of tp·pp·cp."""
    parallel = job.config.parallel
    model_ranks = parallel.tp * parallel.pp * parallel.cp
    if job.world_size % model_ranks == 0:
        return
    field = world_field(job)
    replicas = job.world_size // model_ranks
    counts = {max(1, replicas), replicas + 1, *(1 << power for power in range((replicas + 1).bit_length()))}
    yield Violation(
        field,
        job.world_size,
        f"not a multiple of tp*pp*cp = {parallel.tp}*{parallel.pp}*{parallel.cp} = {model_ranks}",
        f"a multiple of {model_ranks}",
        fixes=(Fix(field, tuple(sorted(count * model_ranks for count in counts))),),
    )


def world_field(job: Job) -> str:
    """The field that decided the number of ranks; ``world_size`` when a launcher (torchrun, srun, mpirun) did."""
    if job.config.launch.ranks == job.world_size:
        return "launch.ranks"
    return "cluster.gpus" if job.config.cluster.gpus == job.world_size else "world_size"


RULES: tuple[Rule, ...] = (layout_fills_ranks,)
