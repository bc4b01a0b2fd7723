"""Everything that makes a config one that can run, checked before any process starts.

A rule is a generator of violations, named after what holds when it yields none; ``rules/`` has a file per group of
settings. All rules always run, so a user sees everything wrong at once; and every value offered as a remedy has been
tried against all rules.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence, Set
from dataclasses import replace
from typing import Any

from megalm.config.job import Dataset, Job, Rule, value_of, with_value, world_size_of
from megalm.config.rules import (
    checkpoint,
    data,
    engine,
    evaluate,
    fields,
    launch,
    logging,
    model,
    objective,
    optim,
    parallel,
    run,
    train,
)
from megalm.config.schema import Config
from megalm.config.violation import Fix, Violation

RULES: tuple[Rule, ...] = (
    *fields.RULES,
    *run.RULES,
    *model.RULES,
    *parallel.RULES,
    *launch.RULES,
    *engine.RULES,
    *train.RULES,
    *optim.RULES,
    *checkpoint.RULES,
    *logging.RULES,
    *data.RULES,
    *objective.RULES,
    *evaluate.RULES,
)
"""Every rule, in the order in which violations are told."""

_MOST_VALUES = 6


def violations(config: Config, world_size: int, datasets: Sequence[Dataset] = ()) -> list[str]:
    """Everything wrong with running ``config`` on ``world_size`` ranks.

    Args:
        config: the run.
        world_size: its ranks.
        datasets: what it reads, in the order of ``data.path``; none where they cannot be read yet.

    Returns:
        One line per violation, ``field=value: what is wrong; what would be right``; empty when the config is good.
    """
    return [str(violation) for violation in find_violations(config, world_size, datasets)]


def find_violations(config: Config, world_size: int, datasets: Sequence[Dataset] = ()) -> list[Violation]:
    """What :func:`violations` prints, with its remedies reduced to those that break no other rule."""
    job = Job(config, world_size, tuple(datasets))
    found = _broken(job)
    return [_with_tried_fixes(job, broken, violation, found.keys()) for broken, violation in found.items()]


def _broken(job: Job) -> dict[tuple[str, str], Violation]:
    """Violations by (name of the rule, field)."""
    return {(rule.__name__, violation.field): violation for rule in RULES for violation in rule(job)}


def _with_tried_fixes(
    job: Job, broken: tuple[str, str], violation: Violation, all_broken: Set[tuple[str, str]]
) -> Violation:
    """The violation with only those fixes that resolve it, break no other rule, and resolve most of the others."""
    fixes = []
    for fix in violation.fixes:
        left = {value: _broken(_after(job, fix.field, value)).keys() for value in fix.values}
        good = {value: len(rest) for value, rest in left.items() if rest <= all_broken - {broken}}
        if good:
            best = [value for value, count in good.items() if count == min(good.values())]
            is_own = fix.field == violation.field
            current = violation.value if is_own else value_of(job.config, fix.field)
            fixes.append(Fix(fix.field, _nearest(best, current)))
    if fixes or violation.right:
        return replace(violation, fixes=tuple(fixes))
    return replace(violation, right="one value is not enough: change the fields named here together", fixes=())


def _after(job: Job, path: str, value: Any) -> Job:
    """The job with one value changed, on the ranks that it would then run on."""
    if path == "world_size":
        return replace(job, world_size=value)
    changed = with_value(job.config, path, value)
    if path in ("launch.ranks", "cluster.gpus"):
        return replace(job, config=changed, world_size=value)
    config = job.config
    follows_layout = not config.launch.ranks and job.world_size == world_size_of(config) != config.cluster.gpus
    return replace(job, config=changed, world_size=world_size_of(changed) if follows_layout else job.world_size)


def _nearest(values: Iterable[Any], target: Any) -> tuple[Any, ...]:
    """A few of the values, closest to ``target`` where they are numbers, in their own order."""
    kept = list(values)
    numbers = [value for value in kept if isinstance(value, int)]
    if isinstance(target, int) and len(numbers) > _MOST_VALUES:
        close = sorted(numbers, key=lambda value: abs(value - target))[:_MOST_VALUES]
        kept = [value for value in kept if value in close or value not in numbers]
    return tuple(kept)
