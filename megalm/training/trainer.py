"""The training loop. ``setup.py`` builds what it needs, callbacks log and report, ``save_policy.py`` decides on saves.

All ranks run the same loop and make the same decisions. Whatever a decision depends on (a signal that reached one rank,
a loss that is not finite) is reduced over all ranks at the end of each step.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist

from megalm.config.schema import Config
from megalm.core.parameters import StatePiece
from megalm.data.stream.loader import TrainLoader
from megalm.engine.deepspeed_engine import DeepSpeedEngine, StepResult
from megalm.engine.lr_schedule import LearningRate
from megalm.engine.micro_batches import training_micro_batches
from megalm.engine.validation import Validator
from megalm.errors import DivergedError
from megalm.launch.signals import StopRequest
from megalm.mesh.groups import ParallelContext
from megalm.training.callbacks.base import CallbackList, Outcome, StepMetrics, ValidationMetrics
from megalm.training.metrics import StepTimer, mfu, peak_memory_gib, tokens_per_second
from megalm.training.progress import Progress
from megalm.training.save_policy import SavePolicy
from megalm.training.saving import RunState, Saver
from megalm.training.tasks import TrainingTasks

_STOPS = (None, Outcome.REQUEUE, Outcome.INTERRUPTED)
"""What a stop request means, in ascending precedence; ranks agree on the largest index."""


@dataclass(frozen=True)
class Utilisation:
    """What MFU is computed from: FLOPs per token of the model, and the peak of one device (None: unknown)."""

    flops_per_token: float
    peak_flops: float | None


@dataclass(frozen=True)
class _StepEnd:
    """What all ranks agree on at the end of a step.

    Attributes:
        stop: how the run ends now; None: it goes on.
        save_failed: whether some rank could not write its part of the pending checkpoint.
        minutes_are_up: whether a checkpoint is due by some rank's clock.
    """

    stop: Outcome | None
    save_failed: bool
    minutes_are_up: bool


class Trainer:
    """Steps, validates, saves and stops; see :meth:`fit`.

    Args:
        config: steps, batch sizes, and how often to validate and save.
        context: this rank's place and groups.
        engine: takes the steps; its model knows the objective.
        loader: batches of this replica.
        validator: None: there are no validation data.
        tasks: that the model is asked; None: there are none.
        saver: writes checkpoints.
        callbacks: told of everything that happens.
        learning_rate: of each step.
        utilisation: what MFU is computed from.
        stop: whether this rank was asked to stop.
        progress: where the run stands.
    """

    def __init__(
        self,
        config: Config,
        *,
        context: ParallelContext,
        engine: DeepSpeedEngine,
        loader: TrainLoader,
        validator: Validator | None,
        tasks: TrainingTasks | None,
        saver: Saver,
        callbacks: CallbackList,
        learning_rate: LearningRate,
        utilisation: Utilisation,
        stop: StopRequest,
        progress: Progress,
    ) -> None:
        self._config = config
        self._context = context
        self._engine = engine
        self._loader = loader
        self._validator = validator
        self._tasks = tasks
        self._saves = SavePolicy(config.checkpoint, saver, callbacks, self._snapshot)
        self._callbacks = callbacks
        self._learning_rate = learning_rate
        self._utilisation = utilisation
        self._stop = stop
        self.progress = progress
        self._timer = StepTimer()
        self._validation: ValidationMetrics | None = None
        self._validated_whole_split = False

    def fit(self) -> Outcome:
        """Train from the current step to the last one, or until a stop is asked for; the state is saved either way.

        Raises:
            DivergedError: loss or gradient norm is not finite. The step is not saved.
        """
        steps = self._config.train.steps
        self._timer.restart()
        while self.progress.step < steps:
            metrics, end = self._train_step()
            diverged = divergence(metrics)
            # Before the row is written: a failed save may have filled the disk that the row goes to.
            if self._saves.after_step(failed=end.save_failed, tolerant=diverged is not None):
                self._timer.restart()
            self._callbacks.on_step(metrics)
            if diverged is not None:
                self._saves.finish(tolerant=True)
                left = (
                    "the last checkpoint is from before" if self._saves.has_checkpoints else "no checkpoint was saved"
                )
                raise DivergedError(f"{diverged}; {left}")
            if end.stop is not None and self.progress.step < steps:
                self._saves.save_and_stop(end.stop, self.progress.step)
                return end.stop
            if self._is_due(self._config.train.validate_every) and self.progress.step < steps:
                self._validate(self._config.train.validation_samples)
            if self._is_due(self._config.evaluate.every) and self.progress.step < steps:
                self._ask_tasks()
            due = self._saves.is_due(self.progress.step, minutes_are_up=end.minutes_are_up)
            if due and self.progress.step < steps:
                self._saves.save()
                self._timer.restart()
        self._validate(None)
        self._ask_tasks()
        self._saves.save_last()
        return Outcome.DONE

    def linger(self) -> None:
        """Another error ends this rank: a checkpoint that is being written gets its chance to become complete."""
        self._saves.linger()

    def _train_step(self) -> tuple[StepMetrics, _StepEnd]:
        """One optimizer step over the global batch; what is returned is the same on all ranks."""
        with self._timer.waiting_for_data():
            batch = self._loader.next()
        sequences = len(batch.tokens) * self._context.topology.dp
        tokens = sequences * self._config.model.sequence_length
        rate = self._learning_rate.at(self.progress.tokens, tokens)
        micro_batches, units = training_micro_batches(
            batch, self._config.train.micro_batch_size, self._context, self._engine.model.context_parallel
        )
        result = self._engine.train_step(micro_batches, rate)
        self.progress = self.progress.after(sequences, tokens)
        return self._agree(result, rate, tokens, units)

    def _agree(self, result: StepResult, rate: float, tokens: int, units: int) -> tuple[StepMetrics, _StepEnd]:
        """Two small reductions over all ranks: sums (terms, bubble), and maxima (times, memory, what ends a step)."""
        lap = self._timer.lap()
        world, device = self._context.world_group, self._context.device
        parts = [*result.terms.values(), result.pipeline.bubble_fraction / world.size]
        sums = world.all_reduce(torch.tensor(parts, dtype=torch.float64, device=device))
        own = [
            *lap,
            peak_memory_gib(device.type),
            float(self._requested_stop()),
            float(self._saves.has_failed),
            float(self._saves.minutes_are_up),
        ]
        maxima = world.all_reduce(torch.tensor(own, dtype=torch.float64, device=device), dist.ReduceOp.MAX)
        *values, bubble_fraction = sums.tolist()
        terms = dict(zip(result.terms, values, strict=True))
        step_seconds, data_seconds, memory_gib, stop, save_failed, minutes_are_up = maxima.tolist()
        rate_tokens = tokens_per_second(tokens, step_seconds)
        metrics = StepMetrics(
            step=self.progress.step,
            samples=self.progress.samples,
            tokens=self.progress.tokens,
            loss=terms.pop("loss"),
            loss_units=units,
            grad_norm=result.grad_norm,
            lr=rate,
            loss_scale=result.loss_scale,
            step_seconds=step_seconds,
            tokens_per_second=rate_tokens,
            mfu=mfu(self._utilisation.flops_per_token, rate_tokens, world.size, self._utilisation.peak_flops),
            data_seconds=data_seconds,
            bubble_fraction=bubble_fraction,
            memory_gib=memory_gib,
            unit=self._engine.objective.unit,
            terms=terms,
        )
        return metrics, _StepEnd(_STOPS[int(stop)], bool(save_failed), bool(minutes_are_up))

    def _requested_stop(self) -> int:
        """Index into ``_STOPS`` of what this rank was asked for."""
        signal = self._stop.pending()
        if signal is None:
            return 0
        return _STOPS.index(Outcome.INTERRUPTED if signal == "INT" else Outcome.REQUEUE)

    def _is_due(self, every: int) -> bool:
        """Whether something that happens every so many steps, or never (0), happens after this one."""
        return every > 0 and self.progress.step % every == 0

    def _validate(self, samples: int | None) -> None:
        if self._validator is None:
            return
        self._validated_whole_split = samples is None
        self._validation = ValidationMetrics(
            step=self.progress.step,
            samples=self.progress.samples,
            tokens=self.progress.tokens,
            scores=self._validator.scores(self._engine.evaluate, self._engine.model.context_parallel, samples),
        )
        self._callbacks.on_validation(self._validation)
        self._timer.restart()

    def _ask_tasks(self) -> None:
        if self._tasks is not None:
            self._tasks.ask(self.progress)
            self._timer.restart()

    def _snapshot(self) -> tuple[Sequence[StatePiece], RunState]:
        """What a checkpoint of this moment holds."""
        validated = self._validation is not None and self._validation.step == self.progress.step
        return self._engine.state_pieces(), RunState(
            self._loader.state_dict(),
            self._engine.scalar_state(),
            self.progress,
            self._validation if validated else None,
            whole_split=self._validated_whole_split,
            schedule=self._learning_rate,
        )


def divergence(metrics: StepMetrics) -> DivergedError | None:
    """Why training cannot go on; None: it can."""
    # A gradient that overflows fp16 is no divergence: the optimizer skips the step and the loss scale falls, down to 1.
    may_overflow = metrics.loss_scale is not None and metrics.loss_scale > 1.0
    if math.isfinite(metrics.loss) and (math.isfinite(metrics.grad_norm) or may_overflow):
        return None
    return DivergedError(
        f"step {metrics.step}: loss {metrics.loss:g}, gradient norm {metrics.grad_norm:g}: training diverged and "
        "stopped. Try a smaller optim.lr or a longer optim.warmup_tokens"
    )
