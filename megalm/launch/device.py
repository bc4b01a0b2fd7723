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
    return "cpu", f"{line}: training on the CPU" if line and gpus else None


def shortage(gpus: int, rank: RankInfo) -> str | None:
    """``2 GPUs for 4 ranks``, or None where there are enough."""
    if gpus >= rank.local_world_size:
        return None
    return f"{gpus} GPU{'' if gpus == 1 else 's'} for {rank.local_world_size} ranks"


def _gpu_count() -> int:
    import torch

    return torch.cuda.device_count() if torch.cuda.is_available() else 0
