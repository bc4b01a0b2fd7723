"""Dropout (Srivastava et al. 2014) whose masks are a pure function of seed, layer, site, sample and position.

Whether an element is kept is a hash of (seed, site, layer, sample, position, feature), not the next number of a
generator. So the same element is dropped on every layout, in a recomputed forward, and after a resume, and no state has
to be saved, restored or kept apart between ranks.

The hash is a chain of 32-bit mixing steps in integer arithmetic that wraps, the same on every device: about ten
elementwise operations, which ``torch.compile`` fuses into one.

Shapes: B batch, S sequence, H hidden, N heads.
"""

from __future__ import annotations

import hashlib

import torch
from torch import Tensor, nn

from megalm.core.place import Place

_BITS = 32
_HALF = 1 << (_BITS - 1)


class Dropout(nn.Module):
    """Dropout of an activation.

    Identity in evaluation, with probability 0, and where the place names no samples.

    Args:
        probability: share that is zeroed.
        seed: of the run.
        layer: number of the block in the whole model.
        site: name of the place in the block.
    """

    key: Tensor

    def __init__(self, probability: float, *, seed: int, layer: int, site: str) -> None:
        super().__init__()
        self.probability = probability
        # A tensor, so that layers differ in data and not in code, and one compiled graph serves them all.
        self.register_buffer("key", torch.tensor(stream_key(seed, layer, site), dtype=torch.int32), persistent=False)

    def forward(self, x: Tensor, place: Place, positions: Tensor) -> Tensor:
        """[B, S, H] ▶ [B, S, H]; ``positions`` [S] are those of x's rows, which may be a part of the place's."""
        if not self.drops(place):
            return x
        assert place.samples is not None
        rows = _mix(_samples(self.key, place.samples)[:, None] ^ _int32(positions)[None, :])  # [B, S]
        features = torch.arange(x.shape[-1], dtype=torch.int32, device=x.device)
        keep = _keeps(_mix(rows[..., None] ^ _spread(features)), self.probability)
        return x * keep * (1.0 / (1.0 - self.probability))

    def drops(self, place: Place) -> bool:
        """Whether anything is dropped."""
        return self.probability > 0.0 and self.training and place.samples is not None

    def extra_repr(self) -> str:
        """The probability."""
        return f"{self.probability}"


def attention_keep_mask(
    probability: float, key: Tensor, samples: Tensor, heads: Tensor, query_positions: Tensor, key_positions: Tensor
) -> Tensor:
    """Which attention probabilities are kept.

    Args:
        probability: share that is dropped.
        key: of the layer, from :func:`stream_key`, as an int32 scalar.
        samples: [B], global numbers of the samples.
        heads: [N], numbers of the heads in the whole model.
        query_positions: [Q], places of the queries in the whole sequence.
        key_positions: [K], places of the keys.

    Returns:
        [B, N, Q, K] bool.
    """
    by_head = _mix(_samples(key, samples)[:, None] ^ _spread(_int32(heads))[None, :])  # [B, N]
    rows = _mix(by_head[..., None] ^ _int32(query_positions))  # [B, N, Q]
    return _keeps(_mix(rows[..., None] ^ _spread(_int32(key_positions))), probability)


def stream_key(seed: int, layer: int, site: str) -> int:
    """32 bits that set one site's masks apart from all others', as a signed integer."""
    digest = hashlib.blake2b(f"dropout/{seed}/{layer}/{site}".encode(), digest_size=4).digest()
    return int.from_bytes(digest, "little", signed=True)


def _samples(key: Tensor, samples: Tensor) -> Tensor:
    """[B] keys of samples; their numbers may exceed 32 bits."""
    return _mix(_mix(_int32(samples) ^ key) ^ _spread(_int32(samples >> _BITS)))


def _int32(numbers: Tensor) -> Tensor:
    """The low 32 bits."""
    low = numbers.to(torch.int64) & 0xFFFFFFFF
    return torch.where(low >= _HALF, low - 2 * _HALF, low).to(torch.int32)


def _spread(numbers: Tensor) -> Tensor:
    """Neighbouring numbers far apart: the odd multiplier is 2³² divided by the golden ratio (Knuth, volume 3)."""
    return numbers * -1640531527


def _mix(x: Tensor) -> Tensor:
    """A bijection of 32 bits in which every bit of the input changes about half the bits of the output.

    Two rounds of shift-xor and an odd multiplier; the multipliers are MurmurHash3's finaliser (Appleby 2011).
    """
    x = (x ^ ((x >> 16) & 0xFFFF)) * -2048144789
    x = (x ^ ((x >> 13) & 0x7FFFF)) * -1028477387
    return x ^ ((x >> 16) & 0xFFFF)


def _keeps(random_bits: Tensor, probability: float) -> Tensor:
    return random_bits >= int(probability * 2 * _HALF) - _HALF
