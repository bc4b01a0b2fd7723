"""Megatron-LM's checkpoints, its classic layout of one file per rank: read and written."""

from __future__ import annotations

from megalm.checkpoint.adapters.megatron_read import open_source
from megalm.checkpoint.adapters.megatron_write import write_megatron

__all__ = ["open_source", "write_megatron"]
