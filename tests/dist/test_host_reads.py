"""How often the host looks at a value of the device in a step: a few times, however many micro-batches there are.

On a GPU each look waits for all that the device was asked to do, and meanwhile nothing more is asked of it.
"""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from harness import run_ranks_on_each
from parity import Layout
from torch import Tensor

import megalm
from megalm.config.schema import Config
from megalm.core.host import host_values
from megalm.data.stream.batch import Batch
from megalm.engine.deepspeed_engine import DeepSpeedEngine
from megalm.engine.micro_batches import training_micro_batches
from megalm.mesh.groups import ParallelContext
from megalm.training.step_report import Agreed, OwnNumbers, StepReport
from megalm.verify.parity import Task, batch_of_replica, build_engine, synthetic_batch

LOOKS = ("item", "tolist", "__float__", "__int__", "__bool__", "__index__", "numpy", "cpu", "nonzero")
MICRO_BATCHES = (1, 2, 8)
MOST = 6

LAYOUTS = [
    Layout(tp=2, sp=True, pp=2),
    Layout(pp=4, schedule="zb_h1", dtype="bf16"),
    Layout(pp=2, v=2, schedule="interleaved_1f1b", dp=2, zero_stage=2),
    Layout(cp=2, dp=2, cp_attention="ring"),
    Layout(dp=4, dtype="fp16"),
    Layout(dp=2, tp=2, zero_stage=0, reset_at_documents=True),
    Layout(dp=4, zero_stage=3),
]
STEPS = (2, 2, 2, 4)
"""By ZeRO stage; the last is looked at. DeepSpeed's ZeRO-3 records an order of modules in its first ones."""

Looks = Counter[str]


@contextmanager
def counted() -> Iterator[Looks]:
    """Each look by its method, and the line of megalm, or of who else, that it came from."""
    found: Looks = Counter()
    ours = str(Path(megalm.__file__).parent)
    kept = {name: getattr(Tensor, name) for name in LOOKS}

    def wrapped(name: str) -> Callable[..., Any]:
        def look(self: Tensor, *args: Any, **kwargs: Any) -> Any:
            frame = sys._getframe(1)
            while frame.f_back is not None and not frame.f_code.co_filename.startswith((ours, "deepspeed")):
                frame = frame.f_back
            found[f"{name} {Path(frame.f_code.co_filename).name}:{frame.f_code.co_name}"] += 1
            return kept[name](self, *args, **kwargs)

        return look

    for name in LOOKS:
        setattr(Tensor, name, wrapped(name))
    try:
        yield found
    finally:
        for name, method in kept.items():
            setattr(Tensor, name, method)


def looks_of(layout: Layout) -> list[Looks]:
    """By number of micro-batches: the looks of a rank's last step, reported as the trainer does.

    An interleaved schedule needs micro-batches in multiples of its pipeline's length.
    """
    multiple = layout.pp if layout.v > 1 else 1
    return [_looks(layout, count) for count in MICRO_BATCHES if count % multiple == 0]


def _looks(layout: Layout, count: int) -> Looks:
    config = layout.config()
    batch_size = config.train.micro_batch_size * count * layout.topology.dp
    config = replace(config, train=replace(config.train, global_batch_size=batch_size))
    context = ParallelContext.create(layout.topology)
    task = Task.of(config)
    engine = build_engine(config, context, task)
    for step in range(STEPS[layout.zero_stage]):
        batch = batch_of_replica(config, step, context, task)
        with counted() as found:
            agreed = _step(engine, batch, config)
        assert agreed.largest.minutes_are_up, "rank 0 said so"
        assert agreed.units == synthetic_batch(config, step, task.make_batch).loss_mask.sum()
    return found


def _step(engine: DeepSpeedEngine, batch: Batch, config: Config) -> Agreed:
    """A step as the trainer takes and reports it."""
    context, cp = engine.context, engine.model.context_parallel
    micro_batches, units = training_micro_batches(batch, config.train.micro_batch_size, context, cp)
    result = engine.train_step(micro_batches, 1e-4)
    own = OwnNumbers(
        step_seconds=1.0, data_seconds=0.5, memory_gib=2.0, stop=0, save_failed=False, minutes_are_up=context.rank == 0
    )
    return StepReport(result, units, own, context).read()


@cache
def looks() -> list[list[list[Looks]]]:
    """By layout, then by rank."""
    return run_ranks_on_each(4, looks_of, LAYOUTS, timeout_seconds=280)


@pytest.mark.parametrize("index", range(len(LAYOUTS)), ids=map(str, LAYOUTS))
def test_looks_are_few_and_as_many_for_any_number_of_micro_batches(index: int) -> None:
    for first, *others in looks()[index]:
        assert all(other == first for other in others)
        assert 1 <= first.total() <= MOST, first
        in_step = {where for where in first if not where.startswith("numpy ")}  # of the host's own memory
        of_deepspeed = {"__bool__ zero3.py:step"} if LAYOUTS[index].zero_stage == 3 else set()
        assert in_step == {"tolist host.py:host_values"} | of_deepspeed, "one function, for which a dry run answers"


def test_values_are_those_of_the_tensor() -> None:
    assert host_values(torch.tensor([[1.5, float("inf")]])) == [1.5, float("inf")]
