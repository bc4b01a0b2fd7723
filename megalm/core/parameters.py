"""How layers declare what they own: each parameter's record, its initial values, and the local tensor.

The record (:mod:`megalm.mesh.parameter`) is the single source for initialisation, reduction of gradients, norm,
optimizer, checkpoint and conversion.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor, nn

from megalm.mesh.parameter import ParameterRecord
from megalm.mesh.slices import ShardSpec
from megalm.mesh.topology import REPLICAS


@dataclass(frozen=True)
class Init:
    """How a full tensor is filled: ``normal`` with a standard deviation, or a ``constant``."""

    kind: str
    value: float

    @classmethod
    def normal(cls, std: float) -> Init:
        """Zero-mean Gaussian."""
        return cls("normal", std)

    @classmethod
    def constant(cls, value: float) -> Init:
        """One value everywhere."""
        return cls("constant", value)


@dataclass(frozen=True)
class Declaration:
    """What a module says about one of its tensors; the record's name is the module's own, without a path."""

    record: ParameterRecord
    init: Init

    @property
    def shard(self) -> ShardSpec:
        """The slice that this rank holds."""
        return self.record.shard


class ParallelModule(nn.Module):
    """A module that declares every parameter it owns, instead of creating it by hand."""

    declarations: dict[str, Declaration]

    def __init__(self) -> None:
        super().__init__()
        self.declarations = {}

    def declare(
        self,
        name: str,
        shard: ShardSpec,
        init: Init,
        *,
        split_over: tuple[str, ...] | None = None,
        replicated_over: tuple[str, ...] = REPLICAS,
        partial: bool = False,
        per_word: bool = False,
    ) -> nn.Parameter:
        """Create and register the local tensor of a parameter; its values come later, from ``random.initialise``.

        Args:
            name: in this module.
            shard: the slice that this rank holds.
            init: how it starts.
            split_over: axes whose ranks hold different slices; None: tp, if the tensor is cut at all.
            replicated_over: axes whose ranks hold the same slice and see different tokens.
            partial: every tensor-parallel rank holds the same values, but sees only a part of their gradient (its share
                of the sequence, or of the heads).
            per_word: whether dim 0 has a row for each word.
        """
        parameter = nn.Parameter(torch.zeros(shard.local_shape))
        self.register_parameter(name, parameter)
        record = ParameterRecord(
            name,
            shard,
            split_over=(("tp",) if shard.is_sharded else ()) if split_over is None else split_over,
            partial_over=("tp",) if partial else (),
            replicated_over=replicated_over,
            # Weight decay applies to matrices, not to norms and biases (Brown et al. 2020, GPT-2).
            decays=len(shard.full_shape) > 1,
            per_word=per_word,
        )
        self.declarations[name] = Declaration(record, init)
        return parameter

    def declare_buffer(self, name: str, shard: ShardSpec, init: Init) -> Tensor:
        """Create and register a tensor that no gradient changes and that is saved with the parameters.

        It is the same on all replicas and tensor-parallel ranks, and whoever changes it must keep it so.
        """
        buffer = torch.zeros(shard.local_shape)
        self.register_buffer(name, buffer)
        record = ParameterRecord(name, shard, trainable=False, decays=False, is_buffer=True)
        self.declarations[name] = Declaration(record, init)
        return buffer


def freeze(module: nn.Module) -> None:
    """Keep all parameters of ``module`` as they are: they get no gradient, no optimizer state and no update."""
    for child in module.modules():
        for name, parameter in child.named_parameters(recurse=False):
            parameter.requires_grad_(False)
            if isinstance(child, ParallelModule):
                declared = child.declarations[name]
                child.declarations[name] = replace(declared, record=replace(declared.record, trainable=False))


@dataclass(frozen=True)
class Recorded:
    """Something of a parameter or buffer, with its record."""

    record: ParameterRecord

    @property
    def name(self) -> str:
        """Layout-independent name of the tensor."""
        return self.record.name

    @property
    def shard(self) -> ShardSpec:
        """The slice of the full tensor that the local tensor is."""
        return self.record.shard


@dataclass(frozen=True)
class DeclaredTensor(Recorded):
    """One parameter or buffer of a model: its record under its full name, how it starts, and the local tensor."""

    init: Init = field(repr=False)
    tensor: Tensor = field(repr=False)

    @property
    def parameter(self) -> nn.Parameter:
        """The local tensor of a parameter."""
        assert isinstance(self.tensor, nn.Parameter), f"{self.name} is a buffer"
        return self.tensor


def declared_tensors(module: nn.Module, prefix: str = "") -> list[DeclaredTensor]:
    """Every parameter and saved buffer below ``module``, in registration order, under names that begin with ``prefix``.

    Raises:
        TypeError: a module holds one that it did not declare.
    """
    return list(_declared(module, prefix))


def _declared(module: nn.Module, prefix: str) -> Iterator[DeclaredTensor]:
    for path, child in module.named_modules():
        declarations = getattr(child, "declarations", {})
        tensors = [*child.named_parameters(recurse=False), *child.named_buffers(recurse=False)]
        for name, tensor in tensors:
            if name in child._non_persistent_buffers_set:  # computed, such as the angles of rotary positions
                continue
            full_name = f"{prefix}{path}.{name}" if path else f"{prefix}{name}"
            if name not in declarations:
                raise TypeError(f"{full_name}: {type(child).__name__} holds a tensor that it does not declare")
            declared = declarations[name]
            yield DeclaredTensor(replace(declared.record, name=full_name), declared.init, tensor)


@dataclass(frozen=True)
class StatePiece(Recorded):
    """A contiguous run of one tensor's flattened local tensor that this rank holds.

    ZeRO cuts the flattened local tensor without regard to rows, so a piece is described by the slice of the full tensor
    that the local tensor is (the record's ``shard``), where in the flattened local tensor it begins, and its values.

    Attributes:
        record: of the parameter.
        kind: ``weight`` (fp32 master), ``exp_avg`` or ``exp_avg_sq`` (Adam moments), ``buffer``.
        flat_start: offset of the first element in the flattened local tensor (padding included).
        values: one-dimensional; the live storage of the optimizer, not a copy, fp32; of a parameter that is not trained
            and of a buffer the model's own, in its dtype.
    """

    kind: str
    flat_start: int
    values: Tensor = field(repr=False)

    @property
    def without_padding(self) -> StatePiece:
        """What a checkpoint keeps of the piece: all but padding at the end of the local tensor; perhaps nothing."""
        saved = self.shard.saved
        if saved is self.shard:
            return self
        values = self.values[: max(saved.local_numel - self.flat_start, 0)]
        return replace(self, record=replace(self.record, shard=saved), values=values)
