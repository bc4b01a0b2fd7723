"""What follows a training run, on rank 0: the record, the console, and other loggers. One small file each."""
