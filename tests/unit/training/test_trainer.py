"""When training gives up."""

from __future__ import annotations

import math

import pytest

from megalm.training.trainer import divergence


@pytest.mark.parametrize(
    ("loss", "grad_norm", "loss_scale", "gives_up"),
    [
        (2.0, 1.0, None, False),
        (math.nan, 1.0, None, True),
        (2.0, math.inf, None, True),
        (2.0, math.nan, 65536.0, False),  # fp16: the step is skipped
        (2.0, math.nan, 1.0, True),  # no scale is left to lower
        (math.nan, math.nan, 65536.0, True),
    ],
)
def test_what_is_not_finite_ends_a_run_unless_fp16_can_skip_it(
    make_step, loss: float, grad_norm: float, loss_scale: float | None, gives_up: bool
) -> None:
    row = make_step(7, loss=loss, grad_norm=grad_norm, loss_scale=loss_scale)
    error = divergence(row)
    assert (error is not None) == gives_up
    assert error is None or str(error).startswith("step 7: loss")
