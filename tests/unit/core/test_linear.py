"""What linear layers do in one process; over ranks: tests/dist/test_tensor_parallel.py."""

from __future__ import annotations

import pytest
import torch

from megalm.core.linear import ColumnParallelLinear, RowParallelLinear, postpone_weight_gradients
from megalm.core.tensor_parallel import TensorParallel
from megalm.core.weight_gradients import WeightGradients

KINDS = {
    "column": lambda tp: ColumnParallelLinear(6, (4, 2), tensor_parallel=tp, std=1.0, bias=True),
    "row": lambda tp: RowParallelLinear(6, 6, tensor_parallel=tp, std=1.0, bias=True),
}


@pytest.fixture(params=list(KINDS))
def kind(request) -> str:
    return request.param


def randomise(layer: torch.nn.Module) -> torch.nn.Module:
    for parameter in layer.parameters():
        torch.nn.init.normal_(parameter)
    return layer


def test_alone_it_is_one_graph_of_torch_operations(kind: str) -> None:
    layer = randomise(KINDS[kind](TensorParallel()))
    x = torch.randn(2, 3, 6)
    compiled = torch.compile(layer, backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(x), layer(x))


def test_compiled_around_it_still_postpones(kind: str) -> None:
    store = WeightGradients()
    layer = randomise(KINDS[kind](TensorParallel()))
    postpone_weight_gradients(layer, store)
    x = torch.randn(2, 3, 6, requires_grad=True)

    def step(x: torch.Tensor) -> torch.Tensor:
        return (layer(x * 2).relu() ** 2).sum()

    step(x).backward()
    want = layer.weight.grad.clone(), layer.bias.grad.clone(), x.grad.clone()
    layer.zero_grad()
    x.grad = None
    loss = torch.compile(step, backend="aot_eager")(x)
    with store.record("stage"):
        loss.backward()
    assert layer.weight.grad is None
    ((parameter, gradient),) = store.compute("stage")
    assert parameter is layer.weight
    for got, exact in zip((gradient, layer.bias.grad, x.grad), want, strict=True):
        torch.testing.assert_close(got, exact)


def test_recording_without_zero_bubble_postpones_nothing(kind: str) -> None:
    store = WeightGradients()
    layer = randomise(KINDS[kind](TensorParallel()))
    with store.record("stage"):
        layer(torch.randn(2, 3, 6)).sum().backward()
    assert layer.weight.grad is not None
    assert list(store.compute("stage")) == []


def test_frozen_weight_leaves_nothing_behind(kind: str) -> None:
    store = WeightGradients()
    layer = randomise(KINDS[kind](TensorParallel())).requires_grad_(False)
    postpone_weight_gradients(layer, store)
    x = torch.randn(2, 3, 6, requires_grad=True)
    with store.record("stage"):
        layer(x).sum().backward()
    assert list(store.compute("stage")) == []
    torch.testing.assert_close(x.grad, layer.weight.sum(0).expand_as(x))
