"""Commands that ask a model, on ranks that a launcher has started, or on as many as the layout needs. No torch.

Such a command is a function that reads and checks its arguments and gives an :class:`Ask`. What it then does with the
model it does in one place: in the process of the user, or on rank 0 of a launcher's.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Protocol

from megalm.errors import ExitCode
from megalm.generate.asked import AskedModel
from megalm.generate.assignment import assignment_of
from megalm.generate.open import opened
from megalm.launch import RankInfo
from megalm.launch.discovery import discover
from megalm.launch.job import Prepared
from megalm.launch.signals import StopRequest
from megalm.runs.find import FoundModel
from megalm.runs.folder import ASKED_FOLDER


class Ask(Protocol):
    """What a command does with a model."""

    @property
    def found(self) -> FoundModel:
        """The model."""

    @property
    def overrides(self) -> Sequence[str]:
        """With which it was found."""

    @property
    def batch_size(self) -> int:
        """Rows that a replica computes together."""

    def drive(self, model: AskedModel) -> ExitCode:
        """Ask the model, and show what it answers."""


Read = Callable[[Sequence[str], int | None], Ask]
"""Arguments of the command line, and how many ranks a launcher has started (None: none) ▶ what is to be done."""


def run_asking(job: str, read: Read, arguments: Sequence[str]) -> int:
    """Run a command that asks a model.

    Args:
        job: where its :class:`AskingJob` is, as ``module:name``.
        read: of the command.
        arguments: of the command line.

    Returns:
        The exit code. A rank that a launcher has started ends its process instead.
    """
    rank = discover(os.environ)
    if rank is not None:
        from megalm.launch.worker import run_launched

        run_launched(rank, job, list(arguments))
    ask = read(arguments, None)
    with opened(ask.found, ask.overrides, batch_size=ask.batch_size) as model:
        return ask.drive(model)


class AskingJob:
    """Such a command as a job of ranks.

    Args:
        path: where it is, as ``module:name``.
        read: of the command.
    """

    def __init__(self, path: str, read: Read) -> None:
        self._path, self._read = path, read

    @contextmanager
    def prepare(
        self,
        arguments: Sequence[str],
        world_size: int | None,
        *,
        say: Callable[[str], object],  # noqa: ARG002
        cancelled: Callable[[], bool],  # noqa: ARG002
    ) -> Iterator[Prepared]:
        """Read the arguments, so that what is wrong is said once, before torch is imported."""
        ask = self._read(arguments, world_size)
        plan = json.dumps({"arguments": list(arguments), "world_size": ask.found.world_size})
        folder = ask.found.run / ASKED_FOLDER
        yield Prepared(assignment_of(ask.found, job=self._path, plan=plan, folder=folder))

    def run(self, plan: str, rank: RankInfo, stop: StopRequest) -> ExitCode:  # noqa: ARG002
        """Hold this rank's part; rank 0 asks."""
        from megalm.generate.launched import lead_or_follow

        told = json.loads(plan)
        ask = self._read(told["arguments"], told["world_size"])
        return lead_or_follow(
            ask.found, rank, lambda ranks: ask.drive(AskedModel(ask.found, ranks, batch_size=ask.batch_size))
        )
