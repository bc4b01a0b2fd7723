"""What one process has found out about a run before it starts, and every rank is told. No torch."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from megalm.config.parse import config_from_dict, config_to_dict
from megalm.config.schema import Config
from megalm.data.shards.index import Index
from megalm.ownership import Claim
from megalm.runs.start import StartMode, StartPoint, run_folder


@dataclass(frozen=True)
class Plan:
    """A run that may start.

    Attributes:
        config: composed once; every rank gets this one.
        world_size: ranks of the run.
        notes: what the user should know before the first step.
        complete: whether all steps have been taken already, so that there is nothing to start.
        start: what is loaded before the first step; chosen once, so that no rank sees it otherwise.
        claim: proof that the run's folder is this run's alone; None: nobody else is there to ask.
        indexes: of each dataset, its splits' indexes without the hashes of shards. All files of them were there when
            the plan was made: ranks take its word, and open none before they read it.
    """

    config: Config
    world_size: int
    notes: tuple[str, ...] = ()
    complete: bool = False
    start: StartPoint = field(default_factory=lambda: StartPoint(StartMode.FRESH))
    claim: Claim | None = None
    indexes: tuple[Mapping[str, Index], ...] = ()

    @property
    def run_dir(self) -> Path:
        """The run's folder."""
        return run_folder(self.config)

    def to_json(self) -> str:
        """Text that :meth:`from_json` reads on another rank."""
        return json.dumps({**asdict(self), "config": config_to_dict(self.config)}, default=str)  # paths

    @classmethod
    def from_json(cls, text: str) -> Plan:
        """The plan that rank 0 sent."""
        fields: dict[str, Any] = json.loads(text)
        claim = fields["claim"]
        return cls(
            config=config_from_dict(fields["config"]),
            world_size=fields["world_size"],
            notes=tuple(fields["notes"]),
            complete=fields["complete"],
            start=StartPoint.from_dict(fields["start"]),
            claim=None if claim is None else Claim(**{**claim, "lock": Path(claim["lock"])}),
            indexes=tuple(
                {split: Index.from_dict(index) for split, index in splits.items()} for splits in fields["indexes"]
            ),
        )
