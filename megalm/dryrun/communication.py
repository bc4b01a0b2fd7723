"""What a rank sends and receives: each collective and transfer, in the order in which it was issued.

Works on a real process group as on a fake one: a test compares the two, collective by collective.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import wraps
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch import Tensor
from torch._ops import OpOverload
from torch.distributed import distributed_c10d
from torch.utils._pytree import tree_iter

from megalm.mesh.groups import Group, ParallelContext

KINDS = {
    "allreduce_": "all_reduce",
    "reduce_": "reduce",
    "broadcast_": "broadcast",
    "_allgather_base_": "all_gather",
    "allgather_": "all_gather",
    "allgather_into_tensor_coalesced_": "all_gather",
    "_reduce_scatter_base_": "reduce_scatter",
    "reduce_scatter_": "reduce_scatter",
    "reduce_scatter_tensor_coalesced_": "reduce_scatter",
    "alltoall_base_": "all_to_all",
    "alltoall_": "all_to_all",
    "gather_": "gather",
    "scatter_": "scatter",
    "send": "send",
    "recv_": "receive",
    "recv_any_source_": "receive",
    "barrier": "barrier",
    "monitored_barrier_": "barrier",
}
"""torch's operations by what megalm calls them."""

TRANSFER_KINDS = ("send", "receive")
"""Those between two ranks."""

NCCL_ALGORITHMS = {
    "all_reduce": "ring, tree, NVLS",
    "reduce": "ring",
    "broadcast": "ring",
    "all_gather": "ring, PAT, NVLS",
    "reduce_scatter": "ring, PAT, NVLS",
    "all_to_all": "grouped point-to-point",
    "gather": "grouped point-to-point",
    "scatter": "grouped point-to-point",
    "send": "point-to-point",
    "receive": "point-to-point",
    "barrier": "ring, tree, NVLS",
}
"""What NCCL can choose from for each (NCCL 2.23 to 2.29, ``src/graph/tuning.cc`` and ``src/enqueue.cc``): only a ring's
time grows with the number of ranks; PAT needs one rank per node, NVLS an NVSwitch."""


@dataclass(frozen=True)
class Message:
    """One collective or transfer of a rank.

    Attributes:
        group: axis or purpose of its group.
        kind: a value of ``KINDS``.
        nbytes: of the largest of what a member gives and gets: the whole of a gathered or scattered buffer.
        peer: the other rank of a transfer, or the one that a reduce or broadcast is for or from; None for all others.
    """

    group: str
    kind: str
    nbytes: int
    peer: int | None = None


class GroupNames:
    """Process groups by what they are for.

    Args:
        context: of the rank whose groups these are.

    Attributes:
        sizes: members of each group, by its name.
    """

    def __init__(self, context: ParallelContext) -> None:
        named: list[tuple[str, Group]] = [
            ("world", context.world_group),
            ("tp", context.tp_group),
            ("pp", context.pp_group),
            ("cp", context.cp_group),
            ("replicas", context.replica_group),
            ("model", context.model_group),
            ("tied", context.tied_group),
            *(("·".join(axes), group) for axes, group in context.inner_groups.items()),
            *((f"pp {source}▶{target}", group) for (source, target), group in context.links.items()),
        ]
        self.sizes: dict[str, int] = {}
        self._names: dict[str, str] = {}
        for name, group in named:
            if group.handle is not None and self._names.setdefault(group.handle.group_name, name) == name:
                self.sizes[name] = group.size

    def of(self, handle: dist.ProcessGroup) -> str:
        """The name of a group; one that is none of the context's is called so."""
        name = self._names.get(handle.group_name, f"another of {handle.size()}")
        self.sizes.setdefault(name, handle.size())
        return name


def message_of(operation: OpOverload, args: tuple[Any, ...], names: GroupNames) -> Message:
    """A ``c10d`` operation as a message."""
    kind = KINDS[operation._schema.name.split("::")[1]]
    nbytes = max((_nbytes(arg) for arg in args[:2]), default=0)
    arguments = dict(zip((argument.name for argument in operation._schema.arguments), args, strict=False))
    group = _group_of(args)
    index = next((arguments[name] for name in ("dst", "src", "root_rank") if name in arguments), None)
    peer = None if index is None else dist.get_process_group_ranks(group)[index]
    return Message(names.of(group), kind, nbytes, peer)


def _group_of(args: tuple[Any, ...]) -> dist.ProcessGroup:
    for argument in args:
        if isinstance(argument, torch.ScriptObject):
            try:
                return dist.ProcessGroup.unbox(argument)
            except RuntimeError:  # a reduction's operator, which is a script object, too
                continue
    raise AssertionError("a collective has a group")


def _nbytes(tree: Any) -> int:
    return sum(leaf.numel() * leaf.element_size() for leaf in tree_iter(tree) if isinstance(leaf, Tensor))


class Waits(Protocol):
    """Is told when a collective that was issued is waited for."""

    def issued(self) -> object:
        """An asynchronous collective has been issued; what is returned comes back in :meth:`waited`."""

    def waited(self, issue: Any) -> None:
        """Its result is waited for."""


class _TracedWork:
    """A work whose wait is told; complete at once, as a transfer is that took no time."""

    def __init__(self, work: dist.Work, waits: Waits, issue: object) -> None:
        self._work, self._waits, self._issue = work, waits, issue

    def wait(self, *args: Any, **kwargs: Any) -> bool:
        if self._issue is not None:
            self._waits.waited(self._issue)
            self._issue = None
        return self._work.wait(*args, **kwargs)

    def is_completed(self) -> bool:
        return True

    def __getattr__(self, name: str) -> Any:
        return getattr(self._work, name)


_ASYNCHRONOUS = (
    "all_reduce",
    "reduce",
    "broadcast",
    "all_gather_into_tensor",
    "all_gather_single",
    "reduce_scatter_tensor",
    "reduce_scatter_single",
    "all_to_all_single",
    "isend",
    "irecv",
    "batch_isend_irecv",
)


@contextmanager
def traced_waits(waits: Waits) -> Iterator[None]:
    """Have every asynchronous collective tell when it is waited for, while the block runs."""
    places = [(module, name) for module in (dist, distributed_c10d) for name in _ASYNCHRONOUS if hasattr(module, name)]
    before = [(module, name, getattr(module, name)) for module, name in places]
    wrapped: dict[Callable[..., Any], Callable[..., Any]] = {}
    for module, name, function in before:
        setattr(module, name, wrapped.setdefault(function, _traced(function, waits)))
    try:
        yield
    finally:
        for module, name, function in before:
            setattr(module, name, function)


def _traced(function: Callable[..., Any], waits: Waits) -> Callable[..., Any]:
    @wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        result = function(*args, **kwargs)
        if isinstance(result, dist.Work):
            return _TracedWork(result, waits, waits.issued())
        if isinstance(result, list):
            return [work if isinstance(work, _TracedWork) else _TracedWork(work, waits, None) for work in result]
        return result

    return call
