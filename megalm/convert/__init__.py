"""Conversion between megalm and other formats: each is a source or a target of named weights; see ``weights.py``."""
