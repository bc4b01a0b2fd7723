"""``megalm.train``: the run that a config describes, from Python."""

from __future__ import annotations

import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from megalm.config.parse import config_to_dict
from megalm.config.schema import Config
from megalm.errors import ExitCode, MegalmError
from megalm.runs.folder import LOGS_FOLDER, METRICS_FILE
from megalm.runs.record import read_metrics, step_rows, validation_rows
from megalm.runs.start import run_folder


class TrainingError(MegalmError):
    """A run ended before its last step; the rank that failed first has said why, on standard error and in its log.

    Attributes:
        exit_code: of the run; see :class:`megalm.errors.ExitCode`.
        folder: of the run.
    """

    def __init__(self, exit_code: int, folder: Path) -> None:
        self.exit_code = ExitCode(exit_code) if exit_code in set(ExitCode) else ExitCode.BUG
        self.folder = folder
        super().__init__(f"{folder}: ended with exit code {exit_code}; its ranks' logs are in {folder / LOGS_FOLDER}")


@dataclass(frozen=True)
class Trained:
    """A run that :func:`train` has ended.

    Attributes:
        folder: of the run; :func:`megalm.load` and every command take it.
    """

    folder: Path

    @property
    def metrics(self) -> list[dict[str, Any]]:
        """The rows of ``metrics.jsonl``: a row per start, step, validation and checkpoint."""
        return read_metrics(self.folder / METRICS_FILE)

    @property
    def losses(self) -> list[float]:
        """Training loss by step."""
        return [row["loss"] for row in step_rows(self.metrics)]

    @property
    def validation_losses(self) -> list[float | None]:
        """Loss of each validation."""
        return [row["val_loss"] for row in validation_rows(self.metrics)]


def train(config: Config) -> Trained:
    """Train a run, or resume it, on ranks that this process starts: ``launch.ranks`` of them, or one per tp·pp·cp.

    The ranks are processes of their own, so that this one keeps its memory and its random state, and a notebook can
    train any layout. What they print goes to this process's standard output. An interrupt is passed on to them: the
    run saves and ends.

    Args:
        config: of :func:`megalm.compose`, or such a one changed with ``dataclasses.replace``.

    Raises:
        ConfigError, DataError, CheckpointError: what ``megalm train`` would refuse before it starts.
        TrainingError: the run ended before its last step.
    """
    from megalm.launch.run import run_on_own_ranks
    from megalm.training.job import TRAIN

    with tempfile.TemporaryDirectory(prefix="megalm-") as name:
        path = Path(name) / "config.yaml"
        path.write_text(yaml.safe_dump(config_to_dict(config), sort_keys=False, allow_unicode=True), encoding="utf-8")
        code = run_on_own_ranks(TRAIN, [f"--config={path}"])
    folder = run_folder(config)
    if code != ExitCode.DONE:
        raise TrainingError(code, folder)
    return Trained(folder)
