"""What a training run tells the outside: the events, the rows that go with them, and who gets them.

Callbacks live on rank 0 alone and contain no collective, so a slow or broken one cannot set ranks against each other.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from pathlib import Path
from typing import Any, ClassVar

from megalm.config.schema import Config


@dataclass(frozen=True, kw_only=True)
class Attempt:
    """One start of a run, the first or a later one.

    Attributes:
        number: counts from 1.
        config: where the config that it was started with is kept, in the run's folder.
        step: steps taken before it.
        samples: sequences trained on before it.
        tokens: tokens trained on before it.
        began_with: the checkpoint that was loaded; None for initial weights.
        changes: each field of the config that is not what the resumed checkpoint was trained with, as ``(before,
            after)``.
    """

    number: int
    config: str
    step: int
    samples: int
    tokens: int
    began_with: str | None = None
    changes: Mapping[str, tuple[Any, Any]] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class RunContext:
    """What is known before the first step.

    Attributes:
        config: the run's config.
        run_dir: the run's folder.
        start_step: steps already taken; the first step of this process is the next one.
        total_steps: steps of the whole run.
        topology: the layout, in words.
        device: what the ranks compute on, in words.
        parameters: trainable parameters of the whole model, a tied embedding once.
        total_tokens: tokens of the whole run: those it has seen, and those of the steps to come; None: what
            the config plans from the beginning.
        attempt: this start of the run; None: it is not recorded.
        loaded: what the run began with, in one line: how, of which step, from where, and a hash of the parameters; None
            for initial weights.
        mfu_peak: the peak throughput that ``mfu`` is relative to, in words; None where it is unknown.
    """

    config: Config
    run_dir: Path
    start_step: int
    total_steps: int
    topology: str
    device: str
    parameters: int
    total_tokens: int | None = None
    attempt: Attempt | None = None
    loaded: str | None = None
    mfu_peak: str | None = None


@dataclass(frozen=True, kw_only=True)
class StepMetrics:
    """One optimizer step.

    Attributes:
        step: steps taken since the start of the run, this one included.
        samples: sequences consumed since the start of the run.
        tokens: tokens consumed since the start of the run.
        loss: mean loss of the global batch, for language models in nats per token that carries loss; 0 where nothing
            carries loss.
        loss_units: what the mean is over: how many tokens, or other units, of the global batch carry loss.
        grad_norm: global L2 norm of the gradient before clipping.
        lr: learning rate that the step was taken with.
        loss_scale: fp16 loss scale; None for other formats.
        step_seconds: wall time of the step.
        tokens_per_second: tokens of the global batch over ``step_seconds``.
        mfu: model FLOPs utilisation, 0 to 1 (Chowdhery et al. 2022); None where the peak is unknown.
        data_seconds: time the step waited for data.
        bubble_fraction: idle share of the pipeline schedule, 0 to 1; on GPUs that of the step before, 0 at first.
        memory_gib: peak memory per rank so far, the largest over ranks.
        unit: what the loss is a mean over, such as ``token``.
        terms: terms of the objective besides ``loss``, by name.
    """

    step: int
    samples: int
    tokens: int
    loss: float
    loss_units: int
    grad_norm: float
    lr: float
    loss_scale: float | None
    step_seconds: float
    tokens_per_second: float
    mfu: float | None
    data_seconds: float
    bubble_fraction: float
    memory_gib: float
    unit: str = "token"
    terms: Mapping[str, float] = field(default_factory=dict)

    def row(self) -> dict[str, Any]:
        """The fields of ``metrics.jsonl``: a field per attribute, a field per term, and ``loss_tokens``."""
        names = {"loss_units": f"loss_{self.unit}s"}
        own = {names.get(name, name): value for name, value in vars(self).items() if name not in ("unit", "terms")}
        return {**own, **self.terms}


@dataclass(frozen=True, kw_only=True)
class ValidationMetrics:
    """One validation, after ``step`` steps.

    Attributes:
        step: steps taken since the start of the run.
        samples: sequences trained on since the start of the run.
        tokens: tokens trained on since the start of the run.
        scores: what the objective reports, by the names of ``metrics.jsonl``; of language models ``val_loss`` in nats
            per token, ``val_perplexity``, ``val_accuracy`` (share of labels that the model holds most likely),
            ``val_commonest`` (the same of always guessing the commonest label) and ``val_tokens`` (how many labels
            these are means over). None where nothing carries loss.
    """

    step: int
    samples: int
    tokens: int
    scores: Mapping[str, float | int | None]

    @property
    def loss(self) -> float | None:
        """``val_loss``, which every objective reports."""
        return self.scores["val_loss"]

    def row(self) -> dict[str, Any]:
        """The fields of ``metrics.jsonl``."""
        return {"step": self.step, "samples": self.samples, "tokens": self.tokens, **self.scores}


@dataclass(frozen=True, kw_only=True)
class TaskMetrics:
    """One evaluation on the tasks of ``evaluate.tasks``, after ``step`` steps.

    Attributes:
        step: steps taken since the start of the run.
        samples: sequences trained on since the start of the run.
        tokens: tokens trained on since the start of the run.
        scores: by ``TASK/METRIC``, and the ends of its 95 % interval by ``TASK/METRIC_low`` and ``…_high``.
        headlines: each task that was asked, with the name of its first metric.
        seconds: time that training stood still for it.
        error: why some tasks were not asked, or have no result; None: all have.
    """

    step: int
    samples: int
    tokens: int
    scores: Mapping[str, float]
    headlines: tuple[tuple[str, str], ...]
    seconds: float
    error: str | None = None

    def row(self) -> dict[str, Any]:
        """The fields of ``metrics.jsonl``."""
        place = {"step": self.step, "samples": self.samples, "tokens": self.tokens}
        failed = {} if self.error is None else {"tasks_error": self.error}
        return {**place, **self.scores, "tasks_seconds": self.seconds, **failed}


@dataclass(frozen=True, kw_only=True)
class CheckpointMetrics:
    """One checkpoint that is complete.

    Attributes:
        step: steps that it has seen; training may be further.
        checkpoint: its folder.
        stall_seconds: time that training stood still for it.
        waited_seconds: the part of the stall in which the checkpoint before was still being written.
        write_seconds: time from then until it was complete, while training went on.
        gigabytes: what all ranks wrote, in 10⁹ bytes.
    """

    step: int
    checkpoint: str
    stall_seconds: float
    write_seconds: float
    gigabytes: float
    waited_seconds: float = 0.0


class Outcome(StrEnum):
    """How a run ended."""

    DONE = "done"
    """All steps were taken."""
    INTERRUPTED = "interrupted"
    """Stopped by the user, after saving."""
    REQUEUE = "requeue"
    """Stopped by a signal or a deadline, after saving; the job is to be queued again."""
    DIVERGED = "diverged"
    """Loss or gradient norm was not finite and the policy gave up."""
    FAILED = "failed"
    """An error stopped the run."""


class Callback:
    """Something that follows a run; every hook does nothing unless overridden."""

    essential: ClassVar[bool] = False
    """Whether the run must stop when this callback fails. Others warn once and are dropped."""

    @property
    def name(self) -> str:
        """What the callback is called in a warning."""
        return type(self).__name__

    def on_start(self, context: RunContext) -> None:
        """Before the first step."""

    def on_step(self, metrics: StepMetrics) -> None:
        """After each optimizer step."""

    def on_validation(self, metrics: ValidationMetrics) -> None:
        """After each validation."""

    def on_tasks(self, metrics: TaskMetrics) -> None:
        """After each evaluation on tasks."""

    def on_checkpoint(self, metrics: CheckpointMetrics) -> None:
        """After a checkpoint is complete."""

    def on_checkpoint_failed(self, step: int, reason: str) -> None:
        """After a checkpoint could not be written and training goes on."""

    def on_end(self, outcome: Outcome) -> None:
        """After the last step, in whatever way the run ended."""

    def close(self) -> None:
        """Release files, threads and processes; called once, also when an exception ends the run."""


class CallbackList(Callback):
    """Calls several callbacks in order, and keeps training alive when one that is not essential fails."""

    essential = True

    def __init__(self, callbacks: Iterable[Callback]) -> None:
        self.callbacks = list(callbacks)

    def on_start(self, context: RunContext) -> None:
        """Pass on to every callback."""
        self._call("on_start", context)

    def on_step(self, metrics: StepMetrics) -> None:
        """Pass on to every callback."""
        self._call("on_step", metrics)

    def on_validation(self, metrics: ValidationMetrics) -> None:
        """Pass on to every callback."""
        self._call("on_validation", metrics)

    def on_tasks(self, metrics: TaskMetrics) -> None:
        """Pass on to every callback."""
        self._call("on_tasks", metrics)

    def on_checkpoint(self, metrics: CheckpointMetrics) -> None:
        """Pass on to every callback."""
        self._call("on_checkpoint", metrics)

    def on_checkpoint_failed(self, step: int, reason: str) -> None:
        """Pass on to every callback."""
        self._call("on_checkpoint_failed", step, reason)

    def on_end(self, outcome: Outcome) -> None:
        """Pass on to every callback."""
        self._call("on_end", outcome)

    def close(self) -> None:
        """Close every callback, in reverse order, even when an essential one fails at it."""
        while self.callbacks:
            callback = self.callbacks.pop()
            try:
                self._guarded(callback, "close")
            except Exception:
                self.close()
                raise

    def _call(self, hook: str, *arguments: object) -> None:
        failed = [callback for callback in self.callbacks if not self._guarded(callback, hook, *arguments)]
        for callback in failed:
            self.callbacks.remove(callback)
            self._guarded(callback, "close", quiet=True)

    def _guarded(self, callback: Callback, hook: str, *arguments: object, quiet: bool = False) -> bool:
        """Whether the hook worked; an essential callback's exception is passed on."""
        try:
            getattr(callback, hook)(*arguments)
        except Exception as error:
            if callback.essential:
                raise
            if not quiet:
                warn(f"{callback.name} failed in {hook} and is off from here on: {describe_error(error)}")
            return False
        return True


def describe_error(error: BaseException) -> str:
    """The type of an exception and the first line of its text."""
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__


def warn(text: str) -> None:
    """One line on standard error, which a progress bar shows above itself."""
    print(f"warning: {text}", file=sys.stderr, flush=True)
