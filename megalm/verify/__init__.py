"""Proof that a layout trains like one process, on a config shrunk to CPU size: ``megalm verify``."""
