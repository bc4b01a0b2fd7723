"""Rules about the phases of the learning rate."""

from __future__ import annotations

from collections.abc import Iterator

from megalm.config.job import Job, Rule, needs
from megalm.config.violation import Fix, Violation


@needs("optim.warmup_tokens", "optim.decay_tokens")
def warmup_ends_before_decay(job: Job) -> Iterator[Violation]:
    """The decay ends after the warm-up. A run may be shorter than both: that is how a job is tried out."""
    optim = job.config.optim
    if optim.schedule == "constant" or optim.decay_tokens is None or optim.warmup_tokens < optim.decay_tokens:
        return
    yield Violation(
        "optim.warmup_tokens",
        optim.warmup_tokens,
        f"not below optim.decay_tokens={optim.decay_tokens}, where the decay ends",
        f"at most {optim.decay_tokens - 1}",
        fixes=(Fix("optim.decay_tokens", (None,)),),
    )


def cooldown_has_its_schedule(job: Job) -> Iterator[Violation]:
    """The shape of a cooldown belongs to ``wsd``."""
    optim = job.config.optim
    if optim.schedule != "wsd" and optim.cooldown == "sqrt":
        fixes = (Fix("optim.cooldown", ("linear",)), Fix("optim.schedule", ("wsd",)))
        yield Violation(
            "optim.cooldown", optim.cooldown, f"optim.schedule={optim.schedule} has no cooldown", fixes=fixes
        )


@needs("optim.warmup_tokens", "optim.decay_tokens", "optim.cooldown_tokens")
def cooldown_fits(job: Job) -> Iterator[Violation]:
    """A cooldown belongs to ``wsd`` and lies between the warm-up and the end of the decay.

    Where that end is the run's own the run may be shorter: that is how a job is tried out.
    """
    optim = job.config.optim
    if optim.schedule != "wsd":
        wsd = Fix("optim.schedule", ("wsd",))
        wrong = f"optim.schedule={optim.schedule} has no cooldown"
        if optim.cooldown_tokens is not None:
            fixes = (Fix("optim.cooldown_tokens", (None,)), wsd)
            yield Violation("optim.cooldown_tokens", optim.cooldown_tokens, wrong, fixes=fixes)
        return
    if optim.cooldown_tokens is None or optim.decay_tokens is None or optim.warmup_tokens >= optim.decay_tokens:
        return
    room = optim.decay_tokens - optim.warmup_tokens
    if optim.cooldown_tokens > room:
        yield Violation(
            "optim.cooldown_tokens",
            optim.cooldown_tokens,
            f"longer than the {room} tokens between optim.warmup_tokens={optim.warmup_tokens} and "
            f"optim.decay_tokens={optim.decay_tokens}",
            f"at most {room}",
            fixes=(
                Fix("optim.cooldown_tokens", (None,)),
                Fix("optim.decay_tokens", (optim.warmup_tokens + optim.cooldown_tokens,)),
            ),
        )


RULES: tuple[Rule, ...] = (
    warmup_ends_before_decay,
    cooldown_has_its_schedule,
    cooldown_fits,
)
