"""The sum of squares behind the gradient norm, against fp64."""

from __future__ import annotations

import math

import pytest
import torch

from megalm.core.sums import BLOCK, sum_of_squares

MILLIONS = 4_000_003
"""Where ``vector_norm`` on the CPU is 7e-5 off, and no multiple of a block."""


def exact(values: torch.Tensor) -> float:
    return float(values.double().square().sum().sqrt())


def relative_error(values: torch.Tensor) -> float:
    return abs(float(sum_of_squares(values).sqrt()) / exact(values) - 1.0)


def test_the_norm_of_millions_of_elements_has_the_digits_of_fp32() -> None:
    values = torch.randn(MILLIONS, generator=torch.Generator().manual_seed(0)) * 1e-3
    assert relative_error(values) < 2e-8
    assert abs(float(torch.linalg.vector_norm(values)) / exact(values) - 1.0) > 1e-5, "what this is for"


def test_rounding_that_always_goes_one_way_stays_below_a_millionth() -> None:
    for value in (0.1, 1 / 3, 1e-3, 0.7, 123.456):
        assert relative_error(torch.full((MILLIONS,), value)) < 1e-6


def test_any_cut_gives_the_same_norm_to_the_last_digit_of_fp32() -> None:
    values = torch.randn(1_000_000, generator=torch.Generator().manual_seed(1))
    whole = float(sum_of_squares(values))
    for pieces in (2, 3, 7, 1000):
        assert float(sum(sum_of_squares(piece) for piece in values.chunk(pieces))) == pytest.approx(whole, rel=5e-8)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
@pytest.mark.parametrize("size", [0, 1, BLOCK - 1, BLOCK, BLOCK + 1, 100_000])
def test_every_format_and_size(dtype: torch.dtype, size: int) -> None:
    values = torch.randn(size, generator=torch.Generator().manual_seed(2)).to(dtype)
    total = sum_of_squares(values)
    assert total.dtype == torch.float64
    assert total.shape == ()
    assert float(total) == pytest.approx(float(values.double().square().sum()), rel=3e-7)


def test_shapes_and_strides_do_not_matter() -> None:
    values = torch.randn(300, 500, generator=torch.Generator().manual_seed(3))
    assert float(sum_of_squares(values.t())) == pytest.approx(float(values.double().square().sum()), rel=3e-7)


def test_what_is_not_finite_shows() -> None:
    values = torch.zeros(1000)
    values[777] = math.inf
    assert math.isinf(float(sum_of_squares(values)))
    values[3] = math.nan
    assert math.isnan(float(sum_of_squares(values)))


def test_pieces_are_summed_as_one_tensor() -> None:
    values = torch.randn(5_000, generator=torch.Generator().manual_seed(4))
    whole = float(sum_of_squares(values))
    for edges in ((100,), (0, 3, 5), (256, 512), (1, 255, 257, 511, 513, 4_999, 5_000), tuple(range(0, 5_000, 7))):
        pieces = values.tensor_split(edges)
        assert float(sum_of_squares(*pieces)) == pytest.approx(whole, rel=1e-15)
    apart = torch.cat((values[:100], torch.zeros(50), values[100:]))
    assert float(sum_of_squares(apart)) != pytest.approx(whole, rel=1e-12), "zeros between move the blocks"
