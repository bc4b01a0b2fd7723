"""Memory over a step as a picture. No torch."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from megalm.dryrun.report import GIB, RankReport
from megalm.figure import new_figure

_COLOURS = {
    "parameters": "#4c6a92",
    "gradients": "#b3592d",
    "optimizer": "#8a8a8a",
    "batch": "#c9b458",
    "transfers": "#7b4f8a",
    "activations": "#5d8a5f",
}


def save_figure(reports: Sequence[RankReport], path: Path) -> None:
    """One panel per rank: bytes by kind at the peak of each tick, and the device's limit."""
    figure = new_figure((9.0, 1.0 + 2.6 * len(reports)), 120)
    panels = figure.subplots(len(reports), 1, sharex=False, squeeze=False)[:, 0]
    for panel, report in zip(panels, reports, strict=True):
        kinds = list(report.memory)  # the same in every panel, which share one legend
        places = [moment.place for moment in report.moments]
        layers = [[moment.peak.get(kind, 0) / GIB for moment in report.moments] for kind in kinds]
        panel.stackplot(places, layers, labels=kinds, colors=[_COLOURS[kind] for kind in kinds], step="mid", lw=0)
        if report.memory_limit_gib is not None:
            panel.axhline(report.memory_limit_gib, color="#a02020", lw=1.0, ls="--")
            panel.annotate(
                f"{report.gpu}, {report.memory_limit_gib:g} GiB",
                (places[-1], report.memory_limit_gib),
                ha="right",
                va="bottom",
                fontsize=8,
                color="#a02020",
            )
        panel.set_title(f"rank {report.rank}: {report.place}", fontsize=9, loc="left")
        panel.set_ylabel("GiB")
        panel.set_xlim(places[0], places[-1])
        panel.margins(y=0.08)
    panels[0].legend(loc="center left", bbox_to_anchor=(1.0, 0.5), fontsize=8, frameon=False, reverse=True)
    panels[-1].set_xlabel("tick of the schedule; the last one is the reduction and the update")
    figure.savefig(path)
