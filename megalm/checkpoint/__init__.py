"""Checkpoints: global tensors in pieces, written by any layout, read by any other."""
