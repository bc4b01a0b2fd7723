"""How many ranks the store's host can hold."""

from __future__ import annotations

import os
import resource
import subprocess
import sys
from dataclasses import replace

import pytest

from megalm.errors import ConfigError
from megalm.launch import RankInfo
from megalm.launch import store as store_module
from megalm.launch.descriptors import SPARE, check_room, connections_per_rank, limit_of_parent, raise_limit
from megalm.launch.store import room

SOFT, HARD = resource.getrlimit(resource.RLIMIT_NOFILE)


def test_more_ranks_than_fit_are_refused_with_the_limit_to_raise() -> None:
    check_room(192, 192 + SPARE, "rank 0")
    check_room(10**6, None, "rank 0")
    with pytest.raises(ConfigError) as caught:
        check_room(193, 192 + SPARE, "rank 0, which hosts the store,")
    assert str(caught.value) == (
        "world_size=193: rank 0, which hosts the store, may open 256 files (`ulimit -n`), enough for 192 ranks; raise "
        "its hard limit to at least 257 (`ulimit -Hn`, limits.conf, LimitNOFILE)"
    )


def test_a_second_connection_is_for_those_who_have_room() -> None:
    assert connections_per_rank(96, 192 + SPARE) == 2
    assert connections_per_rank(97, 192 + SPARE) == 1
    assert connections_per_rank(10**6, None) == 2


RAISE = """
import resource
resource.setrlimit(resource.RLIMIT_NOFILE, (100, 300))
from megalm.launch.descriptors import raise_limit
print(raise_limit(), resource.getrlimit(resource.RLIMIT_NOFILE))
"""


def test_the_soft_limit_becomes_the_hard_one() -> None:
    done = subprocess.run([sys.executable, "-c", RAISE], capture_output=True, text=True, check=True)
    assert done.stdout == "300 (300, 300)\n"


@pytest.mark.skipif(sys.platform != "linux", reason="prlimit")
def test_the_parents_limit_is_read_without_being_changed() -> None:
    code = "from megalm.launch.descriptors import limit_of_parent; print(limit_of_parent())"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    expected = None if SOFT == resource.RLIM_INFINITY else SOFT
    assert done.stdout == f"{expected}\n"
    assert resource.getrlimit(resource.RLIMIT_NOFILE) == (SOFT, HARD)
    assert limit_of_parent() is None or isinstance(limit_of_parent(), int)


INFO = RankInfo(
    rank=0, world_size=200, local_rank=0, local_world_size=8, launcher="torchrun", master_addr="a", master_port=1
)


def test_torchruns_agent_is_asked_for_its_limit_where_it_hosts_the_store(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(store_module, "limit_of_parent", lambda: 256)
    monkeypatch.setattr(store_module, "raise_limit", lambda: 4096)
    with pytest.raises(ConfigError, match=r"^world_size=200: torchrun, which hosts the store, may open 256 files"):
        room(INFO, None, {"TORCHELASTIC_USE_AGENT_STORE": "True"})
    assert room(INFO, None, {}) == 2, "rank 0 hosts it"
    assert room(replace(INFO, launcher="srun"), None, {"TORCHELASTIC_USE_AGENT_STORE": "True"}) == 2


REFUSED = """
import resource, sys
from contextlib import ExitStack
resource.setrlimit(resource.RLIMIT_NOFILE, (256, 256))
from megalm.launch import RankInfo
from megalm.launch.job import Assignment
from megalm.launch.signals import StopRequest
from megalm.launch.worker import run_rank
info = RankInfo(rank=0, world_size=1024, local_rank=0, local_world_size=8, launcher="srun", master_addr="localhost",
                master_port=29501)
run_rank(info, StopRequest.install(), lambda held: Assignment("a:b", "", 1024, 1, __import__("pathlib").Path("x")))
"""


def test_rank_0_of_too_many_ends_at_once_with_one_line() -> None:
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-c", REFUSED], capture_output=True, text=True, check=False, timeout=60, env=environment
    )
    assert done.returncode == 2, done.stderr
    assert done.stderr.count("\n") == 1
    assert done.stderr.startswith("world_size=1024: rank 0, which hosts the store, may open 256 files (`ulimit -n`)")


def test_raise_limit_never_lowers_it() -> None:
    found = raise_limit()
    assert found is None or found >= SOFT
