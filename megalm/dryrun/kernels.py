"""What an operation costs a device: floating-point operations, a kernel, bytes read and written.

FLOPs are those of matrix products and of attention, counted by torch's own formulas (``torch.utils.flop_counter``): a
product [m, k] · [k, n] has 2·m·k·n, and causal attention counts like attention without a mask, as Korthikanti et al.
2022 and Narayanan et al. 2021 count it.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from functools import cache
from math import prod
from typing import Any

import torch
from torch import Tensor
from torch._ops import OpOverload
from torch.utils._pytree import tree_iter
from torch.utils.flop_counter import flop_registry, sdpa_backward_flop_count, sdpa_flop_count

MATMUL, ATTENTION, MEMORY_BOUND = "matmul", "attention", "memory_bound"

_CREATES = {"empty", "empty_like", "new_empty", "empty_strided", "new_empty_strided"}
"""Operations that reserve memory and launch nothing."""

_FACTORS = {"mm": slice(0, 2), "bmm": slice(0, 2), "addmm": slice(1, 3), "baddbmm": slice(1, 3)}
"""Which arguments a product multiplies. torch's formulas know neither products in place (``addmm_``) nor those into
another dtype."""


@dataclass(frozen=True)
class Cost:
    """Of one operation.

    Attributes:
        kind: ``matmul``, ``attention`` or ``memory_bound``.
        flops: floating-point operations of a product or of attention, else 0.
        nbytes: read and written, each tensor once; a broadcast one as often as it is stored.
    """

    kind: str
    flops: int
    nbytes: int


def cost_of(operation: OpOverload, args: tuple[Any, ...], kwargs: dict[str, Any], result: Any) -> Cost | None:
    """The cost of an operation that was executed; None where it launches no kernel (a view, an allocation)."""
    if _is_free(operation):
        return None
    packet = operation._overloadpacket
    flops = _flops(packet, args, kwargs, result)
    read, written = _tensors((args, kwargs)), _tensors(result)
    if not flops and all(_is_view_of_any(t, read) for t in written) and not operation._schema.is_mutable:
        return None  # a reshape that found nothing to copy, or a question (is_pinned) whose answer is no tensor
    seen: dict[tuple[Any, Any], int] = {}
    for tensor in [*read, *written]:
        seen[tensor.untyped_storage()._cdata, tensor.storage_offset()] = _nbytes(tensor)
    nbytes = sum(seen.values())
    if operation._schema.is_mutable:  # what is changed in place is read and written
        nbytes += sum(_nbytes(t) for t in written)
    kind = MEMORY_BOUND
    if flops:
        kind = ATTENTION if "attention" in packet.__name__ else MATMUL
    return Cost(kind, flops, nbytes)


@cache
def _is_free(operation: OpOverload) -> bool:
    name = operation._schema.name.split("::")[1]
    if operation.namespace == "prim" or name in _CREATES or name in ("detach", "lift_fresh", "_local_scalar_dense"):
        return True
    return operation.is_view


def _flops(packet: Any, args: tuple[Any, ...], kwargs: dict[str, Any], result: Any) -> int:
    factors = _FACTORS.get(packet.__name__.removesuffix("_"))
    if factors is not None:
        left, right = args[factors]
        return 2 * prod(left.shape) * int(right.shape[-1])
    if packet in flop_registry:
        return int(flop_registry[packet](*args, **kwargs, out_val=result))
    # The CPU's flash attention, which stands for CUDA's: torch 2.13 counts CUDA's alone.
    if packet is torch.ops.aten._scaled_dot_product_flash_attention_for_cpu:
        return int(sdpa_flop_count(args[0].shape, args[1].shape, args[2].shape))
    if packet is torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward:
        return int(sdpa_backward_flop_count(args[0].shape, args[1].shape, args[2].shape, args[3].shape))
    return 0


def _tensors(tree: Any) -> list[Tensor]:
    return [leaf for leaf in tree_iter(tree) if isinstance(leaf, Tensor)]


def _is_view_of_any(tensor: Tensor, others: Iterable[Tensor]) -> bool:
    storage = tensor.untyped_storage()._cdata
    return any(other.untyped_storage()._cdata == storage for other in others)


def _nbytes(tensor: Tensor) -> int:
    """Bytes of the elements that a tensor has in memory: an expanded dim repeats them."""
    sizes = (size for size, stride in zip(tensor.shape, tensor.stride(), strict=True) if stride)
    return prod(sizes) * tensor.element_size()
