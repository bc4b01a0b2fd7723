"""Models composed from the parallel core, and what they cost."""
