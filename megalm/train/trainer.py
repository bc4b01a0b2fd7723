"""The training loop. What is not a step hangs on callbacks; what has to be built is built in ``setup.py``.

All ranks run the same loop and make the same decisions: whatever a decision depends on (a signal that reached one rank,
a loss that is not finite) is agreed on by all ranks in the one exchange that ends each step.
"""

from __future__ import annotations

import math
import time
from dataclasses import dataclass

import torch
import torch.distributed as dist

from megalm.config.schema import Config
from megalm.data.stream.loader import TrainLoader
from megalm.engine.deepspeed_engine import DeepSpeedEngine, StepResult
from megalm.engine.lr_schedule import LearningRate
from megalm.engine.micro_batches import training_micro_batches
from megalm.errors import CheckpointError, DivergedError
from megalm.launch.signals import StopRequest
from megalm.mesh.groups import ParallelContext
from megalm.train.callbacks.base import CallbackList, CheckpointMetrics, Outcome, StepMetrics, ValidationMetrics
from megalm.train.metrics import StepTimer, mfu, peak_memory_gib, perplexity, tokens_per_second
from megalm.train.progress import Progress
from megalm.train.saving import RunState, Saver, is_fault_of_disk
from megalm.train.validation import Validator

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
        stop: how the run is to end now; None: it goes on.
        save_failed: whether some rank could not write its part of the pending checkpoint.
    """

    stop: Outcome | None
    save_failed: bool


class Trainer:
    """Steps, validates, saves and stops; see :meth:`fit`.

    ``eos_id`` ends a document, with which attention and positions begin anew; None: rows are one document each.
    """

    def __init__(
        self,
        config: Config,
        *,
        context: ParallelContext,
        engine: DeepSpeedEngine,
        loader: TrainLoader,
        validator: Validator | None,
        saver: Saver,
        callbacks: CallbackList,
        learning_rate: LearningRate,
        utilisation: Utilisation,
        stop: StopRequest,
        progress: Progress,
        eos_id: int | None = None,
    ) -> None:
        self._config = config
        self._context = context
        self._engine = engine
        self._loader = loader
        self._validator = validator
        self._saver = saver
        self._callbacks = callbacks
        self._learning_rate = learning_rate
        self._utilisation = utilisation
        self._stop = stop
        self.progress = progress
        self._eos_id = eos_id
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
            self._follow_save(failed=end.save_failed, tolerant=diverged is not None)
            self._callbacks.on_step(metrics)
            if diverged is not None:
                self._finish_save(tolerant=True)
                has_saved = self._saver.has_checkpoints
                left = "the last checkpoint is from before" if has_saved else "no checkpoint was saved"
                raise DivergedError(f"{diverged}; {left}")
            if end.stop is not None and self.progress.step < steps:
                self._save_and_stop(end.stop)
                return end.stop
            if _is_due(self._config.train.validate_every, self.progress.step) and self.progress.step < steps:
                self._validate(self._config.train.validation_samples)
            if _is_due(self._config.checkpoint.every, self.progress.step) and self.progress.step < steps:
                self._save()
        self._validate(None)
        self._save_for_good()
        return Outcome.DONE

    def _train_step(self) -> tuple[StepMetrics, _StepEnd]:
        """One optimizer step over the global batch; what is returned is the same on all ranks."""
        with self._timer.waiting_for_data():
            batch = self._loader.next()
        tokens = batch.global_size * self._config.model.sequence_length
        rate = self._learning_rate.at(self.progress.tokens, tokens)
        micro_batches, loss_tokens = training_micro_batches(
            batch,
            self._config.train.micro_batch_size,
            self._context,
            self._engine.model.context_parallel,
            eos_id=self._eos_id,
        )
        result = self._engine.train_step(micro_batches, rate)
        self.progress = self.progress.after(batch.global_size, tokens)
        return self._agree(result, rate, tokens, loss_tokens)

    def _agree(self, result: StepResult, rate: float, tokens: int, loss_tokens: int) -> tuple[StepMetrics, _StepEnd]:
        """Two small reductions over all ranks: sums (loss, bubble), and maxima (times, memory, what ends a step)."""
        step_seconds, data_seconds = self._timer.lap()
        ranks = self._context.world_group.size
        device = self._context.device
        sums = torch.tensor(
            [result.loss_sum, result.pipeline.bubble_fraction / ranks], dtype=torch.float64, device=device
        )
        maxima = torch.tensor(
            [
                step_seconds,
                data_seconds,
                peak_memory_gib(device.type),
                float(self._requested_stop()),
                float(self._saver.has_failed),
            ],
            dtype=torch.float64,
            device=device,
        )
        self._context.world_group.all_reduce(sums)
        self._context.world_group.all_reduce(maxima, dist.ReduceOp.MAX)
        loss, bubble_fraction = sums.tolist()
        step_seconds, data_seconds, memory_gib, stop, save_failed = maxima.tolist()
        rate_tokens = tokens_per_second(tokens, step_seconds)
        metrics = StepMetrics(
            step=self.progress.step,
            samples=self.progress.samples,
            tokens=self.progress.tokens,
            loss=loss,
            loss_tokens=loss_tokens,
            grad_norm=result.grad_norm,
            lr=rate,
            loss_scale=result.loss_scale,
            step_seconds=step_seconds,
            tokens_per_second=rate_tokens,
            mfu=mfu(self._utilisation.flops_per_token, rate_tokens, ranks, self._utilisation.peak_flops),
            data_seconds=data_seconds,
            bubble_fraction=bubble_fraction,
            memory_gib=memory_gib,
        )
        return metrics, _StepEnd(_STOPS[int(stop)], bool(save_failed))

    def _requested_stop(self) -> int:
        """Index into ``_STOPS`` of what this rank was asked for."""
        signal = self._stop.pending()
        if signal is None:
            return 0
        return _STOPS.index(Outcome.INTERRUPTED if signal == "INT" else Outcome.REQUEUE)

    def _validate(self, samples: int | None) -> None:
        if self._validator is None:
            return
        scores = self._validator.scores(self._engine, samples)
        self._validated_whole_split = samples is None
        self._validation = ValidationMetrics(
            step=self.progress.step,
            samples=self.progress.samples,
            tokens=self.progress.tokens,
            val_loss=scores.loss,
            val_perplexity=None if scores.loss is None else perplexity(scores.loss),
            val_accuracy=scores.accuracy,
            val_commonest=scores.commonest,
            val_tokens=scores.tokens,
        )
        self._callbacks.on_validation(self._validation)
        self._timer.restart()

    def _save(self) -> None:
        """Begin a checkpoint, and wait for it only where saving is not asynchronous."""
        self._begin_save()
        if not self._config.checkpoint.asynchronous:
            self._finish_save(training_waits=True)
        self._timer.restart()

    def _save_for_good(self) -> None:
        """The checkpoint that the run ends with: nothing comes after it that could make up for a failure."""
        self._begin_save()
        self._report(self._saver.finish(training_waits=True))
        self._saver.close()

    def _save_and_stop(self, stop: Outcome) -> None:
        """A job that is queued again goes on from the newest checkpoint there is, should this one fail."""
        try:
            self._save_for_good()
        except CheckpointError as error:
            if stop is not Outcome.REQUEUE or not self._saver.has_checkpoints:
                raise
            self._callbacks.on_checkpoint_failed(self.progress.step, str(error))

    def linger(self) -> None:
        """Another error ends this rank: a checkpoint that is being written gets its chance to become complete."""
        self._saver.linger()

    def _begin_save(self) -> None:
        """The save before is finished first."""
        began = time.perf_counter()
        self._finish_save()
        waited_seconds = time.perf_counter() - began
        validated = self._validation is not None and self._validation.step == self.progress.step
        state = RunState(
            self._loader.state_dict(),
            self._engine.scalar_state(),
            self.progress,
            self._validation if validated else None,
            whole_split=self._validated_whole_split,
            schedule=self._learning_rate,
        )
        self._saver.start(self._engine.state_pieces(), state, stall_began=began, waited_seconds=waited_seconds)

    def _follow_save(self, *, failed: bool, tolerant: bool) -> None:
        """After a step: tell of a checkpoint that is complete, and deal with one that failed on any rank."""
        if not failed:
            self._report(self._saver.newly_complete())
            return
        self._saver.call_off()
        self._finish_save(tolerant=tolerant)
        self._timer.restart()

    def _finish_save(self, *, training_waits: bool = False, tolerant: bool = False) -> None:
        """Wait for the save that is being written.

        Args:
            training_waits: whether the wait is part of the save's stall.
            tolerant: a failure is told of and no more, whatever the config says.

        Raises:
            CheckpointError: it failed, and the run is to stop for that.
        """
        step = self._saver.pending_step
        try:
            self._report(self._saver.finish(training_waits=training_waits))
        except CheckpointError as error:
            if not tolerant and (self._config.checkpoint.on_failure == "stop" or not is_fault_of_disk(str(error))):
                raise
            assert step is not None, "what is not pending cannot fail"
            self._callbacks.on_checkpoint_failed(step, str(error))

    def _report(self, metrics: CheckpointMetrics | None) -> None:
        if metrics is not None:
            self._callbacks.on_checkpoint(metrics)


def divergence(metrics: StepMetrics) -> DivergedError | None:
    """Why training cannot go on; None: it can."""
    # A gradient that overflows fp16 costs its step alone:
    # the optimizer skips it and the loss scale falls, to 1 at last.
    may_overflow = metrics.loss_scale is not None and metrics.loss_scale > 1.0
    if math.isfinite(metrics.loss) and (math.isfinite(metrics.grad_norm) or may_overflow):
        return None
    return DivergedError(
        f"step {metrics.step}: loss {metrics.loss:g}, gradient norm {metrics.grad_norm:g}: training diverged and "
        "stopped. Try a smaller optim.lr or a longer optim.warmup_tokens"
    )


def _is_due(every: int, step: int) -> bool:
    return every > 0 and step % every == 0
