"""Adds what a checkpoint was evaluated on to the record of its run, ``metrics.jsonl``, and to the copies of that."""

from __future__ import annotations

from collections.abc import Mapping

from megalm.errors import ConfigError, DataError
from megalm.ownership import owned
from megalm.plan.preflight import OWNER_LOCK
from megalm.runs.find import FoundModel
from megalm.runs.folder import METRICS_FILE, TENSORBOARD_FOLDER, WANDB_ID_FILE
from megalm.runs.record import append_row
from megalm.training.callbacks.base import Outcome
from megalm.training.callbacks.tensorboard import write_scalars
from megalm.training.callbacks.wandb import WandbLog


def record_evaluation(found: FoundModel, scores: Mapping[str, float]) -> str | None:
    """Append a row, and copy it to TensorBoard and W&B where the run has them.

    Args:
        found: the model; nothing is recorded of one that no run of megalm trained.
        scores: as :attr:`megalm.training.callbacks.base.TaskMetrics.scores`.

    Returns:
        Why it was not recorded; None: it was, or there is no record.
    """
    path = found.run / METRICS_FILE
    if not path.exists():
        return None
    step, name = found.manifest.step, f"run.name={found.config.run.name}"
    row = {"step": step, "evaluated": str(found.checkpoint), **scores}
    try:
        with owned(found.run / OWNER_LOCK, name, "it writes its record alone"):
            append_row(path, row)
    except (ConfigError, DataError, OSError) as error:
        return f"not added to {path}: {error}"
    if (found.run / TENSORBOARD_FOLDER).is_dir() and found.config.logging.tensorboard:
        write_scalars(found.run, {f"tasks/{name}": value for name, value in scores.items()}, step)
    if (found.run / WANDB_ID_FILE).exists() and found.config.logging.wandb != "disabled":
        log = WandbLog(found.config.logging.wandb)
        log.start(found.config, found.run)
        log.on_evaluation(scores, step)
        log.on_end(Outcome.DONE)
        log.close()
    return None
