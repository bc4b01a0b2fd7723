"""Weight gradients that add to an fp32 sum by themselves, against those that autograd adds up."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from megalm.core.embedding import VocabParallelEmbedding
from megalm.core.linear import (
    ColumnParallelLinear,
    RowParallelLinear,
    hand_over_weight_gradients,
    postpone_weight_gradients,
)
from megalm.core.loss import output_loss, sequence_log_probabilities
from megalm.core.tensor_parallel import TensorParallel
from megalm.core.weight_gradients import WeightGradients, add_product


class Sums:
    """A sink that keeps its sums by parameter, and counts what comes."""

    def __init__(self) -> None:
        self.sums: dict[nn.Parameter, Tensor] = {}
        self.calls: list[str] = []

    def add(self, parameter: nn.Parameter, gradient: Tensor, *, factor: Tensor | None = None) -> None:
        self.calls.append("add")
        gradient = gradient.float() if factor is None else gradient.float() * factor
        self.sums[parameter] = self.sums.get(parameter, 0) + gradient

    def add_product(self, parameter: nn.Parameter, gradients: Tensor, inputs: Tensor) -> None:
        self.calls.append("product")
        is_first = parameter not in self.sums
        total = self.sums.setdefault(parameter, torch.full(parameter.shape, float("nan")))
        add_product(total, gradients, inputs, replace=is_first)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_a_product_takes_a_place_or_adds_to_it_in_fp32(dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    gradients, inputs = (torch.randn(300, n, generator=generator).to(dtype) for n in (5, 7))
    exact = gradients.double().t() @ inputs.double()
    whole = torch.full((40,), float("nan"))
    total = whole[3:38].view(5, 7)  # a parameter's place in a bucket
    add_product(total, gradients, inputs, replace=True)
    torch.testing.assert_close(total.double(), exact, rtol=0, atol=1e-4)
    add_product(total, gradients, inputs, replace=False)
    torch.testing.assert_close(total.double(), 2 * exact, rtol=0, atol=2e-4)
    assert whole.isnan().sum() == 5, "nothing else"
    if dtype != torch.float32:
        assert (total - (2 * (gradients.t() @ inputs)).float()).abs().max() > 1e-3, "a 16-bit product is rounded"


LAYERS: dict[str, Callable[[], nn.Module]] = {
    "column": lambda: ColumnParallelLinear(6, (4, 2), tensor_parallel=TensorParallel(), std=1.0, bias=True),
    "row": lambda: RowParallelLinear(6, 6, tensor_parallel=TensorParallel(), std=1.0, bias=True),
}


def made(kind: str) -> nn.Module:
    layer = LAYERS[kind]()
    for number, parameter in enumerate(layer.parameters()):
        nn.init.normal_(parameter, generator=torch.Generator().manual_seed(number))
    return layer


@pytest.mark.parametrize("kind", list(LAYERS))
@pytest.mark.parametrize("compiled", [False, True])
def test_a_layer_adds_to_the_sums_what_autograd_would(kind: str, compiled: bool) -> None:
    layer, x = made(kind), torch.randn(2, 3, 6, requires_grad=True)

    def step(x: Tensor) -> Tensor:
        return (layer(x * 2).relu() ** 2).sum()

    step(x).backward()
    want = {p: p.grad for p in layer.parameters()}
    want_input, x.grad = x.grad, None
    layer.zero_grad()
    sums, weight_gradients = Sums(), WeightGradients()
    hand_over_weight_gradients(layer, weight_gradients)
    weight_gradients.accumulate_into(sums)
    run = torch.compile(step, backend="aot_eager") if compiled else step
    for _ in range(2):
        run(x).backward()
    torch.testing.assert_close(x.grad, 2 * want_input)
    for parameter, gradient in want.items():
        assert parameter.grad is None
        torch.testing.assert_close(sums.sums[parameter], 2 * gradient)
    assert sorted(sums.calls) == ["add", "add", "product", "product"]


@pytest.mark.parametrize("kind", list(LAYERS))
def test_a_postponed_product_adds_when_its_time_comes(kind: str) -> None:
    layer, sums, weight_gradients = made(kind), Sums(), WeightGradients()
    x = torch.randn(2, 3, 6, requires_grad=True)
    layer(x).square().sum().backward()
    want = layer.weight.grad
    layer.zero_grad()
    postpone_weight_gradients(layer, weight_gradients)
    weight_gradients.accumulate_into(sums)
    with weight_gradients.record("stage"):
        layer(x).square().sum().backward()
    assert layer.weight not in sums.sums
    assert list(weight_gradients.compute("stage")) == [], "nothing is left for the runner to add"
    torch.testing.assert_close(sums.sums[layer.weight], want)


def test_what_is_frozen_adds_nothing() -> None:
    layer, sums, weight_gradients = made("column").requires_grad_(False), Sums(), WeightGradients()
    hand_over_weight_gradients(layer, weight_gradients)
    weight_gradients.accumulate_into(sums)
    layer(torch.randn(2, 3, 6, requires_grad=True)).sum().backward()
    assert sums.calls == []


def output(dtype: torch.dtype) -> tuple[VocabParallelEmbedding, Tensor, nn.Parameter, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    words = VocabParallelEmbedding(23, 8, tensor_parallel=TensorParallel(), std=1.0)
    nn.init.normal_(words.weight, generator=generator)
    x = torch.randn(2, 9, 8, generator=generator).to(dtype).requires_grad_()
    bias = nn.Parameter(torch.randn(23, generator=generator).to(dtype))
    labels = torch.randint(0, 23, (2, 9), generator=generator)
    return words.to(dtype), x, bias, labels, torch.rand(2, 9, generator=generator) / 18


LOSSES = {
    "tokens": lambda x, words, labels, factors, bias: (
        0.5 * output_loss(x, words, labels, factors, chunk_tokens=4, z_loss=1e-2, bias=bias).sum()
    ),
    "sequences": lambda x, words, labels, factors, bias: (
        sequence_log_probabilities(x, words, labels, factors, chunk_tokens=4, bias=bias) * torch.tensor([0.3, -2.0])
    ).sum(),
}


@pytest.mark.parametrize("loss", list(LOSSES))
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_the_output_projection_adds_what_autograd_would_with_all_factors(dtype: torch.dtype, loss: str) -> None:
    words, x, bias, labels, factors = output(dtype)
    scale = 512.0 if dtype == torch.float16 else 1.0
    exact_words, exact_x, exact_bias, *_ = output(torch.float64)
    with torch.no_grad():  # the same values as in 16 bits
        for exact, rounded in ((exact_words.weight, words.weight), (exact_x, x), (exact_bias, bias)):
            exact.copy_(rounded)
    (LOSSES[loss](exact_x, exact_words, labels, factors.double(), exact_bias) * scale).backward()
    sums, weight_gradients = Sums(), WeightGradients()
    hand_over_weight_gradients(words, weight_gradients)
    weight_gradients.accumulate_into(sums)
    (LOSSES[loss](x, words, labels, factors, bias) * scale).backward()
    assert words.weight.grad is None and bias.grad is None
    tolerance = 1e-5 if dtype == torch.float32 else 2e-2
    for parameter, exact in ((words.weight, exact_words.weight.grad), (bias, exact_bias.grad)):
        found = sums.sums[parameter]
        assert found.dtype == torch.float32
        assert float((found - exact).norm() / exact.norm()) < tolerance
    assert float((x.grad - exact_x.grad).norm() / exact_x.grad.norm()) < tolerance


def test_the_output_projection_of_a_frozen_embedding_adds_nothing() -> None:
    words, x, _, labels, factors = output(torch.float32)
    words.requires_grad_(False)
    sums, weight_gradients = Sums(), WeightGradients()
    hand_over_weight_gradients(words, weight_gradients)
    weight_gradients.accumulate_into(sums)
    output_loss(x, words, labels, factors, chunk_tokens=4).sum().backward()
    assert sums.calls == [] and x.grad is not None
