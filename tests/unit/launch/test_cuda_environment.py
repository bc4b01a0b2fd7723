"""What a rank sets before CUDA starts, and what it leaves to the user."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from megalm.launch import worker
from megalm.launch.cuda_environment import set_defaults
from megalm.launch.discovery import LOCAL, RankInfo
from megalm.launch.job import Assignment

NAMES = ("CUDA_DEVICE_MAX_CONNECTIONS", "TORCH_NCCL_HIGH_PRIORITY")


def test_what_the_user_has_set_stays() -> None:
    environment = {"CUDA_DEVICE_MAX_CONNECTIONS": "1"}
    set_defaults(environment)
    assert environment == {"CUDA_DEVICE_MAX_CONNECTIONS": "1", "TORCH_NCCL_HIGH_PRIORITY": "1"}


class _ChosenError(Exception):
    """The device is being chosen: torch may start CUDA from here on."""


@pytest.mark.parametrize(
    ("device", "world_size", "overlaps", "is_set"),
    [
        ("auto", 2, True, True),
        ("cuda", 2, True, True),
        ("cuda", 2, False, False),
        ("cpu", 2, True, False),
        ("auto", 1, True, False),
    ],
)
def test_a_rank_that_overlaps_sets_them_before_cuda_can_start(
    device, world_size, overlaps, is_set, monkeypatch
) -> None:
    for name in NAMES:
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)
    seen: dict[str, str | None] = {}

    def choose(wanted: str, meeting: object) -> None:
        seen.update({name: os.environ.get(name) for name in NAMES})
        raise _ChosenError

    monkeypatch.setattr("megalm.launch.device.choose_device", choose)
    rank = RankInfo(
        rank=0,
        world_size=world_size,
        local_rank=0,
        local_world_size=world_size,
        launcher=LOCAL,
        master_addr="",
        master_port=0,
    )
    assignment = Assignment("", "", world_size, 1, Path(), device=device, overlaps=overlaps)
    with pytest.raises(_ChosenError):
        worker._carry_out(SimpleNamespace(rank=rank), assignment, None, None)
    assert seen == {
        "CUDA_DEVICE_MAX_CONNECTIONS": "32" if is_set else None,
        "TORCH_NCCL_HIGH_PRIORITY": "1" if is_set else None,
    }


def test_nothing_before_them_has_imported_torch() -> None:
    """CUDA cannot have started: the worker's module, with all that it imports, leaves torch alone."""
    code = "import sys, megalm.launch.worker, megalm.launch.cuda_environment; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
