"""Ranks that this process starts to hold a model, and talks to: for layouts of several ranks without a launcher.

This process is none of them: it keeps its terminal, its memory and Ctrl-C. A socket leads to rank 0, which tells the
others (see ``ranks.py``). torch is imported by the ranks alone.
"""

from __future__ import annotations

import json
import pickle
import shutil
import socket
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from megalm.errors import ConfigError, ExitCode, MegalmError
from megalm.generate.assignment import assignment_of
from megalm.launch import RankInfo
from megalm.launch.job import Prepared
from megalm.launch.local import LocalJob, LocalRanks
from megalm.launch.logs import log_path
from megalm.launch.signals import StopRequest
from megalm.runs.find import FoundModel, find_model

STARTED = "megalm.generate.started:JOB"
_POLL_SECONDS = 0.2
_SECONDS_TO_END = 5.0


class RanksFailedError(MegalmError):
    """Ranks of a model ended when they should not have; what they said is in their logs, which are kept."""


class StartedRanks:
    """Ranks on this machine.

    Args:
        found: the model that they are to hold.
        overrides: with which it was found.

    Raises:
        MegalmError: what a rank found wrong.
    """

    def __init__(self, found: FoundModel, overrides: Sequence[str]) -> None:
        self._folder = Path(tempfile.mkdtemp(prefix="megalm-ranks-"))
        ours, theirs = socket.socketpair()
        self._connection = Connection(ours.detach())
        plan = _Plan(str(found.run), list(overrides), found.world_size, theirs.fileno())
        assignment = assignment_of(found, job=STARTED, plan=json.dumps(plan.__dict__), folder=self._folder)
        self._ranks = LocalRanks(lambda line: print(line, file=sys.stderr, flush=True))
        self._failed = False
        try:
            self._ranks.start(
                LocalJob(
                    world_size=found.world_size,
                    threads_per_rank=assignment.threads_per_rank,
                    run_dir=self._folder,
                    plan=assignment.to_json(),
                    inherited=(theirs.fileno(),),
                    output=2,
                )
            )
            theirs.close()
            self._answer(None)
        except BaseException:
            self.close()
            raise

    def call(self, function: str, payload: Any, on_event: Callable[[Any], object] | None = None) -> Any:
        """See :class:`megalm.generate.ranks.Ranks`."""
        self._connection.send((function, payload))
        return self._answer(on_event)

    def close(self) -> None:
        """End the ranks; their logs stay where one failed."""
        with suppress(OSError, ValueError):
            self._connection.send(None)
            self._ranks.wait_until_ended(_SECONDS_TO_END)
        with suppress(OSError):
            self._connection.close()
        self._ranks.kill()
        if not self._failed:
            shutil.rmtree(self._folder, ignore_errors=True)

    def _answer(self, on_event: Callable[[Any], object] | None) -> Any:
        while True:
            kind, value = self._receive()
            if kind == "event":
                if on_event is not None:
                    on_event(value)
            elif kind == "error":
                raise value
            else:
                return value

    def _receive(self) -> tuple[str, Any]:
        try:
            while not self._connection.poll(_POLL_SECONDS):
                if (failure := self._ranks.first_failure()) is not None and not self._connection.poll(_POLL_SECONDS):
                    raise self._failure(failure)
            kind, value = self._connection.recv()
        except (EOFError, ConnectionError):
            self._ranks.wait_until_ended(1.0)
            raise self._failure(self._ranks.first_failure() or "rank 0 has gone") from None
        return kind, value

    def _failure(self, what: str) -> RanksFailedError:
        self._failed = True
        return RanksFailedError(f"{what}; logs: {log_path(self._folder, 0).parent}")


@dataclass(frozen=True)
class _Plan:
    """What ranks are told."""

    run: str
    overrides: list[str]
    world_size: int
    descriptor: int


class StartedJob:
    """Holds a model on ranks, and does what the socket asks."""

    @contextmanager
    def prepare(
        self,
        arguments: Sequence[str],  # noqa: ARG002
        world_size: int | None,  # noqa: ARG002
        *,
        say: Callable[[str], object],  # noqa: ARG002
        cancelled: Callable[[], bool],  # noqa: ARG002
    ) -> Iterator[Prepared]:
        """Not of the command line: :class:`StartedRanks` makes the assignment."""
        raise ConfigError("this job is started by the process that asks it")
        yield  # a context manager, as the protocol has it

    def run(self, plan: str, rank: RankInfo, stop: StopRequest) -> ExitCode:  # noqa: ARG002
        """Load this rank's part; rank 0 then listens to the socket, the others to rank 0."""
        from megalm.generate.launched import lead_or_follow

        told = _Plan(**json.loads(plan))
        connection = Connection(told.descriptor)
        if rank.rank:
            connection.close()  # so that rank 0's end is noticed
        found = find_model(told.run, told.overrides, told.world_size)
        return lead_or_follow(found, rank, lambda ranks: _listen(connection, ranks))


def _listen(connection: Connection, ranks: Any) -> ExitCode:
    """Call what the socket asks until it says the end, or is closed."""
    connection.send(("ready", None))
    while True:
        try:
            asked = connection.recv()
        except (EOFError, ConnectionError):
            return ExitCode.DONE
        if asked is None:
            return ExitCode.DONE
        function, payload = asked
        try:
            value = ranks.call(function, payload, lambda event: connection.send(("event", event)))
        except MegalmError as error:
            connection.send(("error", _portable(error)))
        else:
            connection.send(("value", value))


def _portable(error: MegalmError) -> MegalmError:
    """The error, if it survives pickling; else one with its text."""
    try:
        copy: MegalmError = pickle.loads(pickle.dumps(error))
    except Exception:
        return ConfigError(str(error).splitlines())
    return copy


JOB = StartedJob()
