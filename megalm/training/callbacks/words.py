"""The lines of the console, as pure functions of what they show."""

from __future__ import annotations

import math

from megalm.data.stream.batch_size import BatchSize
from megalm.training.callbacks.base import (
    CheckpointMetrics,
    Outcome,
    RunContext,
    StepMetrics,
    TaskMetrics,
    ValidationMetrics,
)


def banner(context: RunContext) -> list[str]:
    """What is about to be trained, how, on what, where results go; and in a fifth line, which weights were loaded."""
    config, model = context.config, context.config.model
    batch_size = BatchSize.of(config.train, model.sequence_length)
    rise = f"{batch_size.start} rising to " if len(batch_size.sizes) > 1 else ""
    planned = batch_size.tokens_after(context.total_steps) if context.total_tokens is None else context.total_tokens
    tokens = format_count(planned)
    zero = f", ZeRO-{config.engine.zero_stage}" if config.engine.zero_stage else ""
    kind = "GPT" if model.causal else "BERT"
    peak = f", MFU relative to {context.mfu_peak}" if context.mfu_peak else ""
    lines = [
        f"megalm   {config.run.name}: {kind}, {format_count(context.parameters)} parameters "
        f"({model.num_layers} layers, hidden {model.hidden_size}, {model.num_heads} heads), {config.engine.dtype}",
        f"layout   {context.topology} on {context.device}{zero}{peak}",
        f"batch    {rise}{config.train.global_batch_size} x {model.sequence_length} tokens; "
        f"{context.total_steps:,} steps = {tokens} tokens of {', '.join(config.data.path)}",
        f"output   {context.run_dir}",
    ]
    if context.loaded is not None:
        lines.append(f"loaded   {context.loaded}")
    return lines


def step_summary(metrics: StepMetrics) -> str:
    """What a log line says about a step."""
    mfu = "" if metrics.mfu is None else f"  MFU {metrics.mfu:.1%}"
    return (
        f"{_loss(metrics)}  grad norm {format_number(metrics.grad_norm, '.3f')}  "
        f"lr {metrics.lr:.2e}  {format_count(metrics.tokens_per_second)} tokens/s{mfu}"
    )


def short_step_summary(metrics: StepMetrics) -> str:
    """What fits beside a progress bar on 80 columns."""
    return (
        f"{_loss(metrics)}  grad {format_number(metrics.grad_norm, '.2f')}  "
        f"lr {metrics.lr:.0e}  {format_count(metrics.tokens_per_second)} tok/s"
    )


def step_line(metrics: StepMetrics, total_steps: int, remaining_seconds: float) -> str:
    """What a log file says about a step."""
    remaining = f"  ETA {format_remaining(remaining_seconds)}" if metrics.step < total_steps else ""
    return (
        f"{_step(metrics.step, total_steps)}  {step_summary(metrics)}  "
        f"{format_duration(metrics.step_seconds)}/step{remaining}"
    )


def validation_line(metrics: ValidationMetrics, total_steps: int) -> str:
    """The result of a validation."""
    if metrics.loss is None:
        return f"{_step(metrics.step, total_steps)}  no validation loss: no token of the validation data carries loss"
    parts = [f"{_step(metrics.step, total_steps)}  validation loss {format_number(metrics.loss, '.4f')}"]
    perplexity, accuracy = (metrics.scores.get(name) for name in ("val_perplexity", "val_accuracy"))
    if perplexity is not None:
        parts.append(f"perplexity {format_number(perplexity, ',.2f')}")
    if accuracy is not None:
        parts.append(f"accuracy {accuracy:.1%}")
    return "  ".join(parts)


def task_lines(metrics: TaskMetrics, total_steps: int) -> list[str]:
    """The headline of each task, and what went wrong."""
    step = _step(metrics.step, total_steps)
    lines = []
    for task, metric in metrics.headlines:
        value, low, high = (metrics.scores[f"{task}/{metric}{end}"] for end in ("", "_low", "_high"))
        interval = f"{format_number(low, '.4g')} to {format_number(high, '.4g')}"
        lines.append(f"{step}  task {task}: {metric} {format_number(value, '.4g')} ({interval})")
    if metrics.error is not None:
        lines.append(f"{step}  tasks: {metrics.error}; training goes on")
    return lines


def _loss(metrics: StepMetrics) -> str:
    return f"loss {format_number(metrics.loss, '.4f')}" if metrics.loss_units else "no loss token"


def checkpoint_line(metrics: CheckpointMetrics, total_steps: int) -> str:
    """Where a checkpoint is, and what it cost."""
    stall, write = format_duration(metrics.stall_seconds), format_duration(metrics.write_seconds)
    if metrics.waited_seconds >= _WORTH_SAYING:
        stall += f" of which {format_duration(metrics.waited_seconds)} until the one before was written"
    return f"{_step(metrics.step, total_steps)}  checkpoint {metrics.checkpoint} (stall {stall}, written in {write})"


_WORTH_SAYING = 0.1
"""Seconds of waiting below which a checkpoint's line is silent about them."""


def failed_checkpoint_line(step: int, total_steps: int, reason: str) -> str:
    """Why there is no checkpoint, and what happens now."""
    policy = "training goes on (checkpoint.on_failure=continue) and the next save tries again"
    return f"{_step(step, total_steps)}  {reason}; {policy}"


def end_line(
    outcome: Outcome, last: StepMetrics | None, start_step: int, total_steps: int, elapsed_seconds: float
) -> str:
    """How a run ended, and what to do about it."""
    steps = f"{start_step if last is None else last.step:,} of {total_steps:,} steps"
    if outcome is Outcome.DONE and last is None:
        return f"nothing left to train: {steps} are done"
    if outcome is Outcome.DONE:
        return f"done     {steps} in {format_duration(elapsed_seconds)}"
    what = {
        Outcome.INTERRUPTED: "interrupted and saved",
        Outcome.REQUEUE: "saved, to be requeued",
        Outcome.DIVERGED: "diverged",
        Outcome.FAILED: "failed",
    }[outcome]
    again = "; the same command continues it" if outcome in (Outcome.INTERRUPTED, Outcome.REQUEUE) else ""
    return f"{what} after {steps}{again}"


def format_number(value: float, spec: str) -> str:
    """A number by ``spec``; one that is not finite in capitals, so that it is not overlooked."""
    return format(value, spec) if math.isfinite(value) else str(value).upper()


def format_count(value: float) -> str:
    """A count with a unit prefix: 950, 12.3K, 1.46M, 175B."""
    if not math.isfinite(value):
        return str(value).upper()
    for size, unit in ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "K")):
        if abs(value) >= 0.9995 * size:
            return f"{value / size:.3g}{unit}"
    return f"{value:.0f}"


def format_duration(seconds: float) -> str:
    """A time span: 12 ms, 3.4 s, 5 min 06 s, 7 h 08 min, 2 d 03 h; a question mark where it is unknown."""
    if not math.isfinite(seconds):
        return "?"
    if seconds < 0.9995:
        return f"{seconds * 1000:.0f} ms"
    if seconds < 59.95:
        return f"{seconds:.1f} s"
    minutes, second = divmod(round(seconds), 60)
    hours, minute = divmod(minutes, 60)
    days, hour = divmod(hours, 24)
    if days:
        return f"{days} d {hour:02d} h"
    if hours:
        return f"{hours} h {minute:02d} min"
    return f"{minutes} min {second:02d} s"


def format_remaining(seconds: float) -> str:
    """A time span that is still to come: as :func:`format_duration`, in whole seconds."""
    return f"{seconds:.0f} s" if seconds < 59.5 else format_duration(seconds)


def _step(step: int, total_steps: int) -> str:
    return f"step {step:>{len(str(total_steps))}}/{total_steps}"
