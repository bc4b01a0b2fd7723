"""Rules about what a run starts from and which checkpoints it keeps."""

from __future__ import annotations

from collections.abc import Iterator

from megalm.config.job import Job, Rule
from megalm.config.violation import Fix, Violation


def one_source_of_weights(job: Job) -> Iterator[Violation]:
    """A run starts from a checkpoint's weights, in one way, or resumes a named one."""
    checkpoint = job.config.checkpoint
    for name in ("init_from", "finetune_from"):
        value = getattr(checkpoint, name)
        if value is not None and checkpoint.resume not in ("auto", "never"):
            yield Violation(
                f"checkpoint.{name}",
                value,
                f"conflicts with checkpoint.resume={checkpoint.resume}, which brings weights of its own",
                fixes=(Fix(f"checkpoint.{name}", (None,)), Fix("checkpoint.resume", ("auto", "never"))),
            )
    if checkpoint.init_from is not None and checkpoint.finetune_from is not None:
        yield Violation(
            "checkpoint.finetune_from",
            checkpoint.finetune_from,
            f"conflicts with checkpoint.init_from={checkpoint.init_from}: a run starts from one model's weights",
            fixes=(Fix("checkpoint.finetune_from", (None,)), Fix("checkpoint.init_from", (None,))),
        )
    if checkpoint.extend_vocab and checkpoint.init_from is None and checkpoint.finetune_from is None:
        yield Violation(
            "checkpoint.extend_vocab",
            True,
            "adds tokens to the model that a run starts from, and no such model is named",
            "name it with checkpoint.finetune_from or checkpoint.init_from",
            fixes=(Fix("checkpoint.extend_vocab", (False,)),),
        )


def retention_has_something_to_keep(job: Job) -> Iterator[Violation]:
    """Rules of retention that can never apply are mistakes."""
    checkpoint, train = job.config.checkpoint, job.config.train
    if checkpoint.keep_every and checkpoint.every and checkpoint.keep_every % checkpoint.every:
        rounded = -(-checkpoint.keep_every // checkpoint.every) * checkpoint.every
        yield Violation(
            "checkpoint.keep_every",
            checkpoint.keep_every,
            f"not a multiple of checkpoint.every={checkpoint.every}, so some of these steps are never saved",
            fixes=(Fix("checkpoint.keep_every", (rounded,)),),
        )
    if checkpoint.keep_best and checkpoint.every and not train.validate_every:
        yield Violation(
            "checkpoint.keep_best",
            checkpoint.keep_best,
            "train.validate_every=0: there is one validation, at the end, and no best of several",
            fixes=(Fix("train.validate_every", (checkpoint.every,)), Fix("checkpoint.keep_best", (0,))),
        )


RULES: tuple[Rule, ...] = (
    one_source_of_weights,
    retention_has_something_to_keep,
)
