"""Saves and restores a run: joins the engine's pieces, the loader's position and the run's progress."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path

import torch
import torch.distributed as dist

from megalm.checkpoint.reader import CheckpointReader
from megalm.checkpoint.start import StartMode, StartPoint
from megalm.checkpoint.store import CHECKPOINTS_FOLDER, prune
from megalm.checkpoint.writer import Header, save_checkpoint
from megalm.config.parse import config_to_dict
from megalm.config.schema import Config
from megalm.core.groups import ParallelContext
from megalm.data.loader import TrainLoader
from megalm.engine.deepspeed_engine import DeepSpeedEngine
from megalm.train.callbacks.base import warn
from megalm.train.progress import Progress


class Saver:
    """Writes the checkpoints of one run and deletes those it need not keep.

    Args:
        config: what is stored with the tensors, and how many checkpoints are kept.
        context: this rank's place and groups.
        run_dir: the run's folder.
    """

    def __init__(self, config: Config, context: ParallelContext, run_dir: Path) -> None:
        self._config = config
        self._context = context
        self._folder = run_dir / CHECKPOINTS_FOLDER

    def save(self, engine: DeepSpeedEngine, loader: TrainLoader, progress: Progress) -> Path:
        """Write one checkpoint; collective over all ranks.

        Raises:
            CheckpointError: some rank could not write; on every rank.
        """
        topology = self._context.topology
        header = Header(
            step=progress.step,
            config=config_to_dict(self._config),
            topology={"tp": topology.tp, "pp": topology.pp, "cp": topology.cp, "dp": topology.dp},
            data=loader.state_dict(),
            training={"progress": asdict(progress), "engine": engine.scalar_state()},
        )
        path = save_checkpoint(
            self._folder,
            header,
            engine.state_pieces(),
            rank=self._context.rank,
            world_size=self._context.world.size,
            agree=self._agree,
        )
        if self._context.rank == 0:
            try:
                prune(self._folder, self._config.checkpoint.keep_last)
            except OSError as error:  # the new one is safe; the next save tries again
                warn(f"an old checkpoint could not be deleted: {error}")
        return path

    def _agree(self, error: str | None) -> str | None:
        """The first error of any rank, on every rank."""
        failed = torch.tensor([0.0 if error is None else 1.0], device=self._context.device)
        if not float(self._context.world.all_reduce(failed)):
            return None
        errors: list[str | None] = [None] * self._context.world.size
        dist.all_gather_object(errors, error)
        return next(e for e in errors if e is not None)


def restore(start: StartPoint, engine: DeepSpeedEngine, loader: TrainLoader) -> Progress:
    """Load what the start point says, and return how far the run is.

    Raises:
        CheckpointError: the checkpoint does not fit the model, or is damaged.
        DataError: the data or its order is not what the checkpoint was trained with.
    """
    if start.path is None:
        return Progress()
    reader = CheckpointReader(start.path)
    reader.check_parameters(engine.full_shapes())
    if start.mode is StartMode.INIT_FROM:
        engine.load_state(reader, scalars=None)
        return Progress()
    progress = Progress(**reader.manifest.training["progress"])
    loader.load_state_dict(reader.manifest.data)
    engine.load_state(reader, scalars=reader.manifest.training["engine"])
    return progress
