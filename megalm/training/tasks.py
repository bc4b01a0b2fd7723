"""Asks the model that is being trained the tasks of ``evaluate.tasks``, on the ranks that train it.

Between two steps the ranks are those of a model that is asked: rank 0 asks, the others follow. They compute with the
parameters that the next step changes; nothing is copied. The ranks of a context-parallel group each take prompts of
their own.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch.distributed as dist

from megalm.checkpoint.store import CHECKPOINTS_FOLDER, step_folder
from megalm.config.schema import Config
from megalm.data.shards.vocabulary import Vocabulary
from megalm.data.tokenization.tokenizer import TOKENIZER_FILE, Tokenizer
from megalm.errors import MegalmError
from megalm.evaluate.tasks.of_config import prepared_of_config
from megalm.evaluate.tasks.requests import PreparedTask
from megalm.evaluate.tasks.results import metrics_row, save_results
from megalm.evaluate.tasks.run import TaskResult, evaluate_tasks
from megalm.generate.asked import AskedModel
from megalm.generate.ranks import Board, TheseRanks, follow
from megalm.launch.signals import StopRequest
from megalm.mesh.groups import Group, ParallelContext
from megalm.mesh.topology import Topology
from megalm.models.transformer import Transformer, without_training
from megalm.objectives.base import Objective
from megalm.runs.find import KnownModel
from megalm.runs.load import TrainedModel
from megalm.training.callbacks.base import CallbackList, TaskMetrics
from megalm.training.progress import Progress


class TrainingTasks:
    """The tasks of a run and the model that is asked them, on every rank.

    Args:
        config: of the run.
        context: this rank's place and groups.
        model: this rank's part of what is trained.
        objective: of the run.
        tokenizer: of its data.
        run_dir: its folder, which results go to.
        callbacks: told of the results.
        stop: whether this rank was asked to stop.

    Raises:
        ConfigError, DataError: a task or its data are wrong, or its items do not fit the model.
    """

    def __init__(
        self,
        config: Config,
        *,
        context: ParallelContext,
        model: Transformer,
        objective: Objective,
        tokenizer: Tokenizer,
        run_dir: Path,
        callbacks: CallbackList,
        stop: StopRequest,
    ) -> None:
        self._callbacks, self._stop = callbacks, stop
        self._tasks: list[PreparedTask] = prepared_of_config(config, tokenizer) if context.rank == 0 else []
        vocabulary = Vocabulary.of(tokenizer, run_dir / TOKENIZER_FILE)
        known = KnownModel(run_dir, run_dir, config, tokenizer, vocabulary, context.topology.world_size)
        view = without_training(model, config, known.vocab_size, context=context, objective=objective)
        self._model = TrainedModel(view, objective, known, asking_context(context), in_training=True)
        self._board = None if context.topology.world_size == 1 else Board(dist.distributed_c10d._get_default_store())

    def ask(self, progress: Progress) -> None:
        """Ask all tasks and tell the callbacks; collective over all ranks. What fails is said, and training goes on."""
        if self._model.context.rank:
            assert self._board is not None
            follow(self._model, self._board)
            return
        started = time.monotonic()
        ranks = TheseRanks(self._model, self._board)
        try:
            asked = self._asked(AskedModel(self._known(progress), ranks))
        except MegalmError as error:
            asked = _Asked(error=str(error))
        finally:
            ranks.close()
        self._callbacks.on_tasks(
            TaskMetrics(
                step=progress.step,
                samples=progress.samples,
                tokens=progress.tokens,
                scores=metrics_row(asked.results),
                headlines=tuple((each.task.name, each.metrics[0].name) for each in asked.results),
                seconds=time.monotonic() - started,
                error=asked.error,
            )
        )

    def _asked(self, model: AskedModel) -> _Asked:
        """One task after the other, and no further one once a stop is asked for: a scheduler does not wait for them."""
        results: list[TaskResult] = []
        for task in self._tasks:
            if self._stop.pending() is not None:
                left = ", ".join(each.task.name for each in self._tasks[len(results) :])
                return _Asked(results, f"not asked, since the run was told to stop: {left}")
            results += evaluate_tasks(model, [task])
            save_results(model.found.run, results[-1:], model.config)
        return _Asked(results)

    def _known(self, progress: Progress) -> KnownModel:
        known = self._model.found
        return replace(known, checkpoint=known.run / CHECKPOINTS_FOLDER / step_folder(progress.step))


@dataclass(frozen=True)
class _Asked:
    """What came of the tasks, and why there is no more of it."""

    results: Sequence[TaskResult] = ()
    error: str | None = None


def asking_context(context: ParallelContext) -> ParallelContext:
    """The same ranks, where those of a context-parallel group are replicas; their other groups stay as they are."""
    trained = context.topology
    topology = Topology(tp=trained.tp, pp=trained.pp, dp=trained.dp * trained.cp, virtual_stages=trained.virtual_stages)
    return replace(context, topology=topology, cp_group=Group((context.rank,), 0), inner_groups={})
