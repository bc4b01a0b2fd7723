"""Rules about number formats and ZeRO stages."""

from __future__ import annotations

from collections.abc import Iterator

from megalm.config.job import Job, Rule, needs
from megalm.config.support import CHOICES, PROVEN
from megalm.config.violation import Fix, Violation


@needs("engine.zero_stage", "parallel.pp")
def precision_and_zero_are_proven(job: Job) -> Iterator[Violation]:
    """Only combinations of number format and ZeRO stage that a parity test covers (``support.PROVEN``)."""
    dtype, stage, pp = job.config.engine.dtype, job.config.engine.zero_stage, job.config.parallel.pp
    in_any_format = tuple(sorted(set.intersection(*map(set, PROVEN.values()))))
    # A pipeline runs many micro-batches, and stages 2 and 3 communicate in each.
    proven = tuple(s for s in PROVEN.get(dtype, in_any_format) if s < 2 or pp == 1)
    if stage in proven:
        return
    fixes = [Fix("engine.zero_stage", proven)]
    if stage >= 2 and pp > 1:
        wrong = f"ZeRO-{stage} would repeat its collectives for every micro-batch of the pipeline (parallel.pp={pp})"
        fixes.append(Fix("parallel.pp", (1,)))
    else:
        wrong = f"ZeRO-{stage} with engine.dtype={dtype} is not in this version: no test proves its gradient norm"
        fixes.append(Fix("engine.dtype", tuple(name for name in CHOICES["engine.dtype"] if stage in PROVEN[name])))
    yield Violation("engine.zero_stage", stage, wrong, fixes=tuple(fixes))


@needs("engine.zero_stage", "parallel.tp")
def zero_3_runs_alone(job: Job) -> Iterator[Violation]:
    """ZeRO-3 is DeepSpeed's own, hooks and all: its norm is wrong under tensor parallelism."""
    engine, tp = job.config.engine, job.config.parallel.tp
    if engine.zero_stage != 3:
        return
    stages = Fix("engine.zero_stage", (1, 2))
    if tp > 1:
        yield Violation(
            "parallel.tp",
            tp,
            "DeepSpeed's ZeRO-3 leaves parameters out of the gradient norm under tensor parallelism",
            fixes=(Fix("parallel.tp", (1,)), stages),
        )
    for field, value in (
        ("engine.offload_optimizer", engine.offload_optimizer),
        ("engine.compile", engine.compiles),
        ("engine.gradient_accumulation_fusion", engine.gradient_accumulation_fusion),
    ):
        if value:
            yield Violation(field, value, "not in this version with ZeRO-3", fixes=(Fix(field, (False,)), stages))


@needs("engine.zero_stage")
def pieces_are_exchanged_in_bf16(job: Job) -> Iterator[Violation]:
    """Only where each replica owns a piece of the gradients, and megalm reduces them."""
    engine = job.config.engine
    if engine.reduce_dtype == "fp32" or engine.zero_stage in (1, 2):
        return
    why = "replicas own no pieces of the gradients" if engine.zero_stage == 0 else "DeepSpeed reduces in fp32"
    yield Violation(
        "engine.reduce_dtype",
        engine.reduce_dtype,
        f"at engine.zero_stage={engine.zero_stage} {why}",
        fixes=(Fix("engine.reduce_dtype", ("fp32",)), Fix("engine.zero_stage", (1, 2))),
    )


RULES: tuple[Rule, ...] = (
    precision_and_zero_are_proven,
    zero_3_runs_alone,
    pieces_are_exchanged_in_bf16,
)
