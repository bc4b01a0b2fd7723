"""Megatron-LM's checkpoints in the classic layout of one file per rank: read and written."""
