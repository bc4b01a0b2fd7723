"""What ranks compute on; all on the same kind of device, or their collectives would not meet.

Schedulers show GPUs to ranks in two ways: every rank of a machine sees all of them, and takes that of its own number;
or each sees its own alone (``--gpus-per-task``, ``--gpu-bind``, ``CUDA_VISIBLE_DEVICES`` set per rank), which is then
``cuda:0`` for all. The number of visible GPUs does not tell the two apart, and SLURM's variables say what was asked
for, not what came of it. So ranks tell each other which physical GPUs they see: of those with the same ones, each
takes another. That no two have taken the same is counted, GPU by GPU.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from functools import partial

from megalm.config.violation import spoken_list
from megalm.errors import ConfigError
from megalm.launch.discovery import MPIRUN, SRUN, TORCHRUN, RankInfo
from megalm.launch.gpus import Gpus, visible_gpus
from megalm.launch.rendezvous import Meeting

CPU = "cpu"

_BINDINGS = ("CUDA_VISIBLE_DEVICES", "SLURM_GPUS_PER_TASK", "SLURM_TRES_PER_TASK", "SLURM_GPU_BIND", "SLURM_STEP_GPUS")
"""Variables that say who shows which GPUs to a rank; shown where that does not suit the ranks."""


def choose_device(
    wanted: str,
    meeting: Meeting,
    environ: Mapping[str, str] = os.environ,
    look: Callable[[], Gpus] | None = None,
) -> str:
    """The device of this rank; collective over all ranks.

    Args:
        wanted: ``launch.device``: ``auto``, ``cpu`` or ``cuda``. ``auto`` is the CPU where no machine has a GPU, or all
            are hidden on purpose; it never is where there are GPUs.
        meeting: where ranks agree.
        environ: this rank's environment.
        look: finds this process's GPUs; None: :func:`megalm.launch.gpus.visible_gpus`.

    Returns:
        ``cpu`` or ``cuda:N``.

    Raises:
        ConfigError: on every rank, where the GPUs of some machine do not suit its ranks.
    """
    if wanted == CPU:
        return CPU
    gpus = (look or partial(visible_gpus, environ))()
    if meeting.all_agree("no-gpus", not gpus.ids and not gpus.unused):
        if wanted == "auto":
            return CPU
        raise ConfigError(f"launch.device={wanted}: no GPU on any machine; launch.device=cpu")
    own, problem = _own_gpu(meeting, gpus)
    if problem is not None:
        meeting.note("gpus", f"launch.device={wanted}: rank {meeting.rank.rank} {problem}{_told_by(environ)}")
    if not meeting.all_agree("gpus-suit", problem is None):
        text = meeting.noted("gpus")
        raise ConfigError(f"{text}; {_remedy(meeting.rank, environ)}, or launch.device=cpu")
    return f"cuda:{own}"


def _own_gpu(meeting: Meeting, gpus: Gpus) -> tuple[int, str | None]:
    """Which of the visible GPUs is this rank's, and what is wrong with that; collective.

    In the store: one entry to write, one request for those of the machine's ranks, and one count.
    """
    rank = meeting.rank
    meeting.tell(_sees(gpus.machine, rank.local_rank), " ".join(gpus.ids) or "-")
    meeting.all_agree("gpus-told", True)
    others = meeting.told([_sees(gpus.machine, number) for number in range(rank.local_world_size)])
    if not gpus.ids:
        if gpus.unused:
            return 0, f"could use {_gpus(gpus.unused)} of its machine, but {gpus.reason}"
        return 0, "sees no GPU, while others do"
    mine = others[rank.local_rank]
    same = [number for number, sees in enumerate(others) if sees == mine]
    if len(same) > len(gpus.ids):
        return 0, f"sees the same {_gpus(len(gpus.ids))} as {len(same)} ranks of its machine do"
    own = same.index(rank.local_rank)
    if meeting.count(f"gpu/{gpus.ids[own]}") > 1:
        return own, f"has cuda:{own} ({gpus.ids[own]}), which is another rank's, too"
    return own, None


def _sees(machine: str, local_rank: int) -> str:
    return f"sees/{machine}/{local_rank}"


def _told_by(environ: Mapping[str, str]) -> str:
    """The variables that say who shows which GPUs to a rank."""
    found = [f"{name}={environ[name]}" for name in _BINDINGS if name in environ]
    return f" ({spoken_list(found, 'and')})" if found else ""


def _remedy(rank: RankInfo, environ: Mapping[str, str]) -> str:
    """How to start one rank per GPU, with the launcher at hand."""
    if rank.launcher == SRUN:
        if any(name in environ for name in ("SLURM_GPUS_PER_TASK", "SLURM_TRES_PER_TASK", "SLURM_GPU_BIND")):
            return "one GPU per task (`--gpus-per-task=1`), or none bound to tasks and `--gpus-per-node` GPUs for all"
        return "as many GPUs as tasks on each node (`--gpus-per-node` equal to `--ntasks-per-node`)"
    if rank.launcher == TORCHRUN:
        return "one rank per GPU (`--nproc-per-node` equal to the GPUs of a node)"
    if rank.launcher == MPIRUN:
        return "one rank per GPU (`--map-by ppr:GPUS:node`)"
    return "one rank per GPU (launch.ranks)"


def _gpus(count: int) -> str:
    return f"{count} GPU{'' if count == 1 else 's'}"


def slow_format(device: str, dtype: str) -> str | None:
    """A line for the user where a processor has no fast products in a run's number format; None: it has.

    An x86 processor without AVX-512 emulates 16-bit products: measured, 512 × 512 matrices take 40 times as long as in
    fp32, and the quickstart 9 times.
    """
    if device != CPU or dtype == "fp32" or _cpu_capability() not in _EMULATING:
        return None
    return (
        f"engine.dtype={dtype}: this processor ({_cpu_capability()}) emulates 16-bit products, which takes many times "
        "as long; engine=fp32_zero1 is faster here"
    )


_EMULATING = ("NO AVX", "AVX2")
"""What torch calls x86 processors without AVX-512."""


def _cpu_capability() -> str:
    import torch

    return torch.backends.cpu.get_cpu_capability()
