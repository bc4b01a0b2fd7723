"""How many messages asking a model takes, at 8, 1,024 and 16,384 ranks: counted on the real code, one rank at a time.

The groups are those of the layout, and what would be sent is counted instead. What grows with the ranks is said in
``passes.py`` and ``ranks.py``; here it is pinned.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from megalm.core.place import Place
from megalm.generate import passes
from megalm.generate.passes import Pass, Passes
from megalm.generate.ranks import Board, OnRank
from megalm.mesh.groups import Group, ParallelContext
from megalm.mesh.topology import Topology

LAYOUTS = {8: Topology(tp=2, pp=2, dp=2), 1024: Topology(tp=8, pp=8, dp=16), 16384: Topology(tp=8, pp=16, dp=128)}


def context_of(topology: Topology, rank: int) -> ParallelContext:
    def along(*axes: str) -> Group:
        ranks = topology.group_of(rank, *axes)
        return Group(ranks, ranks.index(rank))

    single = ParallelContext.single()
    return replace(single, topology=topology, rank=rank, pp_group=along("pp"), model_group=along("pp", "tp"))


class Stages:
    """Stands for a rank's part of a model."""

    hidden_size = 4

    def __init__(self, stages: tuple[int, ...]) -> None:
        self.part = SimpleNamespace(stages=stages)

    def parameters(self) -> Any:
        return iter([torch.zeros(1)])

    def through(self, stage: int, tokens: torch.Tensor, x: torch.Tensor | None, place: Place) -> torch.Tensor:
        return torch.zeros(*tokens.shape, self.hidden_size)


@pytest.mark.parametrize("virtual", [1, 3])
@pytest.mark.parametrize("ranks", LAYOUTS)
def test_a_pass_takes_as_many_messages_on_a_rank_whatever_the_replicas(
    ranks: int, virtual: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    topology = replace(LAYOUTS[ranks], virtual_stages=virtual)
    counts: Counter[str] = Counter()
    work = SimpleNamespace(is_completed=lambda: True, wait=lambda: None)
    for name in ("recv", "isend", "broadcast"):
        monkeypatch.setattr(passes.dist, name, lambda *_, name=name, **__: (counts.update([name]), work)[1])
    total: Counter[str] = Counter()
    one_model = topology.group_of(0, "pp", "tp")
    for rank in one_model:
        counts.clear()
        context = context_of(topology, rank)
        made = Passes(Stages(context.stages), context)  # type: ignore[arg-type]
        each = Pass(
            torch.zeros(3, 2, dtype=torch.int64), Place(torch.arange(2)), lambda x: x[:, 0, :2].double(), (3, 2)
        )
        made.start(each)
        assert made.result().shape == (3, 2)
        assert counts["broadcast"] == 1
        assert counts["isend"] <= virtual
        assert counts["recv"] <= virtual
        total += counts
    transfers = (topology.num_stages - 1) * topology.tp
    assert total == {"isend": transfers, "recv": transfers, "broadcast": len(one_model)}


class Store:
    """Counts what a rank asks of the store."""

    def __init__(self) -> None:
        self.asked: Counter[str] = Counter()
        self.kept: dict[str, bytes] = {}

    def set(self, key: str, value: bytes) -> None:
        self.asked["set"] += 1
        self.kept[key] = value

    def wait(self, keys: list[str], patience: Any) -> None:
        assert all(key in self.kept for key in keys), f"{keys}: nobody has written it"

    def get(self, key: str) -> bytes:
        self.asked["get"] += 1
        return self.kept[key]

    def delete_key(self, key: str) -> None:
        self.asked["delete"] += 1
        del self.kept[key]


@pytest.mark.parametrize("ranks", LAYOUTS)
def test_a_call_takes_one_message_to_each_rank_and_one_from_each_replica(ranks: int) -> None:
    topology, store, calls = LAYOUTS[ranks], Store(), 3
    boards: dict[int, Board] = {rank: Board(store) for rank in range(topology.world_size)}  # type: ignore[arg-type]
    for number in range(calls):
        boards[0].announce(("function", number))
        for rank in range(1, topology.world_size):
            assert boards[rank].hear() == ("function", number)
        for rank in [*range(1, topology.world_size), 0]:
            here = topology.coordinates(rank)
            first = SimpleNamespace(index=here.pp * topology.tp + here.tp)  # in the model's group
            context = SimpleNamespace(rank=rank, topology=topology, coordinates=here, model_group=first)
            trained: Any = SimpleNamespace(context=context)
            found = OnRank(trained, boards[rank], print).from_replicas({here.dp: number})
            assert found == ([] if rank else [{replica: number} for replica in range(topology.dp)])
    others, replicas = topology.world_size - 1, topology.dp - 1
    assert store.asked["set"] == calls * (1 + replicas)
    assert store.asked["get"] == calls * (others + replicas)
    assert len(store.kept) <= 2, "what everybody has read is deleted"
