"""Tensor- and pipeline-parallel Transformer layers, importable alone."""
