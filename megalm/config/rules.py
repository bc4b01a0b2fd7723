"""Everything that makes a config one that can run, checked before any process starts.

A rule is a generator of violations, named after what holds when it yields none. All rules always run, so a user sees
everything wrong at once; and every value offered as a remedy has been tried against all rules.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence, Set
from dataclasses import replace
from typing import Any

from megalm.config import cross_rules, data_rules, field_rules, layout_rules, model_rules, schedule_rules
from megalm.config.cross_rules import Rule
from megalm.config.field_rules import Dataset, Job, value_of, with_value
from megalm.config.schema import Config
from megalm.config.violation import Fix, Violation
from megalm.mesh.topology import Topology

RULES: tuple[Rule, ...] = (
    field_rules.numbers_are_in_range,
    field_rules.choices_are_known,
    field_rules.run_has_a_folder_name,
    field_rules.texts_are_not_empty,
    field_rules.texts_are_text,
    cross_rules.heads_divide_hidden_size,
    cross_rules.kv_heads_divide_heads,
    cross_rules.rotary_heads_are_even,
    cross_rules.tensor_parallelism_divides_model,
    cross_rules.tensor_parallelism_shares_kv_heads,
    cross_rules.stages_have_layers,
    layout_rules.virtual_stages_have_their_schedule,
    layout_rules.stage_layers_are_a_split,
    layout_rules.sequence_splits_evenly,
    layout_rules.ulysses_divides_heads,
    model_rules.rotary_turns_whole_pairs,
    model_rules.rotary_scaling_is_whole,
    cross_rules.layout_fills_ranks,
    cross_rules.batch_splits_evenly,
    cross_rules.precision_and_zero_are_proven,
    cross_rules.zero_3_runs_alone,
    schedule_rules.batch_ramp_is_whole,
    schedule_rules.batch_ramp_splits_evenly,
    schedule_rules.batch_ramp_arrives,
    cross_rules.warmup_ends_before_decay,
    schedule_rules.cooldown_has_its_schedule,
    schedule_rules.cooldown_fits,
    cross_rules.one_source_of_weights,
    cross_rules.retention_has_something_to_keep,
    data_rules.vocabulary_holds_the_data,
    data_rules.sequences_fit_the_data,
    data_rules.one_number_per_dataset,
    data_rules.pipes_name_their_file,
    data_rules.objective_fits_attention,
    data_rules.documents_are_seen_whole,
    data_rules.prompts_are_for_decoders,
)

_MOST_VALUES = 6


def world_size_of(config: Config) -> int:
    """Ranks that ``megalm train`` starts on this machine: ``launch.ranks``, or as many as tp·pp·cp."""
    parallel = config.parallel
    return config.launch.ranks or parallel.tp * parallel.pp * parallel.cp


def planned_world_size_of(config: Config) -> int:
    """Ranks of the job that is planned: ``cluster.gpus``, or what would be started on this machine."""
    return config.cluster.gpus or world_size_of(config)


def topology_of(config: Config, world_size: int) -> Topology:
    """The topology of a valid config on ``world_size`` ranks; the data-parallel degree fills them."""
    parallel = config.parallel
    return Topology.from_world_size(
        world_size, tp=parallel.tp, pp=parallel.pp, cp=parallel.cp, virtual_stages=parallel.virtual_stages
    )


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
    """The violation with only those fixes that mend it, break nothing else, and mend most of the rest too."""
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
