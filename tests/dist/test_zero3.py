"""ZeRO-3 is DeepSpeed's: what it does to a process beyond its own engine."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from harness import run_ranks_on_each
from parity import Layout

NAMESPACES = {
    "torch": torch,
    "torch.nn.functional": torch.nn.functional,
    "torch.nn.Module": torch.nn.Module,
    "torch.Tensor": torch.Tensor,
    "torch.distributed": torch.distributed,
}


def _functions() -> dict[str, Any]:
    return {
        f"{name}.{key}": value
        for name, namespace in NAMESPACES.items()
        for key, value in vars(namespace).items()
        if callable(value)
    }


def functions_replaced(layout: Layout) -> list[str]:
    """Functions of torch that are others after an engine has been made and has trained."""
    from megalm.verify.parity import train_on_layout

    before = _functions()
    train_on_layout(layout.config(), layout.topology)
    after = _functions()
    return sorted(name for name, function in before.items() if after.get(name) is not function)


@pytest.mark.parametrize("zero_stage", [1, 3])
def test_what_a_process_computes_later_is_computed_by_torch(zero_stage: int) -> None:
    """With DeepSpeed's F.linear a second engine had other bits than the first."""
    ((one, other),) = run_ranks_on_each(2, functions_replaced, [Layout(dp=2, zero_stage=zero_stage)])
    assert one == other == []
