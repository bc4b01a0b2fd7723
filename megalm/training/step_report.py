"""What all ranks learn at the end of a step: two small reductions, and one look at what they gave.

Everything a step reports stays on the device until :meth:`StepReport.read`, which a loop may call after it has started
the next step.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from megalm.core.host import Reading, numbers_to_device, start_reading
from megalm.engine.deepspeed_engine import StepResult
from megalm.mesh.groups import ParallelContext


@dataclass(frozen=True, kw_only=True)
class OwnNumbers:
    """What one rank's host knows at the end of a step; of all ranks the largest counts.

    Attributes:
        step_seconds: since the last step.
        data_seconds: of them, spent waiting for data.
        memory_gib: peak memory of this rank so far.
        stop: how this rank was asked to stop, in ascending precedence; 0: it was not.
        save_failed: whether this rank could not write its part of the pending checkpoint.
        minutes_are_up: whether a checkpoint is due by this rank's clock.
    """

    step_seconds: float
    data_seconds: float
    memory_gib: float
    stop: int
    save_failed: bool
    minutes_are_up: bool


@dataclass(frozen=True)
class Agreed:
    """What all ranks read of a step, the same on each.

    Attributes:
        terms: of the objective, by name: means over the global batch.
        bubble_fraction: mean over the ranks.
        largest: of every rank's numbers the largest.
        grad_norm: of the step.
        units: what carried loss in the global batch.
    """

    terms: dict[str, float]
    bubble_fraction: float
    largest: OwnNumbers
    grad_norm: float
    units: int


class StepReport:
    """The report of one step, on its way. Making one is collective over all ranks.

    Args:
        result: of the step, on this rank.
        units: what carries loss in the global batch; a scalar of the device, the same on every rank.
        own: this rank's numbers.
        context: this rank's groups.
    """

    def __init__(self, result: StepResult, units: Tensor, own: OwnNumbers, context: ParallelContext) -> None:
        self._names = tuple(result.terms)
        world = context.world_group
        numbers = [result.pipeline.bubble_fraction / world.size, *map(float, vars(own).values())]
        share, maxima = numbers_to_device(numbers, context.device).split((1, len(numbers) - 1))
        sums = world.all_reduce(torch.cat((torch.stack([*result.terms.values()]), share)))
        maxima = world.all_reduce(maxima.clone(), dist.ReduceOp.MAX)
        self._reading: Reading = start_reading(torch.cat((sums, maxima, torch.stack((result.grad_norm, units)))))

    def read(self) -> Agreed:
        """The values; the host waits for this step, not for later ones."""
        values = self._reading.values()
        terms, (bubble_fraction, *maxima, grad_norm, units) = values[: len(self._names)], values[len(self._names) :]
        step_seconds, data_seconds, memory_gib, stop, save_failed, minutes_are_up = maxima
        return Agreed(
            terms=dict(zip(self._names, terms, strict=True)),
            bubble_fraction=bubble_fraction,
            largest=OwnNumbers(
                step_seconds=step_seconds,
                data_seconds=data_seconds,
                memory_gib=memory_gib,
                stop=int(stop),
                save_failed=bool(save_failed),
                minutes_are_up=bool(minutes_are_up),
            ),
            grad_norm=grad_norm,
            units=round(units),
        )
