"""What is sent to ranks arrives unchanged, and rank 0 upholds the claim that the launcher holds."""

from __future__ import annotations

import io
import sys
from contextlib import ExitStack, contextmanager
from dataclasses import fields
from pathlib import Path

import pytest

from megalm.launch.job import Assignment, load_job
from megalm.launch.worker import _assignment_of_launcher
from megalm.ownership import Claim
from megalm.training.job import JOB, TRAIN

ASSIGNMENT = Assignment(
    job=TRAIN,
    plan='{"any": "text\\n"}',
    world_size=16,
    threads_per_rank=3,
    folder=Path("/runs/a b"),
    device="cpu",
    dtype="bf16",
    timeout_seconds=7,
    overlaps=True,
    notes=("one", "two"),
    nothing_to_do=("all steps are done",),
    claim=Claim(lock=Path("/runs/a b/owner.lock"), token="abc", what="run.name=a b"),
)


@pytest.mark.parametrize(
    ("asked", "overlaps"),
    [((), False), (("parallel.early_receives=true",), True), (("parallel.early_receives=false",), False)],
)
def test_a_run_that_is_to_overlap_says_so_to_its_ranks(asked, overlaps, tiny_dataset: Path, tmp_path: Path) -> None:
    arguments = [
        "experiment=quickstart",
        f"data.path={tiny_dataset}",
        f"run.dir={tmp_path}",
        "parallel.tp=1",
        "parallel.pp=2",
        *asked,
    ]
    with JOB.prepare(arguments, 2, say=lambda _: None, cancelled=lambda: False) as prepared:
        assert prepared.assignment.overlaps is overlaps


def test_an_assignment_arrives_as_it_was_sent() -> None:
    defaults = Assignment("j", "", 1, 1, Path())
    same = [f.name for f in fields(Assignment) if getattr(ASSIGNMENT, f.name) == getattr(defaults, f.name)]
    assert not same, "every field has another value than its default, or losing it would go unnoticed"
    assert Assignment.from_json(ASSIGNMENT.to_json()) == ASSIGNMENT
    assert Assignment.from_json(defaults.to_json()) == defaults


def test_a_job_is_found_by_its_name() -> None:
    assert load_job(TRAIN) is JOB


def test_rank_0_keeps_the_claim_of_its_launcher_alive(monkeypatch: pytest.MonkeyPatch) -> None:
    alive: list[str] = []

    @contextmanager
    def kept_alive(claim: Claim):
        alive.append(claim.token)
        yield
        alive.remove(claim.token)

    monkeypatch.setattr(Claim, "kept_alive", kept_alive)
    monkeypatch.setattr(sys, "stdin", io.StringIO(ASSIGNMENT.to_json()))
    with ExitStack() as held:
        assert _assignment_of_launcher(held) == ASSIGNMENT
        assert alive == ["abc"], "a launcher that Ctrl-Z stops sends no heartbeat"
    assert not alive
