"""Saves a run: joins the engine's pieces, the loader's position and the run's progress, while training goes on."""

from __future__ import annotations

import errno
import os
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
import torch.distributed as dist

from megalm.checkpoint.save import Save
from megalm.checkpoint.store import CHECKPOINTS_FOLDER, Retention, find_latest, prune, remove_leftovers, set_aside
from megalm.checkpoint.writer import Header, PieceToWrite
from megalm.config.parse import config_to_dict
from megalm.config.schema import Config
from megalm.core.parameters import StatePiece
from megalm.engine.lr_schedule import LearningRate
from megalm.mesh.groups import Group, ParallelContext
from megalm.ownership import Claim
from megalm.runs.history import SCHEDULE, schedule_to_dict
from megalm.runs.start import StartMode, StartPoint
from megalm.training.callbacks.base import CheckpointMetrics, ValidationMetrics, warn
from megalm.training.progress import Progress


@dataclass(frozen=True)
class RunState:
    """What a checkpoint says besides its tensors.

    Attributes:
        data: of the loader.
        scalars: of the engine.
        progress: of the run.
        validation: the validation at this step, if there was one.
        whole_split: whether that was of the whole split, and not of the samples of every validation.
        schedule: the learning rate that the run follows, which it goes on with when it is resumed.
    """

    data: dict[str, Any]
    scalars: dict[str, float]
    progress: Progress
    validation: ValidationMetrics | None = None
    whole_split: bool = False
    schedule: LearningRate | None = None


class Saver:
    """Writes the checkpoints of one run while it trains, and deletes those it need not keep.

    Every rank calls the same methods at the same points. Training stands still for a copy of this rank's state into
    host memory, which the next save uses again, and for the save before, should it not be finished.

    Args:
        config: what is stored with the tensors, and how many checkpoints are kept.
        context: this rank's place and groups.
        run_dir: the run's folder.
        lineage: where the run's weights are from, as manifests say it.
        start: what the run started from; checkpoints of its own after that step are set aside.
        claim: asked before something is written whether the run's folder is this run's still; None: it is.
    """

    def __init__(
        self,
        config: Config,
        context: ParallelContext,
        run_dir: Path,
        *,
        lineage: Mapping[str, Any] = MappingProxyType({}),
        start: StartPoint = StartPoint(StartMode.FRESH),  # noqa: B008 - frozen
        claim: Claim | None = None,
    ) -> None:
        self._claim = claim
        self._config = config
        self._context = context
        self._folder = run_dir / CHECKPOINTS_FOLDER
        self._lineage = lineage
        self._copy = HostCopy()
        self._pending: Save | None = None
        self._last: Save | None = None
        self._stall_seconds = self._waited_seconds = 0.0
        self._reported = True
        self._attempts = 0
        settings = config.checkpoint
        self._retention = Retention(settings.keep_last, settings.keep_every, settings.keep_best)
        if context.rank == 0:
            self._check()
            for problem in remove_leftovers(self._folder):
                warn(problem)
            if start.is_named:
                set_aside(self._folder, start.step)

    def start(
        self, pieces: Sequence[StatePiece], state: RunState, *, stall_began: float, waited_seconds: float = 0.0
    ) -> None:
        """Begin to write a checkpoint; collective over all ranks. None may be pending: see :meth:`finish`.

        Args:
            pieces: what this rank is to write; live tensors, which may change once this returns, or where saving is not
                asynchronous, once the save is finished.
            state: the same on every rank.
            stall_began: when training stopped for this save, by ``time.perf_counter``.
            waited_seconds: how long it has waited since then for the save before.
        """
        assert self._pending is None, "finish() comes before the next save"
        self._check()
        self.close()
        asynchronous = self._config.checkpoint.asynchronous
        self._attempts += 1
        self._pending = Save(
            self._folder,
            self._header(state),
            self._copy.take(pieces) if asynchronous else [PieceToWrite.of(piece) for piece in pieces],
            rank=self._context.rank,
            world_size=self._context.world_group.size,
            attempt=self._attempts if self._claim is None else f"{self._claim.token}-{self._attempts}",
            forbidden=self._lost,
            on_complete=self._prune,
        )
        self._reported = False
        self._stall_seconds = time.perf_counter() - stall_began
        self._waited_seconds = waited_seconds

    @property
    def has_failed(self) -> bool:
        """Whether this rank could not write its part of the pending save; :meth:`finish` then raises on every rank."""
        return self._pending is not None and self._pending.failed

    @property
    def pending_step(self) -> int | None:
        """The step of the save that is not finished; the same on every rank."""
        return None if self._pending is None else self._pending.step

    def newly_complete(self) -> CheckpointMetrics | None:
        """The pending checkpoint, once, when it is complete; on rank 0 alone."""
        save = self._pending
        if save is None or self._reported or not save.is_complete:
            return None
        self._reported = True
        for problem in save.warnings:
            warn(problem)
        return CheckpointMetrics(
            step=save.step,
            checkpoint=str(save.path),
            stall_seconds=self._stall_seconds,
            write_seconds=save.seconds,
            gigabytes=save.nbytes / 1e9,
            waited_seconds=self._waited_seconds,
        )

    def cancel(self) -> None:
        """Stop writing, as the pending save has failed on some rank."""
        if self._pending is not None:
            self._pending.cancel()

    @property
    def has_checkpoints(self) -> bool:
        """Whether the run has a complete checkpoint."""
        return find_latest(self._folder) is not None

    def close(self) -> None:
        """Wait until older checkpoints are deleted, which goes on after a save is complete."""
        if self._last is not None:
            self._last.join()
            self._last = None

    def linger(self) -> None:
        """Give the pending save its chance before this process ends, unless the run's folder is another's by now."""
        if self._pending is None:
            return
        if self._lost() is not None:
            self._pending.cancel()
            return
        self._pending.linger(_LINGER_SECONDS)

    def finish(self, *, training_waits: bool = False) -> CheckpointMetrics | None:
        """Wait for the pending save, if there is one; collective over all ranks.

        Args:
            training_waits: whether the wait is part of this save's stall; else it is part of the next one's.

        Returns:
            As :meth:`newly_complete`.

        Raises:
            CheckpointError: on every rank, if any of them could not write. The save is gone, older ones are untouched.
        """
        if self._pending is None:
            return None
        began = time.perf_counter()
        try:
            self._pending.finish(self._agree)
            if training_waits:
                self._stall_seconds += time.perf_counter() - began
            return self.newly_complete()
        finally:
            self._pending, self._last = None, self._pending

    def _check(self) -> None:
        if self._claim is not None:
            self._claim.check()

    def _lost(self) -> str | None:
        """Why the run's folder is not this run's any more; None: it is."""
        return None if self._claim is None else self._claim.problem()

    def _header(self, state: RunState) -> Header:
        topology, parallel = self._context.topology, self._config.parallel
        training: dict[str, Any] = {"progress": asdict(state.progress), "engine": state.scalars, **self._lineage}
        if state.schedule is not None:
            training[SCHEDULE] = schedule_to_dict(state.schedule)
        if state.validation is not None:
            training["validation"] = {
                "val_loss": state.validation.loss,
                "val_accuracy": state.validation.scores.get("val_accuracy"),
                "whole_split": state.whole_split,
            }
        return Header(
            step=state.progress.step,
            config=config_to_dict(self._config),
            topology={
                "tp": topology.tp,
                "pp": topology.pp,
                "virtual_stages": parallel.virtual_stages,
                "cp": topology.cp,
                "dp": topology.dp,
                "zero_stage": self._config.engine.zero_stage,
            },
            data=state.data,
            training=training,
        )

    def _prune(self) -> None:
        for problem in prune(self._folder, self._retention):  # the next save tries again
            warn(problem)

    def _agree(self, error: str | None) -> str | None:
        """The error of the lowest rank that has one, on every rank: one reduction, and a broadcast if there is one."""
        return first_error(error, self._context.world_group, self._context.device)


def first_error(error: str | None, group: Group, device: torch.device) -> str | None:
    """The error of the lowest member that has one, on every member; collective.

    Args:
        error: this member's; None: it has none. What goes beyond ``_ERROR_BYTES`` is left out elsewhere.
        group: all that are asked.
        device: of the tensors that are sent: NCCL has no others than a GPU's.
    """
    if group.size == 1:
        return error
    first = torch.tensor(group.size if error is None else group.index, device=device)
    speaker = int(group.all_reduce(first, dist.ReduceOp.MIN))
    if speaker == group.size:
        return None
    text = (error or "").encode()[:_ERROR_BYTES].ljust(_ERROR_BYTES, b"\0")
    letters = torch.frombuffer(bytearray(text), dtype=torch.uint8).to(device)
    dist.broadcast(letters, group.ranks[speaker], group=group.handle)
    return bytes(letters.tolist()).rstrip(b"\0").decode(errors="ignore")


class HostCopy:
    """One copy of a rank's state in host memory, page-locked where it comes from a GPU; used again by every save."""

    def __init__(self) -> None:
        self._buffer = torch.empty(0)
        self._is_locked = False

    def take(self, pieces: Sequence[StatePiece]) -> list[PieceToWrite]:
        """Copy live tensors; the copies stay as they are until the next call."""
        total = sum(piece.values.numel() for piece in pieces)
        on_gpu = any(piece.values.is_cuda for piece in pieces)
        if self._buffer.numel() < total:
            self._allocate(total, lock=on_gpu)
        copies, offset = [], 0
        for piece in pieces:
            copy = self._buffer[offset : offset + piece.values.numel()]
            copy.copy_(piece.values.detach(), non_blocking=True)
            offset += copy.numel()
            copies.append(PieceToWrite.of(piece, copy))
        if on_gpu:
            torch.cuda.synchronize()
        return copies

    def _allocate(self, elements: int, *, lock: bool) -> None:
        """Make room; page-locked, copies from the GPU go straight there. Where the system refuses, they are slower.

        torch's own pinned memory rounds up to a power of two, which for a rank's share of a large model is gigabytes.
        """
        if self._is_locked:
            torch.cuda.cudart().cudaHostUnregister(self._buffer.data_ptr())
        self._buffer = torch.empty(elements)
        if lock:
            code = torch.cuda.cudart().cudaHostRegister(self._buffer.data_ptr(), self._buffer.nbytes, 0)
            self._is_locked = int(code) == 0


def is_fault_of_disk(reason: str) -> bool:
    """Whether a save failed for what may pass: a full or failing disk, or one that does not answer."""
    return any(os.strerror(code) in reason for code in _FAULTS_OF_DISKS)


_FAULTS_OF_DISKS = (errno.ENOSPC, errno.EDQUOT, errno.EIO, errno.ESTALE, errno.ETIMEDOUT)

_ERROR_BYTES = 4096
"""Of an error that ranks tell each other."""

_LINGER_SECONDS = 60.0
"""Longest that a rank that has failed waits for a checkpoint that is being written."""
