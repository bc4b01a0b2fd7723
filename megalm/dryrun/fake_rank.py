"""One rank of a job of any size in one process: torch's fake process group and fake tensors, with megalm's engine."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from megalm.config.job import topology_of
from megalm.config.schema import Config
from megalm.engine.deepspeed_engine import without_comparisons
from megalm.mesh.groups import ParallelContext


@dataclass(frozen=True)
class FakeRank:
    """A rank without a device.

    Attributes:
        context: its place and groups.
        mode: what makes tensors fake.
    """

    context: ParallelContext
    mode: FakeTensorMode


@contextmanager
def fake_rank(config: Config, rank: int, world_size: int, *, device: str) -> Iterator[FakeRank]:
    """This process as one rank of a job, as long as the block runs.

    Args:
        config: of the job.
        rank: which rank.
        world_size: ranks of the job.
        device: ``cuda`` or ``cpu``: what the tensors stand for, and with it NCCL or gloo.
    """
    from torch.testing._internal.distributed.fake_pg import FakeStore

    assert not dist.is_initialized(), "a dry run needs a process of its own"
    dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=world_size)
    # What is made from host data (positions, keys of dropout) is converted as it is met.
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    mode.stands_for = device  # type: ignore[attr-defined]
    try:
        with ExitStack() as stack:
            stack.enter_context(_environment_restored())
            os.environ.setdefault("DS_ACCELERATOR", "cpu")  # whatever the tensors stand for
            stack.enter_context(_data_swapped_in_apply())
            if config.engine.zero_stage == 3:
                stack.enter_context(without_comparisons())
            stack.enter_context(mode)
            transport = "nccl" if device == "cuda" else "gloo"
            context = ParallelContext.create(topology_of(config, world_size), "cpu", transport=transport)
            yield FakeRank(context, mode)
    finally:
        dist.destroy_process_group()


@contextmanager
def _environment_restored() -> Iterator[None]:
    """Take back what is set for DeepSpeed, such as LOCAL_RANK: other libraries take it for a job's."""
    before = dict(os.environ)
    try:
        yield
    finally:
        for name in os.environ.keys() - before.keys():
            del os.environ[name]
        os.environ.update(before)


@contextmanager
def _data_swapped_in_apply() -> Iterator[None]:
    """Have ``Module.to`` assign ``parameter.data``: DeepSpeed keeps references to parameters.

    For fake tensors torch would make new parameters, as for all subclasses (``Module._apply``), whereas for plain
    tensors, which these stand for, it assigns.
    """

    def apply(self: nn.Module, function: Any, recurse: bool = True) -> nn.Module:
        for child in self.children() if recurse else ():
            child._apply(function)
        with torch.no_grad():
            for parameter in self.parameters(recurse=False):
                parameter.data = function(parameter)
        for name, buffer in self._buffers.items():
            if buffer is not None:
                self._buffers[name] = function(buffer)
        return self

    before = nn.Module._apply
    nn.Module._apply = apply  # type: ignore[method-assign, assignment]
    try:
        yield
    finally:
        nn.Module._apply = before  # type: ignore[method-assign]
