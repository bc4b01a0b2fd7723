"""Passes of a model over the ranks that hold it, several under way at a time.

A rank runs its stages, hands the activation to the next pipeline rank, and goes on with another pass; the last one
turns the activation into what was asked for and tells all ranks of the model. Activations travel in one direction only
(on NCCL over the links of that direction) and results by a broadcast over a group of their own, so that no two
transfers wait for each other. With as many passes
under way as there are pipeline ranks, all of them compute.

Per pass and stage: one activation received and one sent; per pass and rank one broadcast; with tensor parallelism also
the collectives of its layers. None of these depends on the number of replicas.

Shapes: B rows of a pass, S tokens of each, H hidden, M rows of a result, C columns.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from megalm.core.place import Place
from megalm.mesh.groups import Group, ParallelContext
from megalm.models.transformer import Transformer


@dataclass(frozen=True)
class Pass:
    """What is computed.

    Attributes:
        tokens: ids, [B, S], on the device.
        place: their positions, and keys and values of earlier tokens.
        finish: the last block's output [B, S, H] ▶ the result, [M, C] fp64; called on the last stage's ranks.
        shape: of the result, (M, C).
    """

    tokens: Tensor
    place: Place
    finish: Callable[[Tensor], Tensor]
    shape: tuple[int, int]


class Passes:
    """Starts passes and gives their results in the same order, on every rank of the model alike.

    Args:
        model: this rank's part.
        context: its groups; ``parallel.cp`` is 1.
    """

    def __init__(self, model: Transformer, context: ParallelContext) -> None:
        self._model, self._context = model, context
        here, topology = context.coordinates, context.topology
        self._speaker = topology.rank_at(pp=topology.pp - 1, dp=here.dp, cp=here.cp, tp=0)
        self._under_way: deque[tuple[Tensor, dist.Work | None]] = deque()
        self._sending: deque[tuple[dist.Work, Tensor]] = deque()

    @property
    def at_once(self) -> int:
        """How many passes under way keep all ranks busy.

        With several stages per rank a pass comes back to a rank, which waits for it: one pass at a time.
        """
        topology = self._context.topology
        return topology.pp if topology.virtual_stages == 1 else 1

    @property
    def device(self) -> torch.device:
        """Where the model computes."""
        return self._context.device

    @torch.inference_mode()
    def start(self, each: Pass) -> None:
        """Do this rank's part of a pass; :meth:`result` gives what comes of it."""
        topology = self._context.topology
        result, x = torch.empty(each.shape, dtype=torch.float64, device=self.device), None
        for stage in self._model.part.stages:
            if stage and topology.pp > 1:
                x = self._receive(each.tokens, stage)
            x = self._model.through(stage, each.tokens, x, each.place)
            if stage + 1 == topology.num_stages:
                result = each.finish(x)
            elif topology.pp > 1:
                self._send(x, stage)
        group = self._context.model_group
        work = None
        if group.size > 1:
            work = dist.broadcast(result, self._speaker, group=group.handle, async_op=True)
        self._under_way.append((result, work))

    def result(self) -> Tensor:
        """The result of the oldest pass under way, [M, C] fp64 on the CPU; waits for it."""
        result, work = self._under_way.popleft()
        if work is not None:
            work.wait()
        return result.cpu()

    def _receive(self, tokens: Tensor, stage: int) -> Tensor:
        """What the stage before this one has sent."""
        weight = next(self._model.parameters())
        x = torch.empty((*tokens.shape, self._model.hidden_size), dtype=weight.dtype, device=self.device)
        dist.recv(x, self._rank_of(stage - 1), group=self._link(stage - 1).handle)
        return x

    def _send(self, x: Tensor, stage: int) -> None:
        """To the stage after this one."""
        while self._sending and self._sending[0][0].is_completed():
            self._sending.popleft()
        x = x.contiguous()
        work = dist.isend(x, self._rank_of(stage + 1), group=self._link(stage).handle)
        if work is not None:
            self._sending.append((work, x))

    def _link(self, stage: int) -> Group:
        """What carries activations from a stage to the next one."""
        owner = self._context.topology.stage_owner
        return self._context.link(owner(stage), owner(stage + 1))

    def _rank_of(self, stage: int) -> int:
        """The rank of this pipeline that runs a stage."""
        return self._context.pp_group.ranks[self._context.topology.stage_owner(stage)]
