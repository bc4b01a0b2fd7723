"""One record per parameter: what of which full tensor a rank holds, over which axes, and what is done with it.

Initialisation, gradient buckets, the norm, clipping, optimizer groups, the pieces of a checkpoint, conversion and
counts all read these records; there is no other place that knows who owns a parameter. No torch.
"""

from __future__ import annotations

from dataclasses import dataclass

from megalm.mesh.slices import ShardSpec
from megalm.mesh.topology import REPLICAS, Topology


@dataclass(frozen=True)
class ParameterRecord:
    """What a rank knows of one parameter, or of a tensor of the model that is none (``is_buffer``).

    Attributes:
        name: layout-independent.
        shard: the slice that this rank holds.
        split_over: axes of the mesh whose ranks hold different slices.
        partial_over: axes whose ranks hold the same slice, each seeing a part of its gradient (its share of the
            sequence, or of the heads): the parts are added.
        replicated_over: axes whose ranks hold the same slice and see different tokens: the gradients are added, and
            ZeRO splits the optimizer's state over these ranks. ``dp × cp`` for a dense layer, fewer ranks for experts.
        stage: pipeline stage whose backward completes the gradient.
        copies: stages that hold the same parameter on different pipeline ranks (tied embeddings), ascending; their
            gradients are added, and the first stage owns it. Empty for all others.
        trainable: whether it has a gradient and an optimizer state.
        decays: whether weight decay applies.
        per_word: whether its dim 0 has a row for each word of the vocabulary.
        is_buffer: state of the model that no gradient changes, saved with the parameters.
    """

    name: str
    shard: ShardSpec
    split_over: tuple[str, ...] = ()
    partial_over: tuple[str, ...] = ()
    replicated_over: tuple[str, ...] = REPLICAS
    stage: int = 0
    copies: tuple[int, ...] = ()
    trainable: bool = True
    decays: bool = True
    per_word: bool = False
    is_buffer: bool = False

    def is_owned_by(self, topology: Topology, rank: int, *, among_replicas: bool = True) -> bool:
        """Whether ``rank``, which holds a slice, stands for it: of ranks with equal slices exactly one does.

        It counts the slice's elements in norms and in the number of parameters, and saves them.

        Args:
            topology: the mesh.
            rank: a rank that holds this slice.
            among_replicas: False: every replica stands for its own, as where ZeRO splits what is saved over them.
        """
        if self.copies and topology.coordinates(rank).pp != topology.stage_owner(self.copies[0]):
            return False
        if "tp" not in self.split_over and topology.coordinates(rank).tp:
            return False
        return not among_replicas or not any(topology.coordinate(rank, axis) for axis in self.replicated_over)


@dataclass(frozen=True)
class StateRun:
    """A run of the flattened local tensor of a parameter or buffer, of one kind, such as one that a rank reads.

    Attributes:
        record: of the parameter.
        kind: ``weight``, a moment, or ``buffer``.
        flat_start: first element in the flattened local tensor.
        length: number of elements.
    """

    record: ParameterRecord
    kind: str
    flat_start: int
    length: int

    @property
    def name(self) -> str:
        """Layout-independent name of the tensor."""
        return self.record.name

    @property
    def shard(self) -> ShardSpec:
        """The slice of the full tensor that the local tensor is."""
        return self.record.shard
