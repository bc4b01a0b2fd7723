"""Weights & Biases: a copy of ``metrics.jsonl``, sent by a thread that training never waits for.

The only file that imports wandb. One process logs; the run's id is made once and kept in the run folder, so a resumed
or requeued run continues the same W&B run. Offline rows lie in ``wandb/`` and go up with ``wandb sync``.
"""

from __future__ import annotations

import logging
import netrc
import os
import queue
import secrets
import string
import threading
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any, Literal, cast
from urllib.parse import urlparse

from megalm.config.parse import config_to_dict
from megalm.config.schema import Config
from megalm.runs.folder import WANDB_ID_FILE
from megalm.training.callbacks.base import (
    Callback,
    CheckpointMetrics,
    Outcome,
    RunContext,
    StepMetrics,
    TaskMetrics,
    ValidationMetrics,
    describe_error,
    warn,
)

INIT_TIMEOUT_SECONDS = 10
"""Longest that the sending thread tries to start a W&B run."""

CLOSE_TIMEOUT_SECONDS = 30
"""Longest that the end of a run waits for rows to be sent."""

MOST_QUEUED_ROWS = 10_000
"""Rows beyond this are dropped from W&B (never from ``metrics.jsonl``); a queue must not eat a rank's memory."""

_DEFAULT_HOST = "api.wandb.ai"


class WandbLog(Callback):
    """Sends every row to W&B; whatever goes wrong there is one line on the console and nothing else.

    Args:
        mode: ``auto`` (online where an API key is configured, else offline), ``online``, ``offline`` or ``disabled``.
        queue_size: rows kept while the thread is busy.
    """

    def __init__(self, mode: str, *, queue_size: int = MOST_QUEUED_ROWS) -> None:
        self._mode = resolve_mode(mode, os.environ)
        self._rows: queue.Queue[dict[str, Any]] = queue.Queue(queue_size)
        self._closing = threading.Event()
        self._thread: threading.Thread | None = None
        self._exit_code = 1
        self._step = 0
        self._has_warned = False

    def on_start(self, context: RunContext) -> None:
        """Start the thread, which starts the W&B run."""
        self._step = context.start_step
        self.start(context.config, context.run_dir)

    def start(self, config: Config, run_dir: Path) -> None:
        """Start or continue the W&B run of a folder, without waiting for it."""
        if self._mode == "disabled":
            return
        arguments = (config, run_dir, stored_run_id(run_dir))
        self._thread = threading.Thread(target=self._send_all, args=arguments, name="wandb", daemon=True)
        self._thread.start()

    def on_step(self, metrics: StepMetrics) -> None:
        """Queue the row."""
        self._step = metrics.step
        self._put(metrics.row())

    def on_validation(self, metrics: ValidationMetrics) -> None:
        """Queue the row."""
        self._put(metrics.row())

    def on_tasks(self, metrics: TaskMetrics) -> None:
        """Queue the row's numbers."""
        self._put({"step": metrics.step, **metrics.scores, "tasks/step": metrics.step})

    def on_evaluation(self, row: Mapping[str, float], step: int) -> None:
        """Queue results of a checkpoint, which may be behind what W&B has of the run: their own axis is ``tasks/step``.

        Args:
            row: as :attr:`TaskMetrics.scores`.
            step: of the checkpoint.
        """
        self._put({**row, "tasks/step": step})

    def on_checkpoint(self, metrics: CheckpointMetrics) -> None:
        """Queue the row's numbers, beside those of the step that training has reached: W&B's steps never go back."""
        numbers = {name: value for name, value in asdict(metrics).items() if name not in ("step", "checkpoint")}
        self._put({"step": self._step, **{f"checkpoint/{name}": value for name, value in numbers.items()}})

    def on_end(self, outcome: Outcome) -> None:
        """Remember whether W&B is to show the run as finished or as crashed."""
        self._exit_code = 1 if outcome in (Outcome.DIVERGED, Outcome.FAILED) else 0

    def close(self) -> None:
        """Let the thread finish what is queued, for a limited time."""
        if self._thread is None:
            return
        self._closing.set()
        self._thread.join(CLOSE_TIMEOUT_SECONDS)
        if self._thread.is_alive():
            self._warn(f"not all rows were sent within {CLOSE_TIMEOUT_SECONDS} s; metrics.jsonl has them all")
        self._thread = None

    def _put(self, row: dict[str, Any]) -> None:
        if self._thread is None or not self._thread.is_alive():
            return
        try:
            self._rows.put_nowait(row)
        except queue.Full:
            self._warn("it is too slow and misses rows; metrics.jsonl has them all")

    def _send_all(self, config: Config, run_dir: Path, run_id: str) -> None:
        """Body of the thread: start the W&B run, send rows until closed, finish."""
        try:
            run = _start_run(config, run_dir, run_id, self._mode)
            while (row := self._next_row()) is not None:
                run.log({key: value for key, value in row.items() if value is not None}, step=row.get("step"))
            run.finish(exit_code=self._exit_code)
        except Exception as error:
            self._warn(f"it is off for this run, which goes on without it ({describe_error(error)})")

    def _next_row(self) -> dict[str, Any] | None:
        """The next row; None once the callback is closed and nothing is queued."""
        while True:
            try:
                return self._rows.get(timeout=0.2)
            except queue.Empty:
                if self._closing.is_set() and self._rows.empty():
                    return None

    def _warn(self, text: str) -> None:
        if not self._has_warned:
            self._has_warned = True
            warn(f"W&B: {text}")


def resolve_mode(mode: str, environment: Mapping[str, str]) -> str:
    """``online``, ``offline`` or ``disabled``; ``auto`` heeds ``WANDB_MODE``, else looks for a key."""
    if mode != "auto":
        return mode
    requested = environment.get("WANDB_MODE", "")
    if requested in ("online", "offline", "disabled"):
        return requested
    return "online" if _has_api_key(environment) else "offline"


def stored_run_id(run_dir: Path) -> str:
    """The W&B id of the run, made at its first start and kept in its folder."""
    path = run_dir / WANDB_ID_FILE
    if path.exists() and (run_id := path.read_text(encoding="utf-8").strip()):
        return run_id
    run_id = "".join(secrets.choice(string.ascii_lowercase + string.digits) for _ in range(12))
    temporary = path.with_name(f"{WANDB_ID_FILE}.tmp")
    temporary.write_text(f"{run_id}\n", encoding="utf-8")
    temporary.replace(path)
    return run_id


def _has_api_key(environment: Mapping[str, str]) -> bool:
    """Whether wandb would find a key: in ``WANDB_API_KEY`` or, as ``wandb login`` leaves it, in the netrc file."""
    if environment.get("WANDB_API_KEY"):
        return True
    host = urlparse(environment.get("WANDB_BASE_URL", "")).hostname or _DEFAULT_HOST
    path = Path(environment.get("NETRC") or "~/.netrc").expanduser()
    try:
        return host in netrc.netrc(path).hosts
    except (OSError, netrc.NetrcParseError):
        return False


def _start_run(config: Config, run_dir: Path, run_id: str, mode: str) -> Any:
    """A W&B run that writes nothing to the terminal, uploads no code and measures no system."""
    import wandb

    logging.getLogger("wandb").setLevel(logging.CRITICAL)
    wandb.setup(
        settings=wandb.Settings(silent=True)
    )  # or logging in and failing to would print past the run's settings
    settings = wandb.Settings(
        silent=True,
        console="off",
        disable_code=True,
        disable_job_creation=True,
        init_timeout=INIT_TIMEOUT_SECONDS,
        x_disable_stats=True,
        x_disable_machine_info=True,
    )
    names = config.logging
    return wandb.init(
        project=names.wandb_project,
        entity=names.wandb_entity,
        group=names.wandb_group,
        tags=names.wandb_tags,
        notes=names.wandb_notes,
        name=config.run.name,
        id=run_id,
        resume="allow",
        mode=cast("Literal['online', 'offline']", mode),
        dir=run_dir,
        config=config_to_dict(config),
        settings=settings,
    )
