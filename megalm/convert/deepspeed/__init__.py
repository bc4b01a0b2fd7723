"""DeepSpeed's checkpoints: read."""
