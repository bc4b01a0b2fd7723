"""The MLP of a block, its inner width split over a tensor-parallel group.

Shapes: B batch, S sequence, H hidden, F inner width, T tensor-parallel degree.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

from torch import Tensor, nn
from torch.nn import functional as F

from megalm.core.linear import ColumnParallelLinear, RowParallelLinear
from megalm.core.tensor_parallel import TensorParallel


class GeluMLP(nn.Module):
    """Two linear layers around GELU (Hendrycks & Gimpel 2016): [B, S, H] ▶ [B, S, F/T] ▶ [B, S, H].

    ``approximate`` is torch's: ``tanh``, as GPT-2, or ``none``, as BERT.
    """

    def __init__(
        self,
        hidden_size: int,
        ffn_hidden_size: int,
        *,
        tensor_parallel: TensorParallel,
        std: float,
        projection_std: float,
        bias: bool,
        approximate: str,
    ) -> None:
        super().__init__()
        self.approximate = approximate
        self.up = ColumnParallelLinear(
            hidden_size, (ffn_hidden_size,), tensor_parallel=tensor_parallel, std=std, bias=bias
        )
        self.down = RowParallelLinear(
            ffn_hidden_size, hidden_size, tensor_parallel=tensor_parallel, std=projection_std, bias=bias
        )

    def forward(self, x: Tensor) -> Tensor:
        """[B, S, H] ▶ [B, S, H]."""
        y: Tensor = self.down(F.gelu(self.up(x), approximate=self.approximate))
        return y


class SwigluMLP(nn.Module):
    """``down(silu(gate x) · up x)`` (Shazeer 2020); gate and up are one column-parallel product."""

    def __init__(
        self,
        hidden_size: int,
        ffn_hidden_size: int,
        *,
        tensor_parallel: TensorParallel,
        std: float,
        projection_std: float,
        bias: bool,
    ) -> None:
        super().__init__()
        self.gate_up = ColumnParallelLinear(
            hidden_size, (ffn_hidden_size, ffn_hidden_size), tensor_parallel=tensor_parallel, std=std, bias=bias
        )
        self.down = RowParallelLinear(
            ffn_hidden_size, hidden_size, tensor_parallel=tensor_parallel, std=projection_std, bias=bias
        )

    def forward(self, x: Tensor) -> Tensor:
        """[B, S, H] ▶ [B, S, H]."""
        gate, up = self.gate_up(x).chunk(2, dim=-1)
        y: Tensor = self.down(F.silu(gate) * up)
        return y


def make_mlp(
    activation: str,
    hidden_size: int,
    ffn_hidden_size: int,
    *,
    tensor_parallel: TensorParallel,
    std: float,
    projection_std: float,
    bias: bool,
) -> GeluMLP | SwigluMLP:
    """The MLP that a config names: ``gelu``, ``gelu_erf`` or ``swiglu``."""
    if activation not in _MAKERS:
        raise ValueError(f"activation={activation!r}: {' or '.join(_MAKERS)}")
    return _MAKERS[activation](
        hidden_size, ffn_hidden_size, tensor_parallel=tensor_parallel, std=std, projection_std=projection_std, bias=bias
    )


_MAKERS: dict[str, Callable[..., GeluMLP | SwigluMLP]] = {
    "gelu": partial(GeluMLP, approximate="tanh"),
    "gelu_erf": partial(GeluMLP, approximate="none"),
    "swiglu": SwigluMLP,
}
