"""What ranks do in the resharding matrix: train, save, and continue from what other layouts saved.

Saving and loading are those that users have: :class:`megalm.training.saving.Saver` in its thread, and ``restore``,
which proves that the parameters that arrived are those that were saved.
"""

from __future__ import annotations

import time
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from parity import Layout

from megalm.checkpoint.store import find_latest
from megalm.config.schema import Config
from megalm.engine.deepspeed_engine import DeepSpeedEngine
from megalm.mesh.groups import ParallelContext
from megalm.models.transformer import build_transformer
from megalm.objectives.registry import make_objective
from megalm.runs.start import StartMode, StartPoint
from megalm.training.progress import Progress
from megalm.training.restoring import restore
from megalm.training.saving import RunState, Saver
from megalm.verify.parity import DTYPES, micro_batches_of_rank

SAVED_AT = 3
STEPS = SAVED_AT + 6
BATCH = 8


@dataclass(frozen=True)
class Task:
    """One stretch of training.

    Attributes:
        layout: on which.
        source: name of the checkpoint that it continues from; None: it begins.
        save_as: name of the checkpoint that it leaves after ``SAVED_AT`` steps; None: none.
        first: number of the first step's batch; None: the one after those that the loaded progress counts.
        steps: after which it ends.
        learning_rate: of every step; that of the run which it continues.
        mode: what is loaded.
        extends_vocab: whether the model has more words than the source's.
    """

    layout: Layout
    source: str | None = None
    save_as: str | None = None
    first: int | None = None
    steps: int = STEPS
    learning_rate: float = 1e-4
    mode: StartMode = StartMode.RESUME
    extends_vocab: bool = False


@dataclass(frozen=True)
class Curve:
    """Losses and gradient norms, by step, and in what words it began."""

    losses: list[float]
    grad_norms: list[float]
    words: str | None


def config_of(layout: Layout, learning_rate: float) -> Config:
    """As in the proof of parity, on fewer samples."""
    config = layout.config()
    return replace(
        config,
        train=replace(config.train, global_batch_size=BATCH, steps=STEPS),
        optim=replace(config.optim, lr=learning_rate),
    )


class _NoData:
    """Stands for the loader: batches are synthetic, and a function of the step."""

    def load_state_dict(self, state: dict) -> None:
        assert state == {"samples": SAVED_AT * BATCH}


def run_task(item: tuple[Path, Task]) -> Curve:
    """On every rank: a task, whose checkpoints lie in a folder."""
    folder, task = item
    config = config_of(task.layout, task.learning_rate)
    context = ParallelContext.create(task.layout.topology)
    objective = make_objective(config.objective)
    model = build_transformer(
        config, config.model.vocab_size, context=context, dtype=DTYPES[config.engine.dtype], objective=objective
    )
    engine = DeepSpeedEngine(model, context, config)
    start = StartPoint(StartMode.FRESH)
    if task.source is not None:
        checkpoint = find_latest(folder / task.source / "checkpoints")
        start = StartPoint(task.mode, checkpoint.path, checkpoint.step, extends_vocab=task.extends_vocab)
    restored = restore(start, engine, _NoData(), context, seed=config.run.seed)
    saver = Saver(config, context, folder / (task.save_as or "unused"))
    losses, norms = [], []
    for step in range(restored.progress.step if task.first is None else task.first, task.steps):
        if step == SAVED_AT and task.save_as is not None:
            state = RunState({"samples": step * BATCH}, engine.scalar_state(), Progress(step, step * BATCH, 0))
            saver.start(engine.state_pieces(), state, stall_began=time.perf_counter())
        result = engine.train_step(
            micro_batches_of_rank(config, step, context, model.context_parallel), config.optim.lr
        )
        loss = torch.tensor([result.terms["loss"]], dtype=torch.float64)
        losses.append(float(context.world_group.all_reduce(loss)))
        norms.append(float(result.grad_norm))
    saver.finish()
    return Curve(losses, norms, restored.words)
