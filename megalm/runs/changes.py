"""What of a resumed run's config is not what its checkpoint was trained with, field by field. No torch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from megalm.checkpoint.manifest import Manifest
from megalm.config.job import topology_of
from megalm.config.parse import config_to_dict, default_dict
from megalm.config.schema import Config
from megalm.config.violation import format_value

_WITHOUT_EFFECT = frozenset(
    {
        "run.name",
        "run.dir",
        "model.vocab_pad_multiple",
        "launch.ranks",
        "launch.timeout_seconds",
        "data.cache_dir",
        "data.cache_gib",
        "data.prefetch_batches",
        "data.readers",
        "train.late_metrics",
        "checkpoint.resume",
        "checkpoint.init_from",
        "checkpoint.finetune_from",
    }
)
"""Fields that change nothing of what is trained or kept; the number of ranks is told as replicas."""

_SECTIONS_WITHOUT_EFFECT = frozenset({"logging", "cluster", "report", "evaluate"})


@dataclass(frozen=True)
class Change:
    """One field that differs.

    Attributes:
        field: its dotted name; ``dp`` for the number of replicas, which no field has.
        before: value of the checkpoint.
        after: value of today's config.
    """

    field: str
    before: Any
    after: Any

    def __str__(self) -> str:
        return f"{self.field}: {format_value(self.before)} → {format_value(self.after)}"


def changes_since(manifest: Manifest, config: Config, world_size: int) -> list[Change]:
    """Every field that matters and differs from the checkpoint's; one that it did not know yet had its default."""
    saved, defaults = manifest.config, default_dict()
    found = []
    for section, fields in config_to_dict(config).items():
        if section in _SECTIONS_WITHOUT_EFFECT:
            continue
        for name, after in fields.items():
            path = f"{section}.{name}"
            before = _section(saved, section).get(name, defaults[section][name])
            # The data's own, which other checks compare; and null, which was false before there was null.
            is_same = (path == "model.vocab_size" and after is None) or (
                path == "engine.compile" and not before and not after
            )
            if path not in _WITHOUT_EFFECT and not is_same and before != after:
                found.append(Change(path, before, after))
    replicas, dp = manifest.topology.get("dp"), topology_of(config, world_size).dp
    if replicas is not None and replicas != dp:
        found.append(Change("dp", replicas, dp))
    return found


def _section(saved: Mapping[str, Any], section: str) -> Mapping[str, Any]:
    fields = saved.get(section)
    return fields if isinstance(fields, Mapping) else {}
