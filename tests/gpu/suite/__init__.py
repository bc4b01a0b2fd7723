"""What a first GPU is to show: parity with the CPU, runs of the command line, and speed; see ``tests/gpu/run.py``."""
