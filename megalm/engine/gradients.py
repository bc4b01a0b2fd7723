"""Accumulation of gradients in fp32, and their reduction over replicas while backward goes on.

A hook takes each parameter's gradient away as soon as autograd has it, and adds it to a flat fp32 buffer; with
``engine.gradient_accumulation_fusion`` a linear layer's product adds to the buffer itself. Parameters are in *buckets*
(``layout.py``); in the last backward of a step a bucket is reduced as soon as its gradients are complete, while
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

ZeRO (Rajbhandari et al. 2020) gives each replica a piece of each bucket to update, so a bucket is not all-reduced: a
piece of its sum goes to each replica (``reduction.py``). ZeRO-2 keeps no whole buffer at all, but a bucket at a time.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from megalm.core.collectives import Pending
from megalm.core.weight_gradients import GradientSink, add_product
from megalm.engine.layout import FlatLayout, in_model_order
from megalm.engine.reduction import AllReduce, Reduction
from megalm.mesh.groups import ParallelContext


class _Bucket:
    """Gradients that are reduced together.

    Attributes:
        layout: how they lie in the buffer.
        values: the buffer, fp32; under ZeRO-2 there only while gradients are collected.
        is_kept: whether ``values`` stays there from step to step.
        owned: the piece that this replica updates with: of ``values``, or under ZeRO-2 a tensor of its own.
        waiting: parameters whose last gradient of this backward is still to come.
        issued: whether its reduction is under way, and nothing may be added any more.
    """

    def __init__(self, layout: FlatLayout, device: torch.device, *, is_kept: bool) -> None:
        start, stop = layout.owned_here
        self.layout = layout
        self.is_kept = is_kept
        self.values = _zeros(layout.numel, device) if is_kept else None
        self.owned = _zeros(stop - start, device) if self.values is None else self.values[start:stop]
        self.parameters = [parameter for parameter, _ in layout.places()]
        self.waiting: set[nn.Parameter] = set()
        self.issued = False

    @property
    def stage(self) -> int:
        """Pipeline stage of its parameters."""
        return self.layout.stage


class GradientBuckets(GradientSink):
    """Where the runner's gradients go; see :class:`megalm.core.pipeline.runner.Gradients`.

    Args:
        layouts: of the buckets.
        parameters: of the model, in the order in which forward comes to them.
        context: this rank's groups.
        reduction: how buckets of which each replica owns a piece are summed over the replicas.
        shards: ZeRO-2: keep only what this replica owns, and reduce in every backward.
    """

    def __init__(
        self,
        layouts: Sequence[FlatLayout],
        parameters: Sequence[nn.Parameter],
        context: ParallelContext,
        *,
        reduction: Reduction,
        shards: bool,
    ) -> None:
        self._shards = shards
        self._device = context.device
        self._reduction = reduction
        self._buckets = [
            _Bucket(layout, context.device, is_kept=not (shards and layout.group.is_complete)) for layout in layouts
        ]
        self._places = {
            parameter: (bucket, start) for bucket in self._buckets for parameter, start in bucket.layout.places()
        }
        # The bucket that backward completes first comes first.
        self._in_order = [self._buckets[n] for n in reversed(in_model_order(layouts, parameters))]
        self._seen: set[nn.Parameter] = set()
        self._under_way: list[tuple[_Bucket, Pending]] = []
        self._queues: dict[int, list[_Bucket]] = {}
        self._issued = 0
        self._last_work_of: int | None = None
        self._hooks = [p.register_post_accumulate_grad_hook(self._take) for p in self._places]

    def begin(self) -> None:
        """A step begins: whatever is added next replaces what is there."""
        self._seen.clear()
        self._queues.clear()
        for bucket in self._in_order:
            bucket.issued = False
            if bucket.layout.group.is_complete:
                self._queues.setdefault(bucket.stage, []).append(bucket)
            if not bucket.is_kept:
                bucket.owned.zero_()

    def before(self, stage: int, *, last: bool) -> None:
        """Gradients of a stage are about to come."""
        if not (last or self._shards):
            return
        self._last_work_of = stage
        self._issued = 0
        for bucket in self._queues.get(stage, ()):
            bucket.waiting = set(bucket.parameters)

    def add(self, parameter: nn.Parameter, gradient: Tensor, *, factor: Tensor | None = None) -> None:
        """Add one contribution to a parameter's gradient, times a factor [1] if one is given."""
        values, is_first = self._place(parameter)
        gradient = gradient.reshape(-1)
        if factor is not None and is_first:
            torch.mul(gradient, factor, out=values)
        elif factor is not None:
            values.addcmul_(gradient, factor)
        elif is_first:
            values.copy_(gradient)
        else:
            values.add_(gradient)

    def add_product(self, parameter: nn.Parameter, gradients: Tensor, inputs: Tensor) -> None:
        """Add ``Gᵀ X`` to the gradient [O, I] of a linear layer's weight: G [n, O], X [n, I]."""
        values, is_first = self._place(parameter)
        add_product(values.view(parameter.shape), gradients, inputs, replace=is_first)

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
        for bucket in self._in_order:
            if not bucket.layout.group.is_complete:
                self._issue(bucket)
        self._collect()

    def owned(self) -> list[Tensor]:
        """The sums of gradients over micro-batches and replicas that this replica updates with, by bucket."""
        return [bucket.owned for bucket in self._buckets]

    def view(self, parameter: nn.Parameter) -> Tensor:
        """A parameter's gradient in a buffer that is kept whole, in the parameter's shape."""
        bucket, start = self._places[parameter]
        assert bucket.values is not None, "ZeRO-2 keeps no whole gradients"
        return bucket.values.narrow(0, start, parameter.numel()).view(parameter.shape)

    def _place(self, parameter: nn.Parameter) -> tuple[Tensor, bool]:
        """Where a parameter's gradient is added, [elements], and whether what comes now is the first of it."""
        bucket, start = self._places[parameter]
        assert not bucket.issued, "a gradient came after its bucket was sent off"
        values = self._values(bucket)
        is_first = parameter not in self._seen
        self._seen.add(parameter)
        return values.narrow(0, start, parameter.numel()), is_first

    def _values(self, bucket: _Bucket) -> Tensor:
        """A bucket's buffer, made where ZeRO-2 has none now."""
        if bucket.values is None:
            bucket.values = _zeros(bucket.layout.numel, self._device)
            self._seen.update(bucket.parameters)
        return bucket.values

    def _take(self, parameter: nn.Parameter) -> None:
        """The hook: autograd has added to ``grad``, or has found that nothing comes this way.

        That is where a product was postponed, or has added to the buffer itself.
        """
        if parameter.grad is not None:
            self.add(parameter, parameter.grad)
            parameter.grad = None
        if self._last_work_of is not None:
            self._places[parameter][0].waiting.discard(parameter)
            queue = self._queues.get(self._last_work_of, [])
            while self._issued < len(queue) and not queue[self._issued].waiting:
                self._issue(queue[self._issued])
                self._issued += 1

    def _issue(self, bucket: _Bucket) -> None:
        """Start the reduction of a bucket over all that hold parts of its gradients, to those that own it."""
        values = self._values(bucket)
        for parameter in bucket.parameters:
            if parameter not in self._seen:
                self.add(parameter, torch.zeros_like(parameter))
        bucket.issued = True
        group = bucket.layout.group
        if group.parts is not None:  # norms under sequence parallelism
            group.parts.all_reduce(values)
        if group.copies is not None:  # tied embeddings
            # One reduction over stages and replicas gives every copy the same bits; two in turn might not.
            self._under_way.append((bucket, AllReduce().start(values, group.copies)))
        elif group.replicas.size > 1:
            way = AllReduce() if bucket.layout.partition is None else self._reduction
            self._under_way.append((bucket, way.start(values, group.replicas)))
        else:
            self._under_way.append((bucket, Pending(None, values)))

    def _collect(self) -> None:
        """Wait for reductions; under ZeRO-2 add what this replica owns, and drop the buckets."""
        for bucket, pending in self._under_way:
            pending.wait()
            if not bucket.is_kept:
                assert bucket.values is not None
                start, stop = bucket.layout.owned_here
                bucket.owned += bucket.values[start:stop]
                bucket.values, bucket.issued = None, False
                self._seen.difference_update(bucket.parameters)
        self._under_way.clear()


def _zeros(elements: int, device: torch.device) -> Tensor:
    return torch.zeros(elements, dtype=torch.float32, device=device)
