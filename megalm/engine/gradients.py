"""Accumulation of gradients in fp32, and their reduction over replicas while backward goes on.

A hook takes each parameter's gradient away as soon as autograd has it, and adds it to a flat fp32 buffer. Buffers are
cut into *buckets*; in the last backward of a step a bucket is reduced as soon as its gradients are complete, while
backward goes on with the layers before it. All replicas issue the buckets of a stage in one fixed order, whatever
order they complete in, as NCCL demands.

    ============================ ======================================= ===========================================
    gradients                    reduced                                 hidden behind
    ============================ ======================================= ===========================================
    ZeRO-0 and 1, whole backward each bucket, when it is complete in a   the rest of that backward, and what other
                                 stage's last backward                   stages of the rank do after it
    ZeRO-2                       each bucket, in every backward          the rest of that backward
    split backward (ZB-H1)       a stage's buckets together, after its   nothing on ranks with one stage: the last
                                 last weight gradient                    weight gradient is the last work of a step
    partial (sequence parallel)  after the schedule: over tp, then over  nothing; norms and biases only
                                 replicas
    tied embeddings, pp above 1  after the schedule: once over both      nothing: the first stage's lookup is the last
                                 stages and all replicas                 backward of all
    ============================ ======================================= ===========================================

DeepSpeed's own reduction of ZeRO-1 comes after the schedule as a whole, and adds micro-batches in the model's dtype.

ZeRO (Rajbhandari et al. 2020) gives each replica a range of each flat buffer to update, so a bucket is not all-reduced:
each piece of it goes to the replica that owns it. ZeRO-2 keeps no whole buffer at all, but a bucket at a time.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import torch
import torch.distributed as dist
from torch import Tensor, nn

from megalm.engine.optimizer import ParameterGroup
from megalm.mesh.groups import ParallelContext

MIB = 2**20


@dataclass(frozen=True)
class FlatLayout:
    """How a parameter group lies in a flat buffer.

    Attributes:
        group: the parameters, one after the other.
        numel: elements of the buffer, padding at its end included.
        partition: elements that each replica owns, in the order of replicas; None: every replica owns all.
    """

    group: ParameterGroup
    numel: int
    partition: int | None

    def owned(self, replica: int) -> tuple[int, int]:
        """The range that one replica updates."""
        if self.partition is None:
            return 0, self.numel
        return replica * self.partition, (replica + 1) * self.partition

    @property
    def owned_here(self) -> tuple[int, int]:
        """The range that this replica updates."""
        return self.owned(self.group.replicas.index)

    def places(self) -> Iterator[tuple[nn.Parameter, int]]:
        """(parameter, where it begins) of each member."""
        start = 0
        for p in self.group.parameters:
            yield p.parameter, start
            start += p.parameter.numel()


@dataclass(eq=False)
class _Bucket:
    """Neighbours in a flat buffer that are reduced together.

    Attributes:
        layout: number of the flat buffer.
        stage: pipeline stage of its parameters.
        start: first element in the flat buffer.
        stop: after the last one.
        values: the gradients, [stop − start] fp32; under ZeRO-2 there only while they are collected.
        waiting: parameters whose last gradient of this backward is still to come.
        issued: whether its reduction is under way, and nothing may be added any more.
    """

    layout: int
    stage: int
    start: int
    stop: int
    values: Tensor | None = None
    parameters: list[nn.Parameter] = field(default_factory=list)
    waiting: set[nn.Parameter] = field(default_factory=set)
    issued: bool = False


class GradientBuckets:
    """Where the runner's gradients go; see :class:`megalm.core.pipeline.runner.Gradients`.

    Args:
        layouts: the flat buffers.
        context: this rank's groups.
        bucket_mib: size from which gradients are reduced together.
        shards: ZeRO-2: keep only what this replica owns, and reduce in every backward.
    """

    def __init__(
        self,
        layouts: Sequence[FlatLayout],
        context: ParallelContext,
        *,
        bucket_mib: float,
        shards: bool,
    ) -> None:
        self._layouts = list(layouts)
        self._shards = shards
        self._device = context.device
        self._whole: list[Tensor | None] = []
        self._owned: list[Tensor] = []
        self._buckets: list[_Bucket] = []
        self._places: dict[nn.Parameter, tuple[_Bucket, int]] = {}
        self._seen: set[nn.Parameter] = set()
        self._works: list[tuple[_Bucket, list[dist.Work]]] = []
        self._queues: dict[int, list[_Bucket]] = {}
        self._issued = 0
        self._last_work_of: int | None = None
        for number, layout in enumerate(self._layouts):
            self._make_buffers(layout)
            self._cut(number, layout, int(bucket_mib * MIB / 4))
        self._hooks = [p.register_post_accumulate_grad_hook(self._take) for p in self._places]

    def begin(self) -> None:
        """A step begins: whatever is added next replaces what is there."""
        self._seen.clear()
        for queue in self._queues.values():
            queue.clear()
        for bucket in self._buckets:
            bucket.issued = False
            if self._is_early(bucket):
                self._queues.setdefault(bucket.stage, []).append(bucket)
        if self._shards:
            for number, layout in enumerate(self._layouts):
                if layout.group.is_complete:
                    self._owned[number].zero_()

    def before(self, stage: int, *, last: bool) -> None:
        """Gradients of a stage are about to come."""
        if not (last or self._shards):
            return
        self._last_work_of = stage
        self._issued = 0
        for bucket in self._queues.get(stage, ()):
            bucket.waiting = set(bucket.parameters)

    def add(self, parameter: nn.Parameter, gradient: Tensor) -> None:
        """Add one contribution to a parameter's gradient."""
        bucket, start = self._places[parameter]
        assert not bucket.issued, "a gradient came after its bucket was sent off"
        if bucket.values is None:
            bucket.values = torch.zeros(bucket.stop - bucket.start, dtype=torch.float32, device=self._device)
            self._seen.update(bucket.parameters)
        values = bucket.values.narrow(0, start - bucket.start, parameter.numel())
        if parameter in self._seen:
            values.add_(gradient.reshape(-1))
        else:
            values.copy_(gradient.reshape(-1))
            self._seen.add(parameter)

    def after(self, stage: int, *, last: bool) -> None:
        """All gradients of this piece of work have come."""
        if not (last or self._shards):
            return
        self._last_work_of = None
        for bucket in self._queues.get(stage, ())[self._issued :]:
            self._issue(bucket)
        if self._shards:
            self._collect()

    def finish(self) -> None:
        """The schedule is done: reduce what could not be reduced earlier, and wait for everything."""
        for bucket in self._buckets:
            if not self._is_early(bucket):
                self._reduce_late(bucket)
        self._collect()

    def owned(self) -> list[Tensor]:
        """The sums of gradients over micro-batches and replicas that this replica updates with, by flat buffer."""
        return self._owned

    def view(self, parameter: nn.Parameter) -> Tensor:
        """A parameter's gradient in a buffer that is kept whole, in the parameter's shape."""
        bucket, start = self._places[parameter]
        assert bucket.values is not None, "ZeRO-2 keeps no whole gradients"
        return bucket.values.narrow(0, start - bucket.start, parameter.numel()).view(parameter.shape)

    def _make_buffers(self, layout: FlatLayout) -> None:
        start, stop = layout.owned_here
        if self._shards and layout.group.is_complete:
            self._whole.append(None)
            self._owned.append(torch.zeros(stop - start, dtype=torch.float32, device=self._device))
            return
        whole = torch.zeros(layout.numel, dtype=torch.float32, device=self._device)
        self._whole.append(whole)
        self._owned.append(whole[start:stop])

    def _cut(self, number: int, layout: FlatLayout, elements: int) -> None:
        """Cut a flat buffer at stages and sizes; the bucket that backward completes first comes first."""
        buckets: list[_Bucket] = []
        stages = [p.record.stage for p in layout.group.parameters]
        for (parameter, start), stage in zip(layout.places(), stages, strict=True):
            full = not buckets or buckets[-1].stop - buckets[-1].start >= elements
            if full or buckets[-1].stage != stage:
                buckets.append(_Bucket(number, stage, start, start))
            bucket = buckets[-1]
            bucket.parameters.append(parameter)
            bucket.stop = start + parameter.numel()
            self._places[parameter] = bucket, start
        whole = self._whole[number]
        if whole is not None:
            for bucket in buckets:
                bucket.values = whole[bucket.start : bucket.stop]
        self._buckets += buckets[::-1]

    def _take(self, parameter: nn.Parameter) -> None:
        """The hook: autograd has added to ``grad``."""
        if parameter.grad is None:  # its product was postponed; it comes through add()
            return
        self.add(parameter, parameter.grad)
        parameter.grad = None
        if self._last_work_of is not None:
            self._places[parameter][0].waiting.discard(parameter)
            queue = self._queues.get(self._last_work_of, [])
            while self._issued < len(queue) and not queue[self._issued].waiting:
                self._issue(queue[self._issued])
                self._issued += 1

    def _is_early(self, bucket: _Bucket) -> bool:
        return self._layouts[bucket.layout].group.is_complete

    def _issue(self, bucket: _Bucket) -> None:
        """Start the reduction of a bucket over the replicas, to those that own it."""
        if bucket.values is None:  # ZeRO-2, and this piece of work gave it nothing
            bucket.values = torch.zeros(bucket.stop - bucket.start, dtype=torch.float32, device=self._device)
        else:
            self._zero_unseen(bucket)
        bucket.issued = True
        self._works.append((bucket, self._start_reduction(bucket)))

    def _start_reduction(self, bucket: _Bucket) -> list[dist.Work]:
        layout, values = self._layouts[bucket.layout], bucket.values
        replicas = layout.group.replicas
        assert values is not None
        if replicas.size == 1:
            return []
        if layout.partition is None:
            return [_started(dist.all_reduce(values, group=replicas.handle, async_op=True))]
        works = []
        for replica, rank in enumerate(replicas.ranks):
            start, stop = self._overlap(bucket, replica)
            if start < stop:
                piece = values[start - bucket.start : stop - bucket.start]
                works.append(_started(dist.reduce(piece, dst=rank, group=replicas.handle, async_op=True)))
        return works

    def _overlap(self, bucket: _Bucket, replica: int) -> tuple[int, int]:
        start, stop = self._layouts[bucket.layout].owned(replica)
        return max(start, bucket.start), min(stop, bucket.stop)

    def _reduce_late(self, bucket: _Bucket) -> None:
        """Gradients of which other ranks hold further parts: norms under sequence parallelism, tied embeddings."""
        self._zero_unseen(bucket)
        assert bucket.values is not None
        group = self._layouts[bucket.layout].group
        if group.parts is not None:
            group.parts.all_reduce(bucket.values)
        if group.copies is not None:
            # One reduction over stages and replicas gives every copy the same bits; two in turn might not.
            group.copies.all_reduce(bucket.values)
            return
        for work in self._start_reduction(bucket):
            work.wait()

    def _collect(self) -> None:
        """Wait for reductions; under ZeRO-2 add what this replica owns, and drop the buckets."""
        for bucket, works in self._works:
            for work in works:
                work.wait()
            if self._whole[bucket.layout] is None:
                layout = self._layouts[bucket.layout]
                start, stop = self._overlap(bucket, layout.group.replicas.index)
                if start < stop:
                    assert bucket.values is not None
                    offset, _ = layout.owned_here
                    mine = bucket.values[start - bucket.start : stop - bucket.start]
                    self._owned[bucket.layout][start - offset : stop - offset] += mine
                bucket.values, bucket.issued = None, False
                self._seen.difference_update(bucket.parameters)
        self._works.clear()

    def _zero_unseen(self, bucket: _Bucket) -> None:
        for parameter in bucket.parameters:
            if parameter not in self._seen:
                self.add(parameter, torch.zeros_like(parameter))


def _started(work: dist.Work | None) -> dist.Work:
    assert work is not None, "an asynchronous collective returns its work"
    return work
