"""Functions that all ranks of a model call together, at the word of one of them.

Rank 0 leads: what it is asked to call it tells the others through the store in which they met, which has no timeout
that a user who thinks could exceed, and needs no GPU. They call the same function with the same payload, which is how
their collectives meet. Per call: one write of rank 0 and one read of each other rank, and one write per replica.
"""

from __future__ import annotations

import pickle
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from importlib import import_module
from typing import TYPE_CHECKING, Any

from megalm.runs.load import TrainedModel

if TYPE_CHECKING:
    from torch.distributed import Store

OnEvent = Callable[[Any], object]
"""Told of what a function reports while it runs, by rank 0."""

_PATIENCE = timedelta(minutes=5)
"""How long a rank sleeps at a time while nothing is asked."""

_END = "end"


class Ranks(ABC):
    """The ranks of a model, to be asked from this process."""

    @abstractmethod
    def call(self, function: str, payload: Any, on_event: OnEvent | None = None) -> Any:
        """Call a function on every rank.

        Args:
            function: ``module:name`` of a function of (:class:`OnRank`, payload).
            payload: picklable; what the function is to do, known to be right.
            on_event: told of what the function reports.

        Returns:
            What it returns on rank 0.

        Raises:
            MegalmError: what it raises there.
        """

    def close(self) -> None:  # noqa: B027 - ranks of this process end with it
        """Let the ranks go."""


@dataclass(frozen=True)
class OnRank:
    """What a function has on each rank.

    Attributes:
        trained: this rank's part of the model.
        board: where ranks leave messages; None: this rank is alone.
        emit: reports to whoever asked; does nothing on other ranks than 0.
    """

    trained: TrainedModel
    board: Board | None
    emit: OnEvent

    @property
    def leads(self) -> bool:
        """Whether this is rank 0."""
        return self.trained.context.rank == 0

    def from_replicas(self, value: Any) -> list[Any]:
        """What each replica has found, by number, on rank 0; elsewhere an empty list.

        The ranks of one replica have found the same, so one of them speaks.
        """
        context = self.trained.context
        if self.board is None or context.topology.dp == 1:
            return [value]
        speaks = context.model_group.index == 0
        return self.board.collect(value if speaks else None, context.coordinates.dp, context.topology.dp, self.leads)


class Board:
    """Messages between ranks, in a store: pickles of a job's own processes, which nobody else can write.

    Args:
        store: in which the ranks met.
    """

    def __init__(self, store: Store) -> None:
        self._store = store
        self._calls = self._collections = 0

    def announce(self, message: Any) -> None:
        """Rank 0 says what is next."""
        self._calls += 1
        self._put(f"call/{self._calls}", message)
        if self._calls > 2:  # everybody has read the one before last, or would not have answered the last
            self._store.delete_key(f"call/{self._calls - 2}")

    def hear(self) -> Any:
        """The others wait for it, however long."""
        self._calls += 1
        return pickle.loads(self._wait(f"call/{self._calls}"))

    def collect(self, value: Any, replica: int, replicas: int, leads: bool) -> list[Any]:
        """See :meth:`OnRank.from_replicas`; ``value`` None: another rank speaks for this replica."""
        self._collections += 1
        name = f"found/{self._collections}"
        if value is not None and not (leads and replica == 0):
            self._put(f"{name}/{replica}", value)
        if not leads:
            return []
        others = [pickle.loads(self._wait(f"{name}/{number}")) for number in range(1, replicas)]
        for number in range(1, replicas):
            self._store.delete_key(f"{name}/{number}")
        return [value, *others]

    def _put(self, key: str, value: Any) -> None:
        self._store.set(key, pickle.dumps(value))  # type: ignore[arg-type]  # it takes bytes, and is declared for text

    def _wait(self, key: str) -> bytes:
        from torch.distributed import DistStoreError

        while True:
            try:
                self._store.wait([key], _PATIENCE)
            except DistStoreError:  # not yet
                continue
            return bytes(self._store.get(key))


class TheseRanks(Ranks):
    """The ranks that this process is rank 0 of; or it is alone.

    Args:
        trained: this rank's part of the model.
        board: where the others listen; None: there are none.
    """

    def __init__(self, trained: TrainedModel, board: Board | None = None) -> None:
        self.trained, self._board = trained, board

    def call(self, function: str, payload: Any, on_event: OnEvent | None = None) -> Any:
        """See the base class."""
        if self._board is not None:
            self._board.announce((function, payload))
        return _function(function)(OnRank(self.trained, self._board, on_event or _ignore), payload)

    def close(self) -> None:
        """Tell the others that nothing more will be asked."""
        if self._board is not None:
            self._board.announce((_END, None))


def follow(trained: TrainedModel, board: Board) -> None:
    """What every rank but 0 does: call what rank 0 announces, until it says that it is the end."""
    while True:
        function, payload = board.hear()
        if function == _END:
            return
        _function(function)(OnRank(trained, board, _ignore), payload)


def _function(path: str) -> Callable[[OnRank, Any], Any]:
    module, _, name = path.partition(":")
    function: Callable[[OnRank, Any], Any] = getattr(import_module(module), name)
    return function


def _ignore(event: Any) -> None:
    """Nobody listens."""
