"""A dry run's report as lines for a person. No torch."""

from __future__ import annotations

from collections.abc import Mapping

from megalm.dryrun.report import GIB, RankReport, Traffic

_UNITS = ((1e18, "E"), (1e15, "P"), (1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k"))


def lines(report: RankReport) -> list[str]:
    """One rank's report."""
    stages = ", ".join(f"{stage} ({blocks} blocks)" for stage, blocks in report.stages.items())
    rows = {
        f"rank {report.rank}": f"{report.place}; stage{'s' if len(report.stages) > 1 else ''} {stages}",
        "parameters": f"{report.parameters:,} here",
        "FLOPs": f"{_scaled(sum(report.flops.values()))} per step: {_parts(report.flops)}",
        "kernels": f"{sum(report.kernels.values()):,} per step: {_counts(report.kernels)}",
        "memory": _memory(report),
        "activations": _retained(report),
        "resume": "" if report.resume_bytes is None else f"reads {report.resume_bytes / GIB:,.2f} GiB of a checkpoint",
        "host syncs": _host_syncs(report),
        "traced": f"{report.ticks_traced:,} of {report.ticks:,} ticks, in {report.seconds:.1f} s and "
        f"{report.tool_gib:.2f} GiB",
    }
    found = [f"{name:15}{text}" for name, text in rows.items() if text]
    found += [f"{'note':15}{note}" for note in report.notes]
    return [*found, *_layers(report), *_traffic(report.traffic)]


def _memory(report: RankReport) -> str:
    """``peak 21.30 GiB of 80 (a100_80gb): parameters 2.53, …``."""
    limit = ""
    if report.memory_limit_gib is not None:
        limit = f" of {report.memory_limit_gib:g} ({report.gpu}{'' if report.fits else '; DOES NOT FIT'})"
    kinds = ", ".join(f"{kind} {nbytes / GIB:.2f}" for kind, nbytes in report.memory.items() if nbytes)
    start = ""
    if report.start_peak > sum(report.memory.values()):
        start = f"; {report.start_peak / GIB:.2f} GiB while the engine is set up"
    return f"peak {report.peak_gib:.2f} GiB{limit}: {kinds}{start}"


def _retained(report: RankReport) -> str:
    each = ", ".join(f"stage {stage} {nbytes / GIB:.3f}" for stage, nbytes in report.retained.items())
    return f"kept from forward to backward, GiB per micro-batch: {each}" if each else ""


def _host_syncs(report: RankReport) -> str:
    sites = ", ".join(f"{site} × {count}" for site, count in report.host_syncs.items())
    return f"{sum(report.host_syncs.values())} per step{': ' if sites else ''}{sites}"


def _layers(report: RankReport) -> list[str]:
    return [
        f"{direction + ' of block':18}{sum(work.kernels.values()):.0f} kernels ({_counts(work.kernels)}), "
        f"{_scaled(work.flops)}FLOP, {work.memory_bound_bytes / 2**20:,.0f} MiB of memory-bound traffic"
        for direction, work in report.layers.items()
    ]


def _traffic(traffic: tuple[Traffic, ...]) -> list[str]:
    if not traffic:
        return ["collectives    none"]
    table = [("collective", "group", "ranks", "count", "bytes", "hidden", "NCCL has")]
    table += [
        (
            t.kind,
            t.group,
            f"{t.size:,}",
            f"{t.count:,}",
            f"{_scaled(t.nbytes)}B",
            f"{t.hidden:,} of {t.waited:,}" if t.waited else "-",
            t.nccl,
        )
        for t in traffic
    ]
    widths = [max(len(row[column]) for row in table) for column in range(len(table[0]))]
    numbers = {2, 3, 4, 5}
    return [
        "  ".join(
            cell.rjust(width) if column in numbers else cell.ljust(width)
            for column, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in table
    ]


def _parts(flops: Mapping[str, int]) -> str:
    return ", ".join(f"{kind} {_scaled(count)}" for kind, count in flops.items() if count)


def _counts(kernels: Mapping[str, float]) -> str:
    return ", ".join(f"{kind.replace('_', '-')} {count:,.0f}" for kind, count in kernels.items() if count)


def _scaled(number: float) -> str:
    """``34.8 T``."""
    for size, unit in _UNITS:
        if number >= size:
            return f"{number / size:.1f} {unit}"
    return f"{number:.0f} "
