"""Environment variables by which CUDA and NCCL let transfers and collectives run beside computation. No torch.

They must be set before CUDA starts. Neither changes a number.
"""

from __future__ import annotations

from collections.abc import MutableMapping

DEFAULTS = {
    # Hardware queues of a device; CUDA's default is 8. Streams that share one wait for each other although nothing
    # makes them, and a rank has more than eight: its computation, up to four links of the pipeline, and a stream for
    # each other group. 1, which Megatron-LM sets to have collectives begin in the order of their calls, would put a
    # posted receive before the computation that it is to hide behind.
    "CUDA_DEVICE_MAX_CONNECTIONS": "32",
    # The thread blocks of NCCL's kernels are scheduled before those of a product that is also waiting for a place, so
    # a collective begins while the product runs, and not after it.
    "TORCH_NCCL_HIGH_PRIORITY": "1",
}
"""Names and values that a rank sets whose communication is to run during its work, where the user has not."""


def set_defaults(environment: MutableMapping[str, str]) -> None:
    """Set what is not set."""
    for name, value in DEFAULTS.items():
        environment.setdefault(name, value)
