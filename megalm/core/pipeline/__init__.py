"""Pipeline parallelism: split of layers, schedules as data, transfers, and the runner."""
