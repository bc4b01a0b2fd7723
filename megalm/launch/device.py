"""What ranks compute on; all on the same kind of device, or their collectives would not meet."""

from __future__ import annotations

from megalm.errors import ConfigError
from megalm.launch.discovery import RankInfo
from megalm.launch.rendezvous import Meeting


def choose_device(wanted: str, meeting: Meeting) -> tuple[str, str | None]:
    """The device of this rank, and a line for the user where the choice may surprise; collective over all ranks.

    Args:
        wanted: ``launch.device``: ``auto``, ``cpu`` or ``cuda``.
        meeting: where ranks agree.

    Returns:
        ``cpu`` or ``cuda:N``, and the line or None.

    Raises:
        ConfigError: ``cuda`` is wanted and some machine has fewer devices than ranks.
    """
    rank = meeting.rank
    if wanted == "cpu":
        return "cpu", None
    gpus = _gpu_count()
    if meeting.all_agree("cuda", gpus >= rank.local_world_size):
        return f"cuda:{rank.local_rank}", None
    line = shortage(gpus, rank)
    if wanted == "cuda":
        raise ConfigError(
            f"launch.device=cuda: {line or 'another machine has fewer GPUs than ranks'}; "
            "start one rank per GPU, or launch.device=cpu"
        )
    return "cpu", f"{line}: computing on the CPU" if line and gpus else None


def slow_format(device: str, dtype: str) -> str | None:
    """A line for the user where a processor has no fast products in a run's number format; None: it has.

    An x86 processor without AVX-512 emulates 16-bit products: measured, 512 × 512 matrices take 40 times as long as in
    fp32, and the quickstart 9 times.
    """
    if device != "cpu" or dtype == "fp32" or _cpu_capability() not in _EMULATING:
        return None
    return (
        f"engine.dtype={dtype}: this processor ({_cpu_capability()}) emulates 16-bit products, which takes many times "
        "as long; engine=fp32_zero1 is faster here"
    )


_EMULATING = ("NO AVX", "AVX2")
"""What torch calls x86 processors without AVX-512."""


def shortage(gpus: int, rank: RankInfo) -> str | None:
    """``2 GPUs for 4 ranks``, or None where there are enough."""
    if gpus >= rank.local_world_size:
        return None
    return f"{gpus} GPU{'' if gpus == 1 else 's'} for {rank.local_world_size} ranks"


def _cpu_capability() -> str:
    import torch

    return torch.backends.cpu.get_cpu_capability()


def _gpu_count() -> int:
    import torch

    return torch.cuda.device_count() if torch.cuda.is_available() else 0
