"""Records what a step does: memory, operations, messages and reads by the host, operation by operation."""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter

from megalm.dryrun.communication import TRANSFER_KINDS, GroupNames, Message, message_of
from megalm.dryrun.kernels import Cost, cost_of
from megalm.dryrun.ledger import TRANSFERS, Ledger

FORWARD, BACKWARD, OUTSIDE = "forward", "backward", "outside"
"""Directions of a scope; outside is what belongs to no layer."""

Scope = tuple[str, str]
"""(layer: a block's number, or ``""`` outside of blocks; direction)."""

_PACKAGES = tuple(f"{package}/" for package in ("megalm", "deepspeed"))
_OWN_FOLDER = str(Path(__file__).parent)


@dataclass
class Work:
    """Operations of a scope, by kind."""

    kernels: Counter[str] = field(default_factory=Counter)
    flops: Counter[str] = field(default_factory=Counter)
    nbytes: Counter[str] = field(default_factory=Counter)

    def add(self, cost: Cost) -> None:
        """Count an operation."""
        self.kernels[cost.kind] += 1
        self.flops[cost.kind] += cost.flops
        self.nbytes[cost.kind] += cost.nbytes

    def add_times(self, other: Work, times: int) -> None:
        """Count all of ``other`` so many times."""
        for mine, its in ((self.kernels, other.kernels), (self.flops, other.flops), (self.nbytes, other.nbytes)):
            for kind, count in its.items():
                mine[kind] += times * count


@dataclass
class Overlap:
    """What lies between the issue of collectives and the wait for them.

    Attributes:
        count: collectives that were waited for.
        hidden: those with a product or attention between issue and wait.
        flops: floating-point operations between, of all.
    """

    count: int = 0
    hidden: int = 0
    flops: int = 0


@dataclass
class Record:
    """What happened while this was the tracer's record."""

    work: dict[Scope, Work] = field(default_factory=dict)
    messages: list[Message] = field(default_factory=list)
    host_reads: Counter[str] = field(default_factory=Counter)
    overlaps: dict[tuple[str, str], Overlap] = field(default_factory=dict)

    def add_times(self, other: Record, times: int) -> None:
        """Add all but the messages of ``other`` so many times."""
        for scope, work in other.work.items():
            self.work.setdefault(scope, Work()).add_times(work, times)
        for site, count in other.host_reads.items():
            self.host_reads[site] += times * count
        for key, overlap in other.overlaps.items():
            mine = self.overlaps.setdefault(key, Overlap())
            mine.count += times * overlap.count
            mine.hidden += times * overlap.hidden
            mine.flops += times * overlap.flops


class Tracer(TorchDispatchMode):
    """Sees every operation that a rank executes, on tensors with values or without.

    Args:
        names: of the rank's groups.
        ledger: of memory; None: it is not counted, as on a real run.

    Attributes:
        record: where things are recorded now; the caller may put another in its place at any time.
        scope: what the work done now belongs to.
    """

    def __init__(self, names: GroupNames, ledger: Ledger | None = None) -> None:
        super().__init__()
        self.ledger = ledger
        self.record = Record()
        self.scope: Scope = ("", OUTSIDE)
        self.reads = HostReads(self)
        self._names = names
        self._flops = 0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Execute and record one operation."""
        kwargs = kwargs or {}
        if func.namespace == "c10d":
            message = message_of(func, args, self._names)
            self.record.messages.append(message)
            if self.ledger is not None and message.kind in TRANSFER_KINDS and not _in_backward():
                self.ledger.note_all(args[0], TRANSFERS)
            return func(*args, **kwargs)
        if func is torch.ops.aten._local_scalar_dense.default and isinstance(args[0], FakeTensor):
            self.note_read()  # from C++; reads from Python are answered by HostReads
            return _neutral(args[0].dtype)
        result = func(*args, **kwargs)
        cost = cost_of(func, args, kwargs, result)
        if cost is not None:
            self.record.work.setdefault(self.scope, Work()).add(cost)
            self._flops += cost.flops
        if self.ledger is not None:
            for leaf in tree_iter(result):
                if isinstance(leaf, Tensor):
                    self.ledger.note(leaf)
        return result

    def note_read(self) -> None:
        """The host waits for a value of the device."""
        self.record.host_reads[_site()] += 1

    def issued(self) -> tuple[Message, int]:
        """See :class:`megalm.dryrun.communication.Waits`."""
        return self.record.messages[-1], self._flops

    def waited(self, issue: tuple[Message, int]) -> None:
        """See :class:`megalm.dryrun.communication.Waits`."""
        message, flops = issue
        if message.kind in TRANSFER_KINDS:  # what hides them is other micro-batches' work: see pipeline.timing
            return
        overlap = self.record.overlaps.setdefault((message.group, message.kind), Overlap())
        overlap.count += 1
        overlap.hidden += self._flops > flops
        overlap.flops += self._flops - flops

    @contextmanager
    def recording(self) -> Iterator[Record]:
        """Record what the block does apart, in what is yielded."""
        before, self.record = self.record, Record()
        try:
            yield self.record
        finally:
            self.record = before

    @contextmanager
    def allocating(self, kind: str) -> Iterator[None]:
        """What is allocated in the block is of this kind."""
        if self.ledger is None:
            yield
            return
        before, self.ledger.default_kind = self.ledger.default_kind, kind
        try:
            yield
        finally:
            self.ledger.default_kind = before


class HostReads(TorchFunctionMode):
    """Answers what the host reads of tensors without values, and has it counted.

    A float is 1, an integer 0 and a truth value false: a step takes the branch of a healthy step.

    Args:
        tracer: is told of each read.
    """

    _SCALARS: Mapping[str, Any] = MappingProxyType(
        {"item": float, "__bool__": bool, "__int__": int, "__float__": float, "__index__": int}
    )

    def __init__(self, tracer: Tracer) -> None:
        super().__init__()
        self._tracer = tracer
        self._on_host: set[int] = set()

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Execute a function of torch, unless it reads."""
        name = getattr(func, "__name__", "")
        if not args or not isinstance(args[0], FakeTensor):
            return func(*args, **(kwargs or {}))
        if name in self._SCALARS:
            self._note(args[0])
            value = _neutral(args[0].dtype)
            return value if name == "item" else self._SCALARS[name](value)
        if name == "numpy":  # of a tensor of the host, which costs no wait
            return np.zeros(tuple(args[0].shape), dtype=str(args[0].dtype).removeprefix("torch."))
        result = func(*args, **(kwargs or {}))
        if name == "cpu":
            self._note(args[0])
            self._on_host.add(id(result))
        return result

    def __enter__(self) -> HostReads:
        """Answer from now on."""
        super().__enter__()
        # A method of the fake tensor's own class, which reads element by element, each of which would be a read.
        self._fake_tolist = FakeTensor.tolist
        # A bound method would not be given the tensor.
        FakeTensor.tolist = lambda tensor: self._tolist(tensor)  # type: ignore[method-assign, assignment]  # noqa: PLW0108
        return self

    def __exit__(self, *error: Any) -> None:
        """Answer no more."""
        FakeTensor.tolist = self._fake_tolist  # type: ignore[method-assign]
        super().__exit__(*error)

    def _tolist(self, tensor: Tensor) -> Any:
        self._note(tensor)
        return np.full(tuple(tensor.shape), _neutral(tensor.dtype)).tolist()

    def _note(self, tensor: Tensor) -> None:
        if id(tensor) in self._on_host:  # copied before, which was counted
            self._on_host.discard(id(tensor))
        else:
            self._tracer.note_read()


def _neutral(dtype: torch.dtype) -> float | int | bool:
    if dtype == torch.bool:
        return False
    return 1.0 if dtype.is_floating_point else 0


def _site() -> str:
    """``megalm/engine/zero.py:133``: the innermost line of megalm's or DeepSpeed's that is executed."""
    frame = sys._getframe(1)
    while frame is not None:
        path = frame.f_code.co_filename
        for package in _PACKAGES:
            found = path.rfind(f"/{package}")
            if found >= 0 and not path.startswith(_OWN_FOLDER):
                return f"{path[found + 1 :]}:{frame.f_lineno}"
        assert frame.f_back is not None, "a step is megalm's"
        frame = frame.f_back
    raise AssertionError


def layer_scopes(tracer: Tracer, blocks: Iterator[tuple[str, torch.nn.Module]]) -> None:
    """Have the work of each block counted under its name, forward and backward apart; recomputation is backward.

    The backward of a block lies between the gradients of its output and of its input.
    """
    for name, block in blocks:
        scopes = _Scopes(tracer, name)
        block.register_forward_pre_hook(scopes.enter)
        block.register_forward_hook(scopes.leave)


class _Scopes:
    """The hooks of one block."""

    def __init__(self, tracer: Tracer, name: str) -> None:
        self._tracer, self._name = tracer, name

    def enter(self, _: torch.nn.Module, inputs: tuple[Any, ...]) -> None:
        """Its forward begins, or is computed once more in backward."""
        if inputs[0].requires_grad:
            inputs[0].register_hook(self._backward_ends)
        self._tracer.scope = self._name, BACKWARD if _in_backward() else FORWARD

    def leave(self, _: torch.nn.Module, __: tuple[Any, ...], output: Tensor) -> None:
        """Its forward has ended."""
        if _in_backward():  # what follows is its backward
            return
        self._tracer.scope = "", OUTSIDE
        if output.requires_grad:
            output.register_hook(self._backward_starts)

    def _backward_starts(self, _: Tensor) -> None:
        self._tracer.scope = self._name, BACKWARD

    def _backward_ends(self, _: Tensor) -> None:
        # The block before may have taken over: what it gave is what this one was given.
        if self._tracer.scope == (self._name, BACKWARD):
            self._tracer.scope = "", OUTSIDE


def _in_backward() -> bool:
    return torch._C._current_graph_task_id() != -1
