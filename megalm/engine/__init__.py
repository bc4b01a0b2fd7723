"""DeepSpeed ZeRO, the optimizer and its learning rate."""
