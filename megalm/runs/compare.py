"""Runs side by side: what they have reached, what differs in config and data, and their loss curves. No torch."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

from megalm.checkpoint.manifest import read_manifest
from megalm.checkpoint.store import find_latest
from megalm.config.compose import load_run_config
from megalm.config.parse import config_to_dict
from megalm.config.schema import Config
from megalm.config.violation import format_value
from megalm.data.stream.phases import DataState
from megalm.data.tokenization.tokenizer import TOKENIZER_FILE, Tokenizer
from megalm.errors import ConfigError, DataError
from megalm.figure import new_figure
from megalm.mesh.topology import Topology
from megalm.models.counts import parameter_count
from megalm.runs.folder import CHECKPOINTS_FOLDER, METRICS_FILE
from megalm.runs.loss_curve import smooth, smoothing_steps
from megalm.runs.record import attempt_rows, read_metrics, step_rows, validation_rows

_NAMES_ALONE = frozenset({"run.name", "run.dir"})
"""What always differs, and says nothing of what was trained."""
_COLOURS = ("#3366a8", "#c8501e", "#3b8a4a", "#8a3b88", "#b08a1e", "#3aa0a8", "#a83650", "#666666")


@dataclass(frozen=True)
class RunRecord:
    """What one run's folder says of it.

    Attributes:
        folder: as it was named.
        config: of its newest start.
        rows: of ``metrics.jsonl``.
        parameters: of the whole model; None where nothing says how many words it has.
        layout: that its newest checkpoint was saved on; None: there is none.
        data: a fingerprint of the contents of each dataset that was read for it; empty: there is none.
    """

    folder: Path
    config: Config
    rows: list[dict[str, Any]]
    parameters: int | None
    layout: str | None
    data: tuple[str, ...]

    @classmethod
    def read(cls, folder: Path) -> RunRecord:
        """Read a run's folder.

        Raises:
            ConfigError: it is no run.
            DataError: its record is missing or damaged, or holds no step.
        """
        config = load_run_config(folder)
        rows = read_metrics(folder / METRICS_FILE)
        if not step_rows(rows):
            raise DataError(f"{folder}: has taken no step yet; compare it when it has")
        latest = find_latest(folder / CHECKPOINTS_FOLDER)
        manifest = None if latest is None else read_manifest(latest.path)
        return cls(
            folder,
            config,
            rows,
            _parameters(folder, config),
            layout=None if manifest is None else _layout(manifest.topology),
            data=() if manifest is None or not manifest.data else _contents(DataState.from_dict(manifest.data)),
        )

    @property
    def name(self) -> str:
        """The run's."""
        return self.config.run.name

    def figures(self) -> dict[str, str]:
        """What the run has reached, by what it is; an empty text where there is nothing to say."""
        steps = step_rows(self.rows)
        validations = [row for row in validation_rows(self.rows) if row["val_loss"] is not None]
        best = min(validations, key=lambda row: row["val_loss"], default=None)
        last = validations[-1] if validations else None
        speeds = [row["tokens_per_second"] for row in steps if row.get("tokens_per_second")]
        losses = [row["loss"] for row in steps if row.get("loss_tokens", 1)]
        window = smoothing_steps(len(losses))
        return {
            "parameters": "" if self.parameters is None else f"{self.parameters:,}",
            "layout": self.layout or "",
            "steps": f"{steps[-1]['step']:,} of {self.config.train.steps:,}",
            "tokens": f"{steps[-1]['tokens']:,}",
            f"training loss (last {window if window > 1 else 'step'})": _number(_mean(losses[-window:]), ".4f"),
            "validation loss (last)": _loss(last),
            "validation loss (best)": _loss(best) + ("" if best is None else f" at step {best['step']:,}"),
            "perplexity (last)": _number((last or {}).get("val_perplexity"), ",.2f"),
            "tokens per second (median)": _number(median(speeds) if speeds else None, ",.0f"),
            "starts": str(len(attempt_rows(self.rows))),
        }


@dataclass(frozen=True)
class Comparison:
    """Some runs side by side."""

    runs: tuple[RunRecord, ...]

    @classmethod
    def of(cls, folders: Sequence[Path]) -> Comparison:
        """Read the runs; errors as for :meth:`RunRecord.read`.

        Raises:
            ConfigError: fewer than two runs, or one twice.
        """
        if len(folders) < 2:
            raise ConfigError(f"{len(folders)} run to compare; give two or more, such as runs/a runs/b")
        if len({folder.resolve() for folder in folders}) < len(folders):
            raise ConfigError("the same run is given twice; give different ones")
        return cls(tuple(RunRecord.read(folder) for folder in folders))

    def names(self) -> list[str]:
        """Of the runs; their folders where two have one name."""
        names = [run.name for run in self.runs]
        return names if len(set(names)) == len(names) else [str(run.folder) for run in self.runs]

    def table(self) -> list[tuple[str, ...]]:
        """What they have reached: (what, of the first run, of the second, …)."""
        figures = [run.figures() for run in self.runs]
        labels = dict.fromkeys(label for found in figures for label in found)
        rows = [(label, *(found.get(label, "") for found in figures)) for label in labels]
        return [row for row in rows if any(row[1:])]

    def differences(self) -> list[tuple[str, ...]]:
        """Fields of the configs, and datasets, that are not the same: (field, of the first run, of the second, …)."""
        configs = [_flat(config_to_dict(run.config)) for run in self.runs]
        rows = [
            (field, *(format_value(config[field]) for config in configs))
            for field in configs[0]
            if field not in _NAMES_ALONE and len({repr(config[field]) for config in configs}) > 1
        ]
        if all(run.data for run in self.runs) and len({run.data for run in self.runs}) > 1:
            rows.append(("contents of data.path", *(" ".join(run.data) for run in self.runs)))
        return rows

    def save_picture(self, path: str | Path) -> None:
        """Draw training (lines) and validation losses (points) of all over tokens, to a PNG, SVG or PDF.

        Raises:
            ConfigError: the name does not say which of these it is to be, or the file cannot be written.
        """
        path = Path(path)
        if path.suffix.lower() not in (".png", ".svg", ".pdf"):
            raise ConfigError(f"--out {path}: must end with .png, .svg or .pdf")
        figure = new_figure((8, 4.5), dots_per_inch=160)
        axes = figure.add_subplot()
        for number, (run, name) in enumerate(zip(self.runs, self.names(), strict=True)):
            _plot(axes, run, name, _COLOURS[number % len(_COLOURS)])
        _finish(axes)
        try:
            figure.savefig(path)
        except OSError as error:
            raise ConfigError(f"--out {path}: {error.strerror or error}; name a file in a folder that exists") from None


def _plot(axes: Any, run: RunRecord, name: str, colour: str) -> None:
    steps = step_rows(run.rows)
    losses = [row["loss"] if row.get("loss_tokens", 1) else math.nan for row in steps]
    smoothed = smooth(losses, smoothing_steps(len(losses)))
    axes.plot([row["tokens"] for row in steps], smoothed, color=colour, linewidth=1.6, label=name)
    finite = [
        row for row in validation_rows(run.rows) if row["val_loss"] is not None and math.isfinite(row["val_loss"])
    ]
    if finite:
        axes.plot(
            [row["tokens"] for row in finite],
            [row["val_loss"] for row in finite],
            color=colour,
            marker="o",
            markersize=4.5,
            linestyle="none",
            markerfacecolor="white",
        )


def _finish(axes: Any) -> None:
    from matplotlib.ticker import EngFormatter

    axes.plot([], [], color="#444444", marker="o", linestyle="none", markerfacecolor="white", label="validation loss")
    axes.set_xlabel("training tokens")
    axes.set_ylabel("loss (nats per token)")
    axes.xaxis.set_major_formatter(EngFormatter(sep=" "))
    axes.set_xlim(left=0)
    axes.grid(axis="y", alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
    for text in axes.legend(frameon=False).get_texts():
        text.set_parse_math(False)  # a run's name may have two dollars


def _parameters(folder: Path, config: Config) -> int | None:
    words = config.model.vocab_size
    if words is None and (folder / TOKENIZER_FILE).exists():
        words = Tokenizer.load(folder / TOKENIZER_FILE).vocab_size
    return None if words is None else parameter_count(config.model, words).total


def _layout(degrees: dict[str, int]) -> str:
    tp, pp, cp, dp, virtual = (degrees.get(name, 1) for name in ("tp", "pp", "cp", "dp", "virtual_stages"))
    return Topology(tp=tp, pp=pp, cp=cp, dp=dp, virtual_stages=virtual).describe()


def _contents(data: DataState) -> tuple[str, ...]:
    """The datasets of the newest phase, by the beginning of the hash of what is in them."""
    found = data.phases[-1].fingerprint
    return tuple(str(value)[:12] for name, value in found.items() if name.startswith("data.path["))


def _flat(mapping: dict[str, Any]) -> dict[str, Any]:
    return {f"{section}.{name}": value for section, fields in mapping.items() for name, value in fields.items()}


def _mean(values: Sequence[float]) -> float | None:
    finite = [value for value in values if math.isfinite(value)]
    return sum(finite) / len(finite) if finite else None


def _loss(row: dict[str, Any] | None) -> str:
    return "" if row is None else _number(row["val_loss"], ".4f")


def _number(value: float | None, form: str) -> str:
    return "" if value is None or math.isnan(value) else format(value, form)
