"""How a megalm tensor is stored in another format: renamed, transposed, split, or with its rows reordered.

A format is a list of :class:`Rule`; each works in both directions, and both move bytes, never numbers: a round trip is
byte-equal.

Shape legend: N query heads, K key/value heads, D head dim, H hidden.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Collection, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

Shape = tuple[int, ...]


class Form(ABC):
    """How the elements of one megalm tensor are arranged in one or more tensors of another format."""

    @abstractmethod
    def foreign_shapes(self, shape: Shape) -> tuple[Shape, ...]:
        """Shapes of the other format's tensors for a megalm tensor of ``shape``."""

    @abstractmethod
    def to_megalm(self, parts: Sequence[Tensor]) -> Tensor:
        """Other format's tensors ▶ megalm tensor."""

    @abstractmethod
    def to_foreign(self, tensor: Tensor) -> tuple[Tensor, ...]:
        """A megalm tensor ▶ the other format's tensors."""


class Plain(Form):
    """The same tensor."""

    def foreign_shapes(self, shape: Shape) -> tuple[Shape, ...]:
        """One tensor of the same shape."""
        return (shape,)

    def to_megalm(self, parts: Sequence[Tensor]) -> Tensor:
        """Unchanged."""
        return parts[0]

    def to_foreign(self, tensor: Tensor) -> tuple[Tensor, ...]:
        """Unchanged."""
        return (tensor,)


class Transposed(Form):
    """[O, I] here is [I, O] there: GPT-2's ``Conv1D``."""

    def foreign_shapes(self, shape: Shape) -> tuple[Shape, ...]:
        """Rows and columns swapped."""
        return (shape[::-1],)

    def to_megalm(self, parts: Sequence[Tensor]) -> Tensor:
        """Swap rows and columns."""
        return parts[0].t().contiguous()

    def to_foreign(self, tensor: Tensor) -> tuple[Tensor, ...]:
        """Swap rows and columns."""
        return (tensor.t().contiguous(),)


@dataclass(frozen=True)
class Fused(Form):
    """Rows of several foreign tensors, one after the other; ``sizes`` are their numbers of rows."""

    sizes: tuple[int, ...]

    def foreign_shapes(self, shape: Shape) -> tuple[Shape, ...]:
        """One per size."""
        return tuple((size, *shape[1:]) for size in self.sizes)

    def to_megalm(self, parts: Sequence[Tensor]) -> Tensor:
        """Concatenate along dim 0."""
        return torch.cat(tuple(parts))

    def to_foreign(self, tensor: Tensor) -> tuple[Tensor, ...]:
        """Split along dim 0."""
        return tuple(tensor.split(self.sizes))


@dataclass(frozen=True)
class GroupedHeads(Form):
    """Query, key and value rows by group of heads: [K, (N/K query heads, 1 key head, 1 value head), D, …] there.

    Here they are [all query heads | all key heads | all value heads]. GPT-NeoX and Megatron-LM store them so; with as
    many key/value heads as query heads it is [N, (query, key, value), D, …].
    """

    heads: int
    kv_heads: int
    head_dim: int

    def foreign_shapes(self, shape: Shape) -> tuple[Shape, ...]:
        """The same shape: rows in another order."""
        return (shape,)

    def to_megalm(self, parts: Sequence[Tensor]) -> Tensor:
        """Rows grouped by key/value head ▶ [all query heads | all key heads | all value heads]."""
        per_group = self.heads // self.kv_heads
        grouped = parts[0].unflatten(0, (self.kv_heads, per_group + 2, self.head_dim))
        pieces = (grouped[:, :per_group], grouped[:, per_group : per_group + 1], grouped[:, per_group + 1 :])
        return torch.cat([piece.flatten(0, 2) for piece in pieces])

    def to_foreign(self, tensor: Tensor) -> tuple[Tensor, ...]:
        """[all query heads | all key heads | all value heads] ▶ rows grouped by key/value head."""
        kv = self.kv_heads * self.head_dim
        query, key, value = tensor.split((self.heads * self.head_dim, kv, kv))
        grouped = [part.unflatten(0, (self.kv_heads, -1, self.head_dim)) for part in (query, key, value)]
        return (torch.cat(grouped, dim=1).flatten(0, 2),)


@dataclass(frozen=True)
class Rule:
    """One megalm tensor, by name, and the foreign tensors that hold it.

    Attributes:
        name: megalm's.
        foreign: names in the other format, in the order of the form's parts.
        form: how elements are arranged in the other format.
    """

    name: str
    foreign: tuple[str, ...]
    form: Form = Plain()  # noqa: RUF009 - it has no state


def missing_and_extra(
    rules: Sequence[Rule], shapes: dict[str, Shape], present: dict[str, Shape], *, ignored: Collection[str] = ()
) -> list[str]:
    """What does not fit between a model and foreign tensors: missing, unexpected, or of another shape; one line each.

    Args:
        rules: of the format.
        shapes: of the model's full tensors, by megalm's names.
        present: of the foreign tensors that a file holds, by its names.
        ignored: foreign names that may be there and mean nothing, such as buffers.
    """
    ignored = frozenset(ignored)
    wanted = {
        foreign: shape
        for rule in rules
        for foreign, shape in zip(rule.foreign, rule.form.foreign_shapes(shapes[rule.name]), strict=True)
    }
    lines = [f"{name}: missing" for name in wanted if name not in present]
    lines += [
        f"{name}: shape {list(present[name])}, expected {list(shape)}"
        for name, shape in wanted.items()
        if name in present and present[name] != shape
    ]
    lines += [f"{name}: not a tensor of this model" for name in present if name not in wanted and name not in ignored]
    return lines
