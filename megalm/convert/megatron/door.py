"""Megatron-LM's checkpoints, its classic layout of one file per rank: the one door to reading and writing them.

What is behind it: ``megatron_args`` (the architecture), ``megatron_names`` (names and cuts), ``megatron_weights`` (full
tensors from ranks' parts, which DeepSpeed's files need too), ``megatron_read`` and ``megatron_write``.
"""

from __future__ import annotations

from megalm.convert.megatron.read import open_source
from megalm.convert.megatron.write import write_megatron

__all__ = ["open_source", "write_megatron"]
