"""A case on the device against plain PyTorch on the CPU: losses and gradient norms of six clipped steps."""

from __future__ import annotations

import math
from dataclasses import replace
from functools import cache

import torch
import torch.distributed as dist

from megalm.config.compose import compose
from megalm.config.schema import Config
from megalm.mesh.groups import ParallelContext
from megalm.mesh.topology import Topology
from megalm.verify.parity import Task, Trace, build_engine, train, train_plainly

from .cases import BASE, SIZES, Case


class MismatchError(Exception):
    """A case is further from the CPU than its bound allows."""


def config_of(case: Case, size: str) -> Config:
    """A case's config, at the size that a kind of device takes."""
    return compose([*BASE, *SIZES[size], *case.overrides])


def check(case: Case, device: str) -> str:
    """Train a case on ``device`` (``cpu`` or ``cuda``), and compare.

    Returns:
        How far it is from the CPU, in words.

    Raises:
        MismatchError: too far.
    """
    config = config_of(case, device)
    want, got = reference(config), on_device(config, device)
    loss = max(abs(a - b) for a, b in zip(got.losses, want.losses, strict=True))
    norm = max(abs(a / b - 1.0) for a, b in zip(got.grad_norms, want.grad_norms, strict=True))
    found = f"loss ±{loss:.1e}, gradient norm ±{norm:.1e}"
    # Written so that NaN is too far.
    if not (loss <= case.bound.loss and norm <= case.bound.grad_norm):
        raise MismatchError(f"{found}; at most {case.bound.loss:.1e} and {case.bound.grad_norm:.1e}")
    if not all(norm > config.optim.clip_grad_norm for norm in got.grad_norms):
        raise MismatchError(f"{found}; but clipping was not active in all steps")
    return found


def on_device(config: Config, device: str) -> Trace:
    """The steps of a config by the engine, as a rank alone."""
    torch.compiler.reset()
    context = ParallelContext.create(Topology(), "cuda:0" if device == "cuda" else "cpu")
    task = Task.of(config)
    trace = train(build_engine(config, context, task), config, task)
    assert len(trace.losses) == config.train.steps
    assert all(math.isfinite(loss) for loss in trace.losses)
    return trace


def reference(config: Config) -> Trace:
    """The same model, data and optimizer in fp32 on the CPU; cases that share it share one run."""
    engine = replace(config.engine, dtype="fp32", zero_stage=0, compile=False, recompute="none")
    model = replace(config.model, vocab_pad_multiple=1)
    plain = replace(config, engine=engine, model=model, parallel=replace(config.parallel, schedule="1f1b"))
    return _reference(plain)


@cache
def _reference(config: Config) -> Trace:
    return train_plainly(config)


def begin(device: str) -> None:
    """A world of this process alone, and what takes long to import: no part's time is taken for it."""
    import deepspeed  # noqa: F401
    import torch._dynamo

    if not dist.is_initialized():
        backend = "nccl" if device == "cuda" else "gloo"
        dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)
    if device == "cuda":
        torch.cuda.set_device(0)
