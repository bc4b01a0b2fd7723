"""How much of the data is read contiguously: sizes of blocks, streams and windows, where the config leaves them open.

Single sequences are shuffled best and read worst: a batch of B sequences is B reads at B places. That is nothing to a
disk of one's own and a storm on a file system that a thousand ranks share. So a run that begins on many ranks reads
whole blocks, unless its config says otherwise; it keeps its order for good, however many ranks it has later. No torch.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any

from megalm.config.schema import Data

MOST_RANKS_OF_SINGLES = 64
"""A run that begins on more ranks reads blocks."""


@dataclass(frozen=True)
class Blocks:
    """The sizes that decide an order; see :class:`megalm.data.stream.order.SampleOrder`."""

    block_sequences: int = 1
    lanes: int = 1
    window_blocks: int = 1

    @classmethod
    def of(cls, settings: Data) -> Blocks:
        """Those of a config; what it leaves open is 1."""
        return cls(settings.block_sequences or 1, settings.lanes or 1, settings.window_blocks or 1)

    @classmethod
    def of_fingerprint(cls, fingerprint: Mapping[str, Any]) -> Blocks:
        """Those that a checkpoint's phase was read with."""
        return cls(*(int(fingerprint[f"data.{name}"]) for name in cls.__dataclass_fields__))

    def into(self, settings: Data) -> Data:
        """The settings with these where they leave them open."""
        return replace(settings, **{k: v for k, v in asdict(self).items() if getattr(settings, k) is None})

    def __str__(self) -> str:
        return " ".join(f"data.{name}={value}" for name, value in asdict(self).items())


SINGLES = Blocks()
LONG_READS = Blocks(64, 4, 32)
"""As ``conf/data/blocks.yaml``."""


def is_open(settings: Data) -> bool:
    """Whether a config says nothing of blocks."""
    return all(getattr(settings, name) is None for name in Blocks.__dataclass_fields__)
