"""Measurements of megalm's speed and memory; ``tools/bench.py`` is their command."""
