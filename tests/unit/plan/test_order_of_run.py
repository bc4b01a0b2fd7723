"""Which order a run has where its config leaves it open: by its ranks when it begins, and the same ever after."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from megalm.config.compose import compose
from megalm.config.schema import Config, Data
from megalm.data.stream.blocks import LONG_READS, SINGLES, Blocks, is_open
from megalm.data.stream.phases import DataState, Phase
from megalm.plan.plan import Plan
from megalm.plan.preflight import _with_order, make_plan

FIELDS = ("block_sequences", "lanes", "window_blocks")
OPEN = Data(path=("d",))


def config_with(data: Data) -> Config:
    return replace(compose(["experiment=quickstart"]), data=data)


def sizes(config: Config) -> Blocks:
    found = tuple(getattr(config.data, name) for name in FIELDS)
    assert None not in found, "nothing is left open"
    return Blocks(*found)


def checkpoint_with(blocks: Blocks) -> Any:
    fingerprint = {f"data.{name}": value for name, value in vars(blocks).items()}
    return SimpleNamespace(data=DataState(96, (Phase(0, 0, fingerprint),)).to_dict())


def test_the_default_is_what_conf_data_blocks_says() -> None:
    assert Blocks.of(compose(["experiment=quickstart", "data=blocks"]).data) == LONG_READS
    assert is_open(compose(["experiment=quickstart", "data=default"]).data)
    assert Blocks.of(OPEN) == SINGLES


@pytest.mark.parametrize(("ranks", "want"), [(1, SINGLES), (64, SINGLES), (65, LONG_READS), (16_384, LONG_READS)])
def test_a_run_that_begins_on_many_ranks_reads_blocks_and_says_so(ranks: int, want: Blocks) -> None:
    config, notes = _with_order(config_with(OPEN), ranks, None)
    assert sizes(config) == want
    assert [str(LONG_READS) in note and str(SINGLES) in note for note in notes] == [True] * (want == LONG_READS)


@pytest.mark.parametrize("chosen", [{"lanes": 1}, {"block_sequences": 8}, {"window_blocks": 2, "lanes": 3}])
def test_what_a_user_has_chosen_stays_and_the_rest_is_not_changed_for_it(chosen: dict[str, int]) -> None:
    config, notes = _with_order(config_with(replace(OPEN, **chosen)), 1024, None)
    assert sizes(config) == replace(SINGLES, **chosen)
    assert not notes


@pytest.mark.parametrize("ranks", [1, 1024])
@pytest.mark.parametrize("began_with", [SINGLES, LONG_READS, Blocks(8, 2, 5)])
def test_a_run_that_goes_on_keeps_its_order_on_any_number_of_ranks(ranks: int, began_with: Blocks) -> None:
    config, notes = _with_order(config_with(OPEN), ranks, checkpoint_with(began_with))
    assert sizes(config) == began_with
    assert not notes


def plan_of(dataset: Path, folder: Path, *overrides: str, ranks: int) -> Plan:
    common = ["experiment=quickstart", "train.micro_batch_size=1", "train.global_batch_size=128", "run.name=x"]
    return make_plan(
        [*common, "parallel.tp=2", "parallel.pp=2", f"data.path={dataset}", f"run.dir={folder}", *overrides], ranks
    )


def test_the_plan_that_ranks_get_has_the_order_and_the_notes(tiny_dataset: Path, tmp_path: Path) -> None:
    few, many = (plan_of(tiny_dataset, tmp_path, ranks=ranks) for ranks in (8, 128))
    assert sizes(few.config) == SINGLES
    assert not [note for note in few.notes if note.startswith("data.")]
    assert sizes(Plan.from_json(many.to_json()).config) == LONG_READS
    (order, readers) = [note for note in many.notes if note.startswith("data.")]
    assert order.startswith(str(LONG_READS))
    assert "128 ranks read shards, 4 each the same rows" in readers
    assert "data.readers=one_per_replica has 32 of them read" in readers
    chosen = plan_of(tiny_dataset, tmp_path, "data.readers=one_per_replica", "data.lanes=1", ranks=128)
    assert not [note for note in chosen.notes if note.startswith("data.")]


def test_the_plan_carries_the_indexes_without_what_grows_with_the_data(tiny_dataset: Path, tmp_path: Path) -> None:
    plan = plan_of(tiny_dataset, tmp_path, ranks=8)
    (splits,) = Plan.from_json(plan.to_json()).indexes
    assert sorted(splits) == ["train", "val"]
    assert splits == plan.indexes[0]
    assert all(not index.checks and len(index.fingerprint) == 64 for index in splits.values())
    assert [index.fingerprint for index in splits.values()] == [
        index.fingerprint for index in plan.indexes[0].values()
    ], "which comparisons leave out"
