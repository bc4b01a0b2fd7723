"""Where the tokens of an activation come from: what rotary angles, attention masks and dropout masks depend on."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor

from megalm.core.documents import Documents


class Attention(Protocol):
    """What a memory needs of a layer's attention core, which is ``attention/attend.py``.

    Attributes:
        window: attention window in tokens; 0: full attention.
    """

    window: int

    def __call__(self, query: Tensor, key: Tensor, value: Tensor, heads: Tensor, samples: None) -> Any:
        """[B, N, S, D], [B, K, S, D] twice ▶ [B, N, S, D]."""


class Memory(Protocol):
    """Keys and values of earlier tokens; see ``attention/cache.py``."""

    def attend(self, layer: int, core: Attention, query: Tensor, key: Tensor, value: Tensor, heads: Tensor) -> Tensor:
        """Store what a pass adds, and attend to it and to what is stored: [B, N, S, D] ▶ [B, N, S, D]."""


@dataclass(frozen=True)
class Place:
    """Positions and samples of a micro-batch on one context-parallel rank; the same for all of its layers.

    Attributes:
        positions: [S] int64, the place of each of this rank's tokens in the whole sequence. S is the rank's share under
            context parallelism; sequence parallelism splits activations further, not this. [B, S] where rows differ, in
            generation.
        samples: [B] int64, global number of each sample, the key of its dropout masks; None: no dropout (evaluation).
        documents: where documents begin, which attention does not look past; None: each row is one document.
        memory: what earlier passes of a generation have stored; None: a pass has whole sequences.
        window_masks: flex attention's block mask by attention window; of a window that is not there, a dense mask.
    """

    positions: Tensor
    samples: Tensor | None = None
    documents: Documents | None = None
    memory: Memory | None = None
    window_masks: Mapping[int, Any] = field(default_factory=dict)

    @property
    def within_documents(self) -> Tensor:
        """The place of each token in its document, which position embeddings are of: [S], or [B, S]."""
        return self.positions if self.documents is None else self.documents.within

    @classmethod
    def from_start(cls, length: int, device: torch.device | str = "cpu") -> Place:
        """A whole sequence of ``length`` tokens, without dropout."""
        return cls(torch.arange(length, device=device))
