"""The real step of one rank of any job, executed on this machine with tensors that have no values.

The same engine, runner, buckets and optimizer run as on the GPUs, under torch's fake tensors and its fake process
group. What they allocate, compute, send and wait for is recorded: see :mod:`megalm.dryrun.tracer`.
"""
