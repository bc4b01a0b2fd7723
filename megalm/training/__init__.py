"""Training: the loop, what hangs on it, and what a finished run leaves behind."""
