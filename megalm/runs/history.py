"""What a run has done, as its checkpoint says it, and how its schedule goes on from there. No torch.

Tokens, samples and the learning rate's course are facts of a checkpoint. None of them is computed again from a config
that may have changed since: only what is still to come is.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

from megalm.checkpoint.manifest import Manifest
from megalm.config.schema import Config, Optim, Train
from megalm.config.violation import Fix, Violation
from megalm.data.stream.batch_size import BatchSize
from megalm.engine.lr_schedule import Course, LearningRate

SCHEDULE = "schedule"
"""Where a manifest's ``training`` has the course of the learning rate, and the tokens that the run planned."""

_Section = TypeVar("_Section", Optim, Train)


@dataclass(frozen=True)
class History:
    """A run up to a checkpoint.

    Attributes:
        step: optimizer steps taken.
        samples: sequences trained on.
        tokens: tokens of those sequences.
        planned_steps: ``train.steps`` of the config that wrote the checkpoint.
        schedule: the learning rate that the run has followed.
    """

    step: int
    samples: int
    tokens: int
    planned_steps: int
    schedule: LearningRate

    @property
    def was_complete(self) -> bool:
        """Whether the run had taken all the steps that it was asked for."""
        return self.step >= self.planned_steps


def history_of(manifest: Manifest) -> History:
    """What a checkpoint that a run can be resumed from says of the run.

    A checkpoint without a course is of a version that had none, and followed what its own config says.
    """
    progress = manifest.training["progress"]
    optim, train = _section(Optim, manifest.config["optim"]), _section(Train, manifest.config["train"])
    stored = manifest.training.get(SCHEDULE)
    if stored is None:
        total = BatchSize.of(train, manifest.config["model"]["sequence_length"]).tokens_after(train.steps)
        schedule = LearningRate(optim, total, Course.of(optim, total))
    else:
        schedule = LearningRate(optim, stored["total_tokens"], Course.from_dict(stored))
    return History(progress["step"], progress["samples"], progress["tokens"], train.steps, schedule)


def schedule_to_dict(schedule: LearningRate) -> dict[str, Any]:
    """What a checkpoint stores of a schedule besides its config."""
    return {**schedule.course.to_dict(), "total_tokens": schedule.total_tokens}


def batch_size_for(config: Config, history: History | None) -> BatchSize:
    """The batch sizes of the steps to come: a ramp is where the tokens that the run has seen have brought it."""
    planned = BatchSize.of(config.train, config.model.sequence_length)
    return planned if history is None else planned.resumed(history.samples, history.tokens)


def samples_at_end(config: Config, history: History | None) -> int:
    """Samples that the run will have taken at its last step: those taken, and those of the steps that are left."""
    return batch_size_for(config, history).samples_after(_steps_left(config, history))


def schedule_for(config: Config, history: History | None) -> LearningRate:
    """The learning rate of the steps to come; a run without a history begins."""
    total = batch_size_for(config, history).tokens_after(_steps_left(config, history))
    if history is None:
        return LearningRate(config.optim, total)
    return history.schedule.resumed(config.optim, history.tokens, total)


def schedule_violations(config: Config, history: History) -> list[str]:
    """Why the schedule of a resumed run is no use, one line each."""
    schedule, optim = schedule_for(config, history), config.optim
    asked = optim.rewarm_tokens not in (None, history.schedule.optim.rewarm_tokens)
    found = []
    if asked and optim.decay_tokens is not None and optim.schedule != "constant":
        warm = schedule.course.warmup_end
        if warm >= optim.decay_tokens:
            found.append(
                Violation(
                    "optim.rewarm_tokens",
                    optim.rewarm_tokens,
                    f"from the {history.tokens:,} tokens done it ends at {warm:,}, not below "
                    f"optim.decay_tokens={optim.decay_tokens}, where the decay ends",
                    fixes=(Fix("optim.decay_tokens", (None,)),),
                )
            )
    is_extended = history.was_complete and config.train.steps > history.step
    if is_extended and schedule.is_over(history.tokens) and schedule.floor == 0.0:
        found.append(
            Violation(
                "train.steps",
                config.train.steps,
                f"the learning rate has fallen to 0 by the run's end at step {history.step:,}, so more steps would "
                "learn nothing",
                f"add optim.rewarm_tokens={_example_rewarm(config, history)}, which rises to optim.lr again, or "
                "optim.min_lr_ratio above 0",
            )
        )
    return [str(violation) for violation in found]


def schedule_lines(config: Config, history: History) -> list[str]:
    """What a resumed run's learning rate does otherwise than the run had planned; nothing where it is as planned."""
    before, now, tokens = history.schedule, schedule_for(config, history), history.tokens
    optim, course = config.optim, now.course
    step_tokens = batch_size_for(config, history).at(history.samples) * config.model.sequence_length
    reached, first = before.reached(tokens), now.at(tokens, step_tokens)
    where = f"at step {history.step + 1:,}"
    again = f"optim.rewarm_tokens={_example_rewarm(config, history)} rises to optim.lr={optim.lr:g} again"
    lines = []
    if optim.rewarm_tokens is not None and optim.rewarm_tokens == before.optim.rewarm_tokens:
        lines.append(f"optim.rewarm_tokens={optim.rewarm_tokens}: the checkpoint has it already; it is done once")
    elif optim.rewarm_tokens is not None:
        rise = f"rises from {reached:.3g} to {optim.lr:g} over {optim.rewarm_tokens:,} tokens (optim.rewarm_tokens)"
        return [*lines, f"learning rate: {rise}, then {_ending(now, rest='its decay')}"]
    is_as_planned = course == before.course and _plan(optim) == _plan(before.optim)
    if is_as_planned and not (before.is_over(tokens) and now.total_tokens != before.total_tokens):
        return lines
    if before.is_over(tokens) and now.is_over(tokens):
        stays = f"the decay ended at {course.decay_end:,} tokens, so it stays at its floor, {now.floor:.3g}"
        return [*lines, f"learning rate: {stays} ({again}; optim.decay_tokens=N follows a longer decay)"]
    if before.is_over(tokens):
        jump = f"{reached:.3g} → {first:.3g} {where}, on the new schedule of optim.decay_tokens={optim.decay_tokens}"
        return [*lines, f"learning rate: {jump}, {_ending(now)} (optim.rewarm_tokens=N rises gradually)"]
    if optim.lr != before.optim.lr or not _is_continuous(before, now, tokens):
        return [*lines, f"learning rate: {reached:.3g} → {first:.3g} {where}, {_ending(now)}"]
    return [*lines, f"learning rate: goes on from {reached:.3g} {where}, {_ending(now)}"]


def spent_fields(config: Config, history: History) -> dict[str, str]:
    """Fields of what a resumed run has behind it, and which a change has no effect on any more ▶ why."""
    before, tokens = history.schedule, history.tokens
    found = {}
    if tokens >= before.course.warmup_end:
        found["optim.warmup_tokens"] = "the warm-up is over; optim.rewarm_tokens=N begins another"
    if before.optim.schedule == config.optim.schedule == "wsd" and tokens > before.course.decay_start:
        found["optim.cooldown_tokens"] = "the cooldown has begun"
    if tokens >= config.train.batch_ramp_tokens:
        ramp = ("batch_ramp_start", "batch_ramp_increment", "batch_ramp_tokens")
        found |= {f"train.{name}": f"{tokens:,} tokens are behind, and the ramp is over" for name in ramp}
    return found


def length_notes(config: Config, history: History | None) -> list[str]:
    """What of a schedule a run is too short for, or too long."""
    batch, schedule = batch_size_for(config, history), schedule_for(config, history)
    total, course, optim = schedule.total_tokens, schedule.course, config.optim
    notes = []
    if len(batch.sizes) > 1 and total < config.train.batch_ramp_tokens:
        notes.append(
            f"train.batch_ramp_tokens={config.train.batch_ramp_tokens:,} is longer than the run's {total:,} tokens: it "
            f"ends before train.global_batch_size={config.train.global_batch_size}"
        )
    if total < course.warmup_end:
        is_given = course.warmup_end == optim.warmup_tokens
        warmup = f"{'optim.warmup_tokens=' if is_given else 'a warm-up to token '}{course.warmup_end}"
        end = f"ends at {schedule.reached(total):.3g} and never reaches optim.lr={optim.lr:g}"
        return [*notes, f"{warmup} is longer than the run, {total} tokens: the learning rate {end}"]
    if optim.schedule == "constant":
        return notes
    if total < course.decay_end:
        notes.append(
            f"optim.decay_tokens={course.decay_end:,} lies beyond the run's {total:,} tokens: the learning rate ends "
            f"at {schedule.reached(total):.3g}, not at its floor, {schedule.floor:.3g}"
        )
    begun = 0 if history is None else history.tokens
    if schedule.floor == 0.0 and max(course.decay_end, begun) < total:
        idle = total - max(course.decay_end, begun)
        notes.append(f"the learning rate is 0 from {course.decay_end:,} tokens on: the last {idle:,} learn nothing")
    return notes


def extension_hint(config: Config) -> str:
    """What to say of the learning rate to someone who may extend a run that is complete."""
    optim = config.optim
    if optim.schedule == "constant" or optim.decay_tokens is not None:
        return ""
    floor = optim.lr * optim.min_lr_ratio
    if floor == 0.0:
        return " optim.rewarm_tokens=N (the learning rate has fallen to 0; it rises to optim.lr again over N tokens)"
    return f" (at the floor of its learning rate, {floor:.3g}; optim.rewarm_tokens=N rises to optim.lr again)"


def _ending(schedule: LearningRate, rest: str = "what is left of its decay") -> str:
    course, optim = schedule.course, schedule.optim
    if optim.schedule == "constant":
        return f"it stays at {schedule.floor:.3g} after any warm-up"
    fall = f"{schedule.floor:.3g} at {course.decay_end:,} tokens"
    if optim.schedule == "wsd":
        return f"its cooldown begins at {course.decay_start:,} tokens and reaches {fall}"
    return f"{rest} reaches {fall}"


def _is_continuous(before: LearningRate, now: LearningRate, tokens: int) -> bool:
    old, new = before.reached(tokens), now.reached(tokens)
    return abs(old - new) <= 1e-6 * max(old, new)


def _plan(optim: Optim) -> tuple[Any, ...]:
    return (optim.lr, optim.schedule, optim.cooldown if optim.schedule == "wsd" else None, optim.min_lr_ratio)


def _example_rewarm(config: Config, history: History) -> int:
    """A hundredth of the tokens to come."""
    total = batch_size_for(config, history).tokens_after(_steps_left(config, history))
    return max((total - history.tokens) // 100, 1)


def _steps_left(config: Config, history: History | None) -> int:
    return config.train.steps if history is None else max(config.train.steps - history.step, 0)


def _section(kind: type[_Section], fields: Mapping[str, Any]) -> _Section:
    """A section of a config that another version may have written: what it did not know has its default."""
    return kind(**{name: fields[name] for name in kind.__dataclass_fields__ if name in fields})
