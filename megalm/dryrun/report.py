"""What a dry run found out about one rank. No torch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

GIB = 2**30
"""Bytes of a gibibyte."""


@dataclass(frozen=True)
class Traffic:
    """Messages of one kind in one group, over a step.

    Attributes:
        group: axis or purpose of the group.
        size: its members.
        kind: ``all_reduce``, ``send`` …
        count: messages of a step.
        nbytes: of all of them: of a gather or scatter the whole buffer, of a transfer what travels.
        nccl: algorithms that NCCL has for it.
        waited: asynchronous ones that are waited for after their issue; transfers are not among them.
        hidden: of these the ones with a matrix product or attention between issue and wait.
    """

    group: str
    size: int
    kind: str
    count: int
    nbytes: int
    nccl: str
    waited: int = 0
    hidden: int = 0


@dataclass(frozen=True)
class LayerWork:
    """Operations of one block for one micro-batch, forward or backward (with what is recomputed).

    Attributes:
        kernels: launched, by kind: ``matmul``, ``attention``, ``memory_bound``.
        flops: of products and attention.
        memory_bound_bytes: read and written by what is neither.
    """

    kernels: Mapping[str, float]
    flops: float
    memory_bound_bytes: float


@dataclass(frozen=True)
class Moment:
    """Memory at one moment.

    Attributes:
        place: number of the tick of the schedule, or one more than the last for the optimizer's part.
        live: bytes by kind when it ends.
        peak: bytes by kind at its highest total.
    """

    place: int
    live: Mapping[str, int]
    peak: Mapping[str, int]


@dataclass(frozen=True, kw_only=True)
class RankReport:
    """One rank's step.

    Attributes:
        rank: of the job.
        world_size: ranks of the job.
        place: its coordinates in words.
        stages: pipeline stages that it runs, each with its number of blocks.
        device: what its tensors stand for: ``cuda`` or ``cpu``.
        gpu: key of ``hardware.yaml``; None: unknown.
        memory_limit_gib: of the device; None: unknown.
        seconds: that the dry run took.
        tool_gib: memory that it took.
        ticks_traced: ticks that were executed.
        ticks: of the whole schedule.
        parameters: that this rank holds.
        flops: of its step, by kind, recomputation included.
        kernels: launched in its step, by kind.
        memory: bytes by kind at the step's peak.
        start_peak: bytes of all kinds at the peak of start-up.
        retained: bytes that the forward of one micro-batch leaves for its backward, by stage.
        moments: memory over the step.
        traffic: messages of a step.
        host_syncs: reads of the device's values by the host in a step, by file and line.
        layers: a block's work by direction, the mean over blocks and micro-batches.
        resume_bytes: that it reads from a checkpoint of the same layout to resume.
        notes: what is to be known of these figures.
    """

    rank: int
    world_size: int
    place: str
    stages: Mapping[int, int]
    device: str
    gpu: str | None
    memory_limit_gib: float | None
    seconds: float
    tool_gib: float
    ticks_traced: int
    ticks: int
    parameters: int
    flops: Mapping[str, int]
    kernels: Mapping[str, int]
    memory: Mapping[str, int]
    start_peak: int
    retained: Mapping[int, int]
    moments: tuple[Moment, ...]
    traffic: tuple[Traffic, ...]
    host_syncs: Mapping[str, int]
    layers: Mapping[str, LayerWork]
    resume_bytes: int | None = None
    notes: tuple[str, ...] = ()

    @property
    def peak_gib(self) -> float:
        """Most memory at any moment of the step or of its start."""
        return max(sum(self.memory.values()), self.start_peak) / GIB

    @property
    def fits(self) -> bool | None:
        """Whether the device holds it; None: its memory is unknown."""
        return None if self.memory_limit_gib is None else self.peak_gib <= self.memory_limit_gib

    def as_json(self) -> dict[str, object]:
        """What ``megalm dryrun --json`` prints of a rank."""
        return {
            "rank": self.rank,
            "world_size": self.world_size,
            "place": self.place,
            "stages": {str(stage): blocks for stage, blocks in self.stages.items()},
            "device": self.device,
            "gpu": self.gpu,
            "seconds": round(self.seconds, 3),
            "tool_gib": round(self.tool_gib, 3),
            "ticks_traced": self.ticks_traced,
            "ticks": self.ticks,
            "parameters": self.parameters,
            "flops": sum(self.flops.values()),
            "flops_by_kind": dict(self.flops),
            "kernels": dict(self.kernels),
            "peak_gib": self.peak_gib,
            "start_peak_gib": self.start_peak / GIB,
            "memory_limit_gib": self.memory_limit_gib,
            "fits": self.fits,
            "memory_gib": {kind: nbytes / GIB for kind, nbytes in self.memory.items()},
            "retained_gib": {str(stage): nbytes / GIB for stage, nbytes in self.retained.items()},
            "collectives": [
                {
                    "group": t.group,
                    "size": t.size,
                    "kind": t.kind,
                    "count": t.count,
                    "bytes": t.nbytes,
                    "nccl": t.nccl,
                    "waited": t.waited,
                    "hidden": t.hidden,
                }
                for t in self.traffic
            ],
            "host_syncs": [{"site": site, "count": count} for site, count in self.host_syncs.items()],
            "layers": {
                direction: {
                    "kernels": dict(work.kernels),
                    "flops": work.flops,
                    "memory_bound_bytes": work.memory_bound_bytes,
                }
                for direction, work in self.layers.items()
            },
            "resume_bytes": self.resume_bytes,
            "notes": list(self.notes),
        }
