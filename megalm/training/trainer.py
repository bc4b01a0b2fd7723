"""The training loop. ``setup.py`` builds what it needs, callbacks log and report, ``save_policy.py`` decides on saves.

All ranks run the same loop and make the same decisions. Whatever a decision depends on (a signal that reached one rank,
a loss that is not finite) is reduced over all ranks at the end of each step.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from megalm.config.schema import Config
from megalm.core.parameters import StatePiece
from megalm.data.stream.loader import TrainLoader
from megalm.engine.deepspeed_engine import DeepSpeedEngine
from megalm.engine.feed import Feed
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
from megalm.training.step_report import Agreed, OwnNumbers, StepReport

if TYPE_CHECKING:
    from megalm.training.tasks import TrainingTasks

_STOPS = (None, Outcome.REQUEUE, Outcome.INTERRUPTED)
"""What a stop request means, in ascending precedence; ranks agree on the largest index."""


@dataclass(frozen=True)
class Utilisation:
    """What MFU is computed from: FLOPs per token of the model, and the peak of one device (None: unknown)."""

    flops_per_token: float
    peak_flops: float | None


@dataclass(frozen=True)
class _Step:
    """A step that this rank has started, and whose values nobody has looked at yet.

    Attributes:
        report: its values.
        progress: where the run stands after it.
        tokens: of its global batch.
        rate: learning rate that it is taken with.
        loss_scale: that it is taken with; None: there is none.
    """

    report: StepReport
    progress: Progress
    tokens: int
    rate: float
    loss_scale: float | None


@dataclass(frozen=True)
class _StepEnd:
    """What all ranks agree on at the end of a step.

    Attributes:
        stop: how the run ends now; None: it goes on.
        minutes_are_up: whether a checkpoint is due by some rank's clock.
    """

    stop: Outcome | None = None
    minutes_are_up: bool = False

    @property
    def asks_for_something(self) -> bool:
        """Whether the loop has to act on it."""
        return self.stop is not None or self.minutes_are_up


class Trainer:
    """Steps, validates, saves and stops; see :meth:`fit`.

    Args:
        config: steps, batch sizes, and how often to validate and save.
        context: this rank's place and groups.
        engine: takes the steps; its model knows the objective.
        loader: batches of this replica.
        feed: brings them to this rank.
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
        feed: Feed,
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
        self._loader, self._feed = loader, feed
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

        With ``train.late_metrics`` a step's values are looked at when the next step has been started, unless something
        depends on them; a stop and a divergence are then found one step later. Nothing is saved before the values of
        every step that it contains have been looked at.

        Raises:
            DivergedError: loss or gradient norm is not finite. The step is not saved.
        """
        steps = self._config.train.steps
        self._timer.restart()
        started: _Step | None = None
        while self.progress.step < steps:
            before, started = started, self._start_step()
            end = _StepEnd() if before is None else self._finish_step(before)
            if self._config.train.late_metrics and not end.asks_for_something and not self._something_is_due:
                continue
            last, started = self._finish_step(started), None
            if self.progress.step == steps:
                break
            if (stop := last.stop or end.stop) is not None:
                self._saves.save_and_stop(stop, self.progress.step)
                return stop
            if self._is_due(self._config.train.validate_every):
                self._validate(self._config.train.validation_samples)
            if self._is_due(self._config.evaluate.every):
                self._ask_tasks()
            minutes_are_up = last.minutes_are_up or end.minutes_are_up
            if self._saves.is_due(self.progress.step, minutes_are_up=minutes_are_up):
                self._saves.save()
                self._timer.restart()
        self._validate(None)
        self._ask_tasks()
        self._saves.save_last()
        return Outcome.DONE

    def linger(self) -> None:
        """Another error ends this rank: a checkpoint that is being written gets its chance to become complete."""
        self._saves.linger()

    def _start_step(self) -> _Step:
        """One optimizer step over the global batch; on a GPU it is computed after this returns."""
        with self._timer.waiting_for_data():
            batch = self._feed.next(self._loader)
        sequences = batch.rows * self._context.topology.dp
        tokens = sequences * self._config.model.sequence_length
        rate = self._learning_rate.at(self.progress.tokens, tokens)
        micro_batches, units = training_micro_batches(
            batch, self._config.train.micro_batch_size, self._context, self._engine.model.context_parallel
        )
        result = self._engine.train_step(micro_batches, rate)
        self.progress = self.progress.after(sequences, tokens)
        report = StepReport(result, units, self._own_numbers(), self._context)
        return _Step(report, self.progress, tokens, rate, result.loss_scale)

    def _finish_step(self, step: _Step) -> _StepEnd:
        """Look at a step's values, tell of them, and end the run if it has diverged; the same on all ranks."""
        agreed = step.report.read()
        metrics = self._metrics(step, agreed)
        diverged = divergence(metrics)
        # Before the row is written: a failed save may have filled the disk that the row goes to.
        if self._saves.after_step(failed=agreed.largest.save_failed, tolerant=diverged is not None):
            self._timer.restart()
        self._callbacks.on_step(metrics)
        if diverged is not None:
            self._saves.finish(tolerant=True)
            left = "the last checkpoint is from before" if self._saves.has_checkpoints else "no checkpoint was saved"
            raise DivergedError(f"{diverged}; {left}")
        return _StepEnd(_STOPS[agreed.largest.stop], agreed.largest.minutes_are_up)

    def _own_numbers(self) -> OwnNumbers:
        step_seconds, data_seconds = self._timer.lap()
        return OwnNumbers(
            step_seconds=step_seconds,
            data_seconds=data_seconds,
            memory_gib=peak_memory_gib(self._context.device.type),
            stop=self._requested_stop(),
            save_failed=self._saves.has_failed,
            minutes_are_up=self._saves.minutes_are_up,
        )

    def _metrics(self, step: _Step, agreed: Agreed) -> StepMetrics:
        """The row of a step."""
        terms, largest = dict(agreed.terms), agreed.largest
        ranks, used = self._context.world_group.size, self._utilisation
        rate_tokens = tokens_per_second(step.tokens, largest.step_seconds)
        return StepMetrics(
            step=step.progress.step,
            samples=step.progress.samples,
            tokens=step.progress.tokens,
            loss=terms.pop("loss"),
            loss_units=agreed.units,
            grad_norm=agreed.grad_norm,
            lr=step.rate,
            loss_scale=step.loss_scale,
            step_seconds=largest.step_seconds,
            tokens_per_second=rate_tokens,
            mfu=mfu(used.flops_per_token, rate_tokens, ranks, used.peak_flops),
            data_seconds=largest.data_seconds,
            bubble_fraction=agreed.bubble_fraction,
            memory_gib=largest.memory_gib,
            unit=self._engine.objective.unit,
            terms=terms,
        )

    def _requested_stop(self) -> int:
        """Index into ``_STOPS`` of what this rank was asked for."""
        signal = self._stop.pending()
        if signal is None:
            return 0
        return _STOPS.index(Outcome.INTERRUPTED if signal == "INT" else Outcome.REQUEUE)

    def _is_due(self, every: int) -> bool:
        """Whether something that happens every so many steps, or never (0), happens after this one."""
        return every > 0 and self.progress.step % every == 0

    @property
    def _something_is_due(self) -> bool:
        """Whether something comes after this step that depends on its values, or begins with them."""
        train = self._config.train
        return (
            self.progress.step == train.steps
            or self._is_due(train.validate_every)
            or self._is_due(self._config.evaluate.every)
            or self._saves.is_due(self.progress.step, minutes_are_up=False)
        )

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
