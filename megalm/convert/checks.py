"""Checks that every reader makes of a model described by someone else's files, and the comparison of tensors."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from megalm.config.check import violations
from megalm.config.schema import Config, Data, Model, Objective, Optim, Run, Train
from megalm.errors import CheckpointError
from megalm.models.counts import parameter_count

_MOST_LINES = 12
_INTEGERS = {2: torch.int16, 4: torch.int32, 8: torch.int64}


def config_around(model: Model, *, name: str = "model") -> Config:
    """A minimal valid config around a model."""
    return Config(
        run=Run(name=name),
        model=model,
        objective=Objective(name="clm" if model.causal else "mlm"),
        data=Data(path=("data/none",)),
        optim=Optim(lr=1e-4),
        train=Train(steps=1, micro_batch_size=1, global_batch_size=1),
    )


def check_architecture(path: Path, model: Model) -> None:
    """Refuse a model that no config of megalm could describe: heads that do not divide, numbers out of range.

    Raises:
        CheckpointError: naming every field and what is wrong with it.
    """
    if lines := violations(config_around(model), 1):
        raise CheckpointError("\n".join(f"{path}: {line}" for line in lines))


def check_size(path: Path, model: Model, elements: int, tensors: int) -> None:
    """Refuse a model that is far larger than what is stored, before anything is made of its size.

    Raises:
        CheckpointError: the description does not belong to the tensors.
    """
    expected = parameter_count(model).total
    if expected > 2 * elements + 2**20 or model.num_layers > tensors:
        raise CheckpointError(
            f"{path}: describes {model.num_layers:,} layers and {expected:,} parameters, and the tensors beside it are "
            f"{tensors:,} with {elements:,} elements; it belongs to another model"
        )


def some_of(lines: Sequence[str], start: str = "") -> str:
    """The first lines of a long list, then how many more there are."""
    shown = [start + line for line in lines[:_MOST_LINES]]
    if len(lines) > _MOST_LINES:
        shown.append(f"{start}and {len(lines) - _MOST_LINES} more")
    return "\n".join(shown)


def same_values(one: Tensor, other: Tensor) -> bool:
    """Whether two tensors have the same dtype, shape and bits; all NaNs count as equal."""
    if one.dtype != other.dtype or one.shape != other.shape:
        return False
    integers = _INTEGERS[one.dtype.itemsize]
    if torch.equal(one.contiguous().view(integers), other.contiguous().view(integers)):
        return True
    # Casting to a longer dtype and back keeps every number's bits, but not those of a NaN.
    unequal = one.contiguous().view(integers) != other.contiguous().view(integers)
    return bool((one[unequal].isnan() & other[unequal].isnan()).all())


def is_finite(tensor: Tensor) -> bool:
    """Whether every element is finite; allocates nothing."""
    if not tensor.numel():
        return True
    low, high = torch.aminmax(tensor)
    return bool(torch.isfinite(low) & torch.isfinite(high))
