"""``megalm verify``: shrink, train every layout and the reference, compare, certify."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

from rich.console import Console

from megalm.config.compose import compose
from megalm.config.job import planned_world_size_of
from megalm.config.schema import Config
from megalm.errors import ExitCode
from megalm.launch.function_ranks import RankFailure, run_on_ranks
from megalm.plan.preflight import check_config
from megalm.runs.folder import CERTIFICATE_FILE
from megalm.runs.source_model import source_model
from megalm.runs.start import run_folder
from megalm.verify.certificate import Certificate, Row
from megalm.verify.differences import differences
from megalm.verify.parity import Trace, train_on_layout, train_plainly
from megalm.verify.shrink import Case, related_layouts, shrink

_CLIP_SHARE = 0.5
"""Of the first gradient norm: clipping is active in every step."""

_FILE_WIDTH = 100
"""Columns of the table where it does not go to a terminal."""

_SECONDS_TO_START, _SECONDS_PER_LAYOUT = 180.0, 60.0


def run_verify(overrides: Sequence[str], json_path: str | None) -> ExitCode:
    """Verify the config that the overrides compose, print the table, write the certificate.

    Args:
        overrides: of the command line.
        json_path: where the certificate goes; None: into the run's folder.

    Raises:
        ConfigError: the config is not valid, so there is nothing to prove.
    """
    config = compose(overrides, source_model)
    world_size = planned_world_size_of(config)
    check_config(config, world_size)
    with Console(stderr=True).status("shrinking the config") as status:
        certificate = verify(config, world_size, lambda text: status.update(f"training {text}"))
    certificate.print(Console(width=None if sys.stdout.isatty() else _FILE_WIDTH))
    path = Path(json_path) if json_path is not None else run_folder(config) / CERTIFICATE_FILE
    certificate.save(path)
    print(f"{'proven' if certificate.passed else 'NOT PROVEN'}: layout certificate in {path}")
    return ExitCode.DONE if certificate.passed else ExitCode.NOT_PROVEN


def verify(config: Config, world_size: int, progress: Callable[[str], None] = lambda _: None) -> Certificate:
    """Prove that a valid config's layout, and each of its axes, trains like one process.

    Args:
        config: the user's.
        world_size: ranks that it is meant for.
        progress: told what is being computed.
    """
    shrunk = shrink(config, world_size)
    cases = related_layouts(shrunk.layout)
    references: dict[str, Trace] = {}
    clips: dict[str, float] = {}
    clipped: list[Case] = []
    for case in cases:
        dtype = case.config.engine.dtype
        if dtype not in references:
            progress(f"one plain process, {dtype}")
            clips[dtype] = _CLIP_SHARE * train_plainly(case.config, steps=1).grad_norms[0]
            references[dtype] = train_plainly(_clipped(case, clips[dtype]).config)
        clipped.append(_clipped(case, clips[dtype]))
    found = _train(clipped, progress)
    rows = [
        Row(
            case,
            traces if isinstance(traces, RankFailure) else differences(references[case.config.engine.dtype], traces),
        )
        for case, traces in zip(clipped, found, strict=True)
    ]
    return Certificate(
        config=config,
        shrunk=shrunk,
        clip_grad_norm=clips,
        grad_norms={dtype: trace.grad_norms for dtype, trace in references.items()},
        losses={dtype: trace.losses for dtype, trace in references.items()},
        rows=rows,
    )


def _train(cases: Sequence[Case], progress: Callable[[str], None]) -> list[list[Trace] | RankFailure]:
    """Traces by rank of each case; layouts of as many ranks share a start."""
    found: dict[Case, list[Trace] | RankFailure] = {}
    for ranks in sorted({case.topology.world_size for case in cases}):
        same = [case for case in cases if case.topology.world_size == ranks]
        progress(f"{', '.join(map(str, same))} on {ranks} rank{'s' * (ranks > 1)}")
        timeout = _SECONDS_TO_START + _SECONDS_PER_LAYOUT * len(same)
        found.update(zip(same, run_on_ranks(ranks, train_case, same, timeout_seconds=timeout), strict=True))
    return [found[case] for case in cases]


def train_case(case: Case) -> Trace:
    """What each rank runs."""
    return train_on_layout(case.config, case.topology)


def _clipped(case: Case, limit: float) -> Case:
    return replace(case, config=replace(case.config, optim=replace(case.config.optim, clip_grad_norm=limit)))
