"""Which rank this process is: the one place that knows what torchrun, srun and mpirun put into the environment."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass

from megalm.errors import ConfigError

LOCAL, TORCHRUN, SRUN, MPIRUN = "local", "torchrun", "srun", "mpirun"

_FIRST_PORT = 10_000
_PORTS = 20_000
"""Ports derived from job ids: below the range from which Linux gives out its own (32768 and up)."""

_LARGEST_PORT = 65_535


@dataclass(frozen=True, kw_only=True)
class RankInfo:
    """One rank of a run.

    Attributes:
        rank: number of this process, 0 to ``world_size`` - 1.
        world_size: number of ranks.
        local_rank: number of this process on its machine.
        local_world_size: number of ranks on its machine.
        launcher: who started it: ``local`` (megalm itself), ``torchrun``, ``srun`` or ``mpirun``.
        master_addr: where rank 0 listens; empty while ranks still have to agree on it (mpirun), or for a rank without
            others.
        master_port: the port it listens on; 0 likewise.
        device: ``cpu`` or ``cuda:N``: what this rank computes on.
    """

    rank: int
    world_size: int
    local_rank: int
    local_world_size: int
    launcher: str
    master_addr: str
    master_port: int
    device: str = "cpu"


def discover(environ: Mapping[str, str]) -> RankInfo | None:
    """The rank that an external launcher has given this process; None when there is no such launcher.

    torchrun inside an srun step wins, since it started last; so does mpirun, whose daemons srun starts.

    Raises:
        ConfigError: the launcher's variables are incomplete or contradict each other.
    """
    for find in (_from_torchrun, _from_mpirun, _from_srun):
        info = find(environ)
        if info is not None:
            return _checked(info)
    return None


_TELLING: dict[str, tuple[str, ...]] = {
    TORCHRUN: ("RANK", "WORLD_SIZE"),
    MPIRUN: ("OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE"),
    SRUN: ("SLURM_STEP_ID", "SLURM_PROCID"),
}
"""Variables by which each launcher is known; without them it is not."""


def variables_of(environ: Mapping[str, str]) -> tuple[str, list[str]]:
    """What makes this process a rank: in words, ``RANK and WORLD_SIZE``; and the variables without which it is none.

    Several launchers may have left theirs, each of which would be found once the one before it is gone.
    """
    found = [names for names in _TELLING.values() if all(name in environ for name in names)]
    unset = [name for names in found for name in names]
    unset += [name for name in ("MASTER_ADDR", "MASTER_PORT") if name in environ]
    return " and ".join(found[0]) if found else "", unset


def _from_torchrun(environ: Mapping[str, str]) -> RankInfo | None:
    """Torchrun's variables, which Kubernetes operators set too."""
    if not all(name in environ for name in ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")):
        return None
    world_size = _integer(environ, "WORLD_SIZE")
    return RankInfo(
        rank=_integer(environ, "RANK"),
        world_size=world_size,
        local_rank=_integer(environ, "LOCAL_RANK", "0"),
        local_world_size=_integer(environ, "LOCAL_WORLD_SIZE", str(world_size if "LOCAL_RANK" in environ else 1)),
        launcher=TORCHRUN,
        master_addr=_host(environ) if world_size > 1 else "",
        master_port=_port(environ) if world_size > 1 else 0,
    )


def _from_mpirun(environ: Mapping[str, str]) -> RankInfo | None:
    """Open MPI's variables; where rank 0 listens is agreed on over MPI later, see ``rendezvous.meet_over_mpi``."""
    if "OMPI_COMM_WORLD_RANK" not in environ:
        return None
    return RankInfo(
        rank=_integer(environ, "OMPI_COMM_WORLD_RANK"),
        world_size=_integer(environ, "OMPI_COMM_WORLD_SIZE"),
        local_rank=_integer(environ, "OMPI_COMM_WORLD_LOCAL_RANK"),
        local_world_size=_integer(environ, "OMPI_COMM_WORLD_LOCAL_SIZE"),
        launcher=MPIRUN,
        master_addr="",
        master_port=0,
    )


def _from_srun(environ: Mapping[str, str]) -> RankInfo | None:
    """SLURM's variables, inside a step only: a batch script and a login shell have most of them too.

    A step of one task, such as ``srun --pty bash``, is a place to start ranks from, not a rank.
    """
    if "SLURM_STEP_ID" not in environ or "SLURM_PROCID" not in environ:
        return None
    tasks = _integer(environ, "SLURM_STEP_NUM_TASKS", environ.get("SLURM_NTASKS", "1"))
    if tasks == 1:
        return None
    nodes = environ.get("SLURM_STEP_NODELIST") or environ.get("SLURM_NODELIST", "")
    tasks_per_node = _tasks_per_node(environ.get("SLURM_STEP_TASKS_PER_NODE", str(tasks)))
    node = _integer(environ, "SLURM_NODEID", "0")
    if node >= len(tasks_per_node):
        raise ConfigError(f"SLURM_NODEID={node}: SLURM_STEP_TASKS_PER_NODE describes {len(tasks_per_node)} nodes")
    return RankInfo(
        rank=_integer(environ, "SLURM_PROCID"),
        world_size=tasks,
        local_rank=_integer(environ, "SLURM_LOCALID"),
        local_world_size=tasks_per_node[node],
        launcher=SRUN,
        master_addr=environ.get("MASTER_ADDR") or first_node(nodes),
        master_port=_port(environ) if environ.get("MASTER_PORT") else _port_of_job(environ),
    )


def first_node(nodes: str) -> str:
    """The first host of a SLURM node list: ``node[07-09,12],other`` ▶ ``node07``."""
    match = re.match(r"([^\[,]+)(?:\[(\d+)[^\]]*\]([^,]*))?", nodes)
    if match is None:
        raise ConfigError(f"SLURM_STEP_NODELIST={nodes}: names no node; set MASTER_ADDR to the host of rank 0")
    prefix, number, suffix = match.groups(default="")
    return prefix + number + suffix


def _tasks_per_node(text: str) -> list[int]:
    """``2(x3),1`` ▶ ``[2, 2, 2, 1]``."""
    tasks: list[int] = []
    for part in text.split(","):
        match = re.fullmatch(r"(\d+)(?:\(x(\d+)\))?", part)
        if match is None:
            raise ConfigError(f"SLURM_STEP_TASKS_PER_NODE={text}: not a list such as 2(x3),1")
        tasks += [int(match[1])] * int(match[2] or 1)
    return tasks


def _port_of_job(environ: Mapping[str, str]) -> int:
    """A port that jobs sharing a node, and steps of one job, are unlikely to share."""
    return _FIRST_PORT + (_integer(environ, "SLURM_JOB_ID") + 7919 * _integer(environ, "SLURM_STEP_ID")) % _PORTS


def _checked(info: RankInfo) -> RankInfo:
    if not (0 <= info.rank < info.world_size and 0 <= info.local_rank < info.local_world_size <= info.world_size):
        raise ConfigError(
            f"{info.launcher}: rank {info.rank} of {info.world_size}, local rank {info.local_rank} of "
            f"{info.local_world_size} cannot be; the launcher's environment variables contradict each other"
        )
    return info


def _host(environ: Mapping[str, str]) -> str:
    host = environ["MASTER_ADDR"].strip()
    if not host:
        raise ConfigError("MASTER_ADDR=: empty; the host of rank 0")
    return host


def _port(environ: Mapping[str, str]) -> int:
    port = _integer(environ, "MASTER_PORT")
    if not 1 <= port <= _LARGEST_PORT:
        raise ConfigError(f"MASTER_PORT={port}: not a port; 1 to {_LARGEST_PORT}")
    return port


def _integer(environ: Mapping[str, str], name: str, default: str | None = None) -> int:
    text = environ.get(name, default)
    if text is None:
        raise ConfigError(f"{name}: not in the environment although its launcher's other variables are; set it")
    try:
        return int(text)
    except ValueError:
        raise ConfigError(f"{name}={text}: not an integer") from None
