"""The loss curve of a run, as a picture for a README."""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from megalm.figure import new_figure
from megalm.runs.record import step_rows, validation_rows

_TRAIN_COLOUR = "#3366a8"
_VALIDATION_COLOUR = "#c8501e"
_SMOOTHED_SHARE = 0.02
"""Share of a run's steps that the smoothed curve averages over."""


def plot_loss(rows: list[dict[str, Any]], path: Path, *, run_name: str) -> None:
    """Draw training and validation loss over tokens (below) and steps (above) to a PNG of 1,280 x 720 pixels.

    Args:
        rows: rows of ``metrics.jsonl``, with at least one training step.
        path: the picture, replaced when there is one.
        run_name: title.

    Raises:
        ValueError: no row is of a training step.
    """
    steps = step_rows(rows)
    if not steps:
        raise ValueError("there is no training step to plot")
    figure = new_figure((8, 4.5), dots_per_inch=160)
    axes = figure.add_subplot()
    tokens = [row["tokens"] for row in steps]
    losses = [row["loss"] if row.get("loss_tokens", 1) else math.nan for row in steps]  # a mean of nothing is no point
    window = smoothing_steps(len(losses))
    alpha = 0.3 if window > 1 else 1.0
    axes.plot(tokens, losses, color=_TRAIN_COLOUR, alpha=alpha, linewidth=1.0, label="training loss, each step")
    if window > 1:
        label = f"training loss, mean over {window} steps"
        axes.plot(tokens, smooth(losses, window), color=_TRAIN_COLOUR, linewidth=2.0, label=label)
    _plot_validations(axes, validation_rows(rows))
    axes.set_title(run_name, loc="left", fontweight="bold", pad=12, parse_math=False)
    _label_axes(axes, steps)
    axes.legend(frameon=False)
    temporary = path.with_name(f"{path.stem}.tmp{path.suffix}")
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph .* missing")  # of the run's name: the font draws a box instead
        figure.savefig(temporary)
    temporary.replace(path)


def smoothing_steps(steps: int) -> int:
    """Width of the window that a run of so many steps is smoothed over."""
    return max(1, round(steps * _SMOOTHED_SHARE)) if steps < 500 else 10 * round(steps * _SMOOTHED_SHARE / 10)


def smooth(values: list[float], window: int) -> list[float]:
    """Mean of each value and its neighbours, ``window`` in all (fewer at the ends), without those that are not finite.

    The window is centred: one that only looks back draws a falling loss too high.
    """
    sums, counts = [0.0], [0]
    for value in values:
        is_finite = math.isfinite(value)
        sums.append(sums[-1] + (value if is_finite else 0.0))
        counts.append(counts[-1] + is_finite)
    means = []
    for index in range(len(values)):
        start, stop = max(0, index - (window - 1) // 2), min(len(values), index + window // 2 + 1)
        count = counts[stop] - counts[start]
        means.append((sums[stop] - sums[start]) / count if count else math.nan)
    return means


def _plot_validations(axes: Any, rows: list[dict[str, Any]]) -> None:
    finite = [row for row in rows if row["val_loss"] is not None and math.isfinite(row["val_loss"])]
    if not finite:
        return
    axes.plot(
        [row["tokens"] for row in finite],
        [row["val_loss"] for row in finite],
        color=_VALIDATION_COLOUR,
        marker="o",
        markersize=5,
        linewidth=1.2,
        label="validation loss",
    )
    last = finite[-1]
    axes.annotate(
        f"validation loss {last['val_loss']:.3f}\nperplexity {last['val_perplexity']:,.1f}",
        (last["tokens"], last["val_loss"]),
        xytext=(-6, 24),
        textcoords="offset points",
        horizontalalignment="right",
        color=_VALIDATION_COLOUR,
    )


def _label_axes(axes: Any, steps: list[dict[str, Any]]) -> None:
    """Tokens below, steps above (whose batches may differ), light horizontal guides."""
    from matplotlib.ticker import EngFormatter, MaxNLocator

    known = [(0, 0), *((row["tokens"], row["step"]) for row in steps)]
    tokens, numbers = [pair[0] for pair in known], [pair[1] for pair in known]
    axes.set_xlabel("training tokens")
    axes.set_ylabel("cross-entropy (nats per token)")
    axes.xaxis.set_major_formatter(EngFormatter(sep=" "))
    axes.set_xlim(0, steps[-1]["tokens"] * 1.01)
    axes.grid(axis="y", alpha=0.25)
    axes.spines[["right"]].set_visible(False)
    above = axes.secondary_xaxis(
        "top", functions=(lambda seen: interpolate(seen, tokens, numbers), lambda n: interpolate(n, numbers, tokens))
    )
    above.set_xlabel("step")
    above.xaxis.set_major_locator(MaxNLocator(nbins=8, integer=True))


def interpolate(values: Any, known: Sequence[float], wanted: Sequence[float]) -> Any:
    """``wanted`` at values between those of ``known``, which ascend; outside them in proportion to the whole."""
    import numpy as np

    inside = np.interp(values, known, wanted)
    beyond = np.asarray(values, dtype=float) * (wanted[-1] / known[-1])
    return np.where((np.asarray(values) < known[0]) | (np.asarray(values) > known[-1]), beyond, inside)
