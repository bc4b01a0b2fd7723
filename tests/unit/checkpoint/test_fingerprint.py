"""The hash of parameters against its definition, an element at a time in Python's integers."""

from __future__ import annotations

import hashlib

import pytest
import torch

from megalm.checkpoint import fingerprint as module
from megalm.checkpoint.fingerprint import fingerprint
from megalm.mesh.slices import ShardSpec


def _by_definition(name: str, values: torch.Tensor, start: int = 0) -> int:
    seed = int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "little")
    total = 0
    for place, bits in enumerate(values.flatten().view(torch.int32).tolist(), start):
        x = _signed(place * 0x9E3779B97F4A7C15 + bits + seed)
        x = _signed((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9)
        total += x ^ (x >> 27)
    return total % 2**64


def _signed(number: int) -> int:
    return (number + 2**63) % 2**64 - 2**63


@pytest.mark.parametrize("chunk", [4, 16, 1 << 16])
@pytest.mark.parametrize("shape", [(1,), (37,), (5, 7), (7, 5, 3), (2, 40)])
def test_whole_tensors_in_any_blocks(monkeypatch: pytest.MonkeyPatch, chunk: int, shape: tuple[int, ...]) -> None:
    monkeypatch.setattr(module, "_CHUNK", chunk)
    values = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    flat = values.flatten()
    expected = _by_definition("a", values)
    assert fingerprint("a", ShardSpec.replicated(*shape), 0, flat) == expected
    middle = len(flat) // 3
    shares = [
        fingerprint("a", ShardSpec.replicated(*shape), at, part)
        for at, part in ((0, flat[:middle]), (middle, flat[middle:]))
    ]
    assert sum(shares) % 2**64 == expected


@pytest.mark.parametrize("chunk", [4, 16, 1 << 16])
@pytest.mark.parametrize("dim", [0, 1])
def test_slices_add_up_to_the_whole(monkeypatch: pytest.MonkeyPatch, chunk: int, dim: int) -> None:
    monkeypatch.setattr(module, "_CHUNK", chunk)
    values = torch.randn(9, 22, generator=torch.Generator().manual_seed(0))
    shares = 0
    for start, stop in ((0, 4), (4, values.shape[dim])):
        part = values.narrow(dim, start, stop - start).reshape(-1)
        shares += fingerprint("w", ShardSpec.along((9, 22), dim, ((start, stop),)), 0, part)
    assert shares % 2**64 == _by_definition("w", values)
