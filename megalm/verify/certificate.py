"""The layout certificate: what was compared with what, how far apart it was, and whether that is near enough."""

from __future__ import annotations

import hashlib
import json
import math
import platform
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table

from megalm.config.parse import config_to_dict
from megalm.config.schema import Config
from megalm.launch.function_ranks import RankFailure
from megalm.verify.differences import Differences
from megalm.verify.shrink import Case, Shrunk
from megalm.version import __version__

FORMAT_VERSION = 1

TOLERANCES = {"fp32": 1e-5, "bf16": 5e-3, "fp16": 5e-3}
"""Largest difference of losses and gradient norms, and in fp32 of weights. 16-bit weights are compared, not judged: one
rounding of a weight is more than this."""


@dataclass(frozen=True)
class Row:
    """One layout.

    Attributes:
        case: the layout.
        found: its differences from the reference of the same number format; or why it did not train.
    """

    case: Case
    found: Differences | RankFailure

    @property
    def tolerance(self) -> float:
        """What losses and gradient norms may differ by."""
        return TOLERANCES[self.case.config.engine.dtype]

    @property
    def complaints(self) -> list[str]:
        """Everything that speaks against the layout, in words; empty where it is proven."""
        if isinstance(self.found, RankFailure):
            return [self.found.summary]
        found, limit = self.found, self.tolerance
        judged = {"loss": found.loss, "gradient norm": found.grad_norm}
        if self.case.config.engine.dtype == "fp32":
            judged["weights"] = found.weights
        wrong = [f"{name} differs by {difference:.1e}" for name, difference in judged.items() if not difference < limit]
        if found.initial_weights:
            wrong.append(f"initial weights differ by {found.initial_weights:.1e}, and should be the same bits")
        if found.copies:
            wrong.append(f"copies on different ranks differ by {found.copies:.1e}, and should be the same bits")
        if found.missing:
            wrong.append(f"{found.missing:,} weights are on no rank")
        if found.untrained:
            more = f" and {len(found.untrained) - 1} more" if len(found.untrained) > 1 else ""
            wrong.append(f"{found.untrained[0]}{more}: not trained")
        return wrong

    @property
    def passed(self) -> bool:
        """Whether the layout trains like one process."""
        return not self.complaints


@dataclass(frozen=True)
class Certificate:
    """The proof of one config.

    Attributes:
        config: the user's.
        shrunk: what was trained in its place.
        clip_grad_norm: by number format, the limit that the references' gradient norms exceed.
        grad_norms: by number format, the references' gradient norms before clipping.
        losses: by number format, the references' losses.
        rows: layouts.
    """

    config: Config
    shrunk: Shrunk
    clip_grad_norm: dict[str, float]
    grad_norms: dict[str, list[float]]
    losses: dict[str, list[float]]
    rows: Sequence[Row]

    @property
    def passed(self) -> bool:
        """Whether every layout does."""
        return all(row.passed for row in self.rows)

    def to_dict(self) -> dict[str, Any]:
        """Plain values; the same for the same config and versions on the same machine."""
        return {
            "format_version": FORMAT_VERSION,
            "passed": self.passed,
            "versions": {
                "megalm": __version__,
                "torch": version("torch"),
                "deepspeed": version("deepspeed"),
                "python": platform.python_version(),
            },
            "machine": platform.machine(),
            "config_sha256": digest(self.config),
            "config": config_to_dict(self.config),
            "shrunk_config": config_to_dict(self.shrunk.layout.config),
            "notes": list(self.shrunk.notes),
            "reference": {
                dtype: {
                    "losses": self.losses[dtype],
                    "grad_norms": self.grad_norms[dtype],
                    "clip_grad_norm": self.clip_grad_norm[dtype],
                    "clipped_steps": _clipped_steps(self.grad_norms[dtype], self.clip_grad_norm[dtype]),
                }
                for dtype in self.losses
            },
            "rows": [_row_to_dict(row) for row in self.rows],
        }

    def save(self, path: Path) -> None:
        """Write the certificate as JSON."""
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(self.to_dict(), indent=2, allow_nan=False) + "\n", encoding="utf-8")

    def print(self, console: Console) -> None:
        """One table, and below it what is wrong with the layouts that fail."""
        case = self.shrunk.layout
        model = case.config.model
        clipped = min(len(_clipped_steps(norms, self.clip_grad_norm[d])) for d, norms in self.grad_norms.items())
        steps = f"{case.config.train.steps} steps, {clipped} of them clipped"
        table = Table(box=box.SIMPLE_HEAD, title=f"Largest differences from one plain process over {steps}")
        table.add_column("layout")
        table.add_column("format", no_wrap=True)
        for name in ("ranks", "loss", "grad norm", "weights", "limit", "result"):
            table.add_column(name, justify="right", no_wrap=True)
        for row in self.rows:
            table.add_row(
                str(row.case),
                row.case.config.engine.dtype,
                str(row.case.topology.world_size),
                *_shown(row.found),
                f"{row.tolerance:.0e}",
                "pass" if row.passed else "[bold red]FAIL[/]",
            )
        console.print(table)
        console.print(
            f"{self.config.run.name}, ZeRO-{case.config.engine.zero_stage}, shrunk to {model.num_layers} layers, "
            f"hidden {model.hidden_size}, {model.num_heads} heads, sequence {model.sequence_length}, vocabulary "
            f"{model.vocab_size}, batch {case.config.train.global_batch_size}",
            highlight=False,
            soft_wrap=True,
        )
        for note in self.shrunk.notes:
            console.print(f"note: {note}", highlight=False, soft_wrap=True)
        for row in self.rows:
            for complaint in row.complaints:
                console.print(
                    f"FAIL {row.case} ({row.case.config.engine.dtype}): {complaint}", highlight=False, soft_wrap=True
                )


def digest(config: Config) -> str:
    """A hash of every field of a config."""
    return hashlib.sha256(json.dumps(config_to_dict(config), sort_keys=True).encode()).hexdigest()


def _clipped_steps(grad_norms: Sequence[float], limit: float) -> list[int]:
    """Steps, from 1, whose gradient was clipped."""
    return [step for step, norm in enumerate(grad_norms, start=1) if norm > limit]


def _shown(found: Differences | RankFailure) -> tuple[str, str, str]:
    if isinstance(found, RankFailure):
        return ("-", "-", "-")
    return (f"{found.loss:.1e}", f"{found.grad_norm:.1e}", f"{found.weights:.1e}")


def _row_to_dict(row: Row) -> dict[str, Any]:
    topology = row.case.topology
    entry: dict[str, Any] = {
        "layout": str(row.case),
        "ranks": topology.world_size,
        "dp": topology.dp,
        "parallel": config_to_dict(row.case.config)["parallel"],
        "dtype": row.case.config.engine.dtype,
        "zero_stage": row.case.config.engine.zero_stage,
        "tolerance": row.tolerance,
        "passed": row.passed,
        "complaints": row.complaints,
    }
    if isinstance(row.found, RankFailure):
        return {**entry, "differences": None, "report": row.found.report}
    found = asdict(row.found)
    return {**entry, "differences": {name: None if value == math.inf else value for name, value in found.items()}}
