"""Settings that a config gives and its run does not use: each is said, so that nobody waits for an effect.

What can only be a mistake is a rule (see ``rules/``) and refused. What is here is legal, since an experiment may set
it for one of its variants, and is told of only where it is not the default.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from megalm.config.job import Job, value_of
from megalm.config.parse import default_dict
from megalm.config.violation import format_value


@dataclass(frozen=True)
class _Unused:
    """Fields that are without effect in some configs."""

    fields: tuple[str, ...]
    applies: Callable[[Job], bool]
    why: str


def _is(path: str, *values: Any) -> Callable[[Job], bool]:
    return lambda job: value_of(job.config, path) in values


def _is_not(path: str, *values: Any) -> Callable[[Job], bool]:
    return lambda job: value_of(job.config, path) not in values


_UNUSED = (
    _Unused(("optim.decay_tokens", "optim.min_lr_ratio"), _is("optim.schedule", "constant"), "optim.schedule=constant"),
    _Unused(("parallel.cp_attention",), _is("parallel.cp", 1), "parallel.cp=1"),
    _Unused(("parallel.sequence_parallel", "parallel.tp_overlap_parts"), _is("parallel.tp", 1), "parallel.tp=1"),
    _Unused(("parallel.early_receives",), _is("parallel.pp", 1), "parallel.pp=1"),
    _Unused(("model.position_offset",), _is_not("model.position", "learned"), "model.position is not learned"),
    _Unused(("model.norm_bias",), _is_not("model.norm", "layernorm"), "model.norm is not layernorm"),
    _Unused(
        ("model.rotary_base", "model.rotary_fraction", "model.rotary_original_length"),
        _is_not("model.position", "rotary"),
        "model.position is not rotary",
    ),
    _Unused(
        ("model.rotary_original_length",),
        lambda job: job.config.model.position == "rotary" and job.config.model.rotary_scaling == "none",
        "model.rotary_scaling=none",
    ),
    _Unused(
        ("model.rotary_low_frequency_factor", "model.rotary_high_frequency_factor"),
        _is_not("model.rotary_scaling", "llama3"),
        "model.rotary_scaling is not llama3",
    ),
    _Unused(
        ("model.rotary_beta_fast", "model.rotary_beta_slow"),
        _is_not("model.rotary_scaling", "yarn"),
        "model.rotary_scaling is not yarn",
    ),
    _Unused(
        ("objective.mask_probability", "objective.whole_words"),
        _is_not("objective.name", "mlm"),
        "objective.name is not mlm",
    ),
    _Unused(
        ("data.cache_dir", "data.cache_gib"),
        lambda job: not any(path.startswith("pipe:") for path in job.config.data.path),
        "no data.path is a pipe:",
    ),
    _Unused(("data.weights",), lambda job: len(job.config.data.path) == 1, "there is one data.path"),
    _Unused(
        ("engine.initial_loss_scale", "engine.loss_scale_window"),
        _is_not("engine.dtype", "fp16"),
        "engine.dtype is not fp16",
    ),
    _Unused(("engine.bucket_mib",), _is("engine.zero_stage", 3), "engine.zero_stage=3 reduces by DeepSpeed"),
    _Unused(("engine.recompute_every",), _is("engine.recompute", "none"), "engine.recompute=none"),
    _Unused(
        ("checkpoint.keep_every", "checkpoint.keep_best"),
        _is("checkpoint.keep_last", 0),
        "checkpoint.keep_last=0 keeps all",
    ),
    _Unused(
        ("checkpoint.keep_every", "checkpoint.keep_best"),
        lambda job: job.config.checkpoint.every == 0 and job.config.checkpoint.keep_last > 0,
        "checkpoint.every=0 saves at no step that is known before, or at the end alone",
    ),
    _Unused(
        (
            "logging.wandb_project",
            "logging.wandb_entity",
            "logging.wandb_group",
            "logging.wandb_tags",
            "logging.wandb_notes",
        ),
        _is("logging.wandb", "disabled"),
        "logging.wandb=disabled",
    ),
    _Unused(
        ("train.validation_samples",),
        _is("train.validate_every", 0),
        "train.validate_every=0 validates at the end, on all",
    ),
    _Unused(
        ("evaluate.every", "evaluate.examples", "evaluate.limit"), _is("evaluate.tasks", None), "evaluate.tasks=null"
    ),
    _Unused(
        ("report.max_new_tokens", "report.temperature", "report.top_k"),
        _is("report.prompt", None),
        "report.prompt=null",
    ),
)
"""Fields ▶ when they do nothing, and why, in words."""


def unused_settings(job: Job, *, is_launched: bool) -> list[str]:
    """One line for each setting that is not the default and has no effect.

    Args:
        job: a config without violations, on its ranks.
        is_launched: whether a launcher (torchrun, srun, mpirun) has started the ranks.
    """
    defaults = default_dict()
    lines = [
        f"{field}={format_value(_plain(value))}: not used, as {each.why}"
        for each in _UNUSED
        if each.applies(job)
        for field in each.fields
        if (value := value_of(job.config, field)) != _default(defaults, field)
    ]
    return [*lines, *_unused_of_launch(job, is_launched=is_launched)]


_ASKED = frozenset({"model", "engine.dtype", "checkpoint.resume", "launch"}) | {
    f"parallel.{name}" for name in ("tp", "pp", "cp", "virtual_stages", "stage_layers")
}
_USED_BY = {
    "generate": _ASKED,
    "evaluate": _ASKED
    | {"objective", "run.seed", "train.micro_batch_size"}
    | {"data.path", "data.reset_at_documents", "data.cache_dir", "data.cache_gib"}
    | {"logging.tensorboard", "logging.wandb"},
    "evaluate --task memorisation": _ASKED | {"objective", "run.seed", "data"},
}
"""Fields and sections of a run's config that a command reads, besides the layout in which it holds the model."""


def unused_overrides(command: str, overrides: Sequence[str]) -> list[str]:
    """One line for each ``field=value`` that ``megalm evaluate`` or ``generate`` takes and does not use."""
    used = _USED_BY[command]
    fields = [override.partition("=")[0].lstrip("+") for override in overrides]
    return [
        f"{override}: not used by megalm {command}"
        for field, override in zip(fields, overrides, strict=True)
        if field not in used and field.partition(".")[0] not in used
    ]


def _unused_of_launch(job: Job, *, is_launched: bool) -> list[str]:
    launch, ranks, gpus = job.config.launch, job.world_size, job.config.cluster.gpus
    lines = []
    if gpus not in (0, ranks):
        lines.append(f"cluster.gpus={gpus}: not used, as it is the size that megalm check plans for; there are {ranks}")
    if not is_launched:
        if launch.ranks not in (0, ranks):  # megalm check
            lines.append(f"launch.ranks={launch.ranks}: not used, as cluster.gpus={gpus} is what is checked")
        return lines
    if launch.ranks not in (0, ranks):
        lines.append(f"launch.ranks={launch.ranks}: not used, as a launcher has started {ranks}")
    default = default_dict()["launch"]["threads_per_rank"]
    if launch.threads_per_rank != default:
        lines.append(
            f"launch.threads_per_rank={launch.threads_per_rank}: not used, as a launcher has started the ranks; "
            "OMP_NUM_THREADS is its setting"
        )
    return lines


def _default(defaults: dict[str, Any], path: str) -> Any:
    section, name = path.split(".")
    default = defaults[section][name]
    return tuple(default) if isinstance(default, list) else default


def _plain(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value
