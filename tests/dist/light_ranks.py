"""Ranks that do no work, by the hundred: forks of one process that has torch, about 10 MB each.

    python -m light_ranks RANKS OUTCOME FOLDER

Each runs ``megalm.launch.worker.run_rank`` as srun's ranks do, over a TCP store that rank 0 hosts; what it carries out
is to agree three times, and then ``OUTCOME``:

- ``done``: end;
- ``fails``: rank 7 finds its data damaged, while the others sleep, as in a collective that never ends;
- ``killed``: rank 7 is killed, which rank 9 notices by an error of its connection, while the others sleep.

Ranks above 0 may open 256 files. One line of JSON per rank goes to ``FOLDER/RANK``; the last line printed is the exit
codes by rank.
"""

from __future__ import annotations

import gc
import json
import os
import resource
import signal
import sys
import time
from pathlib import Path
from typing import NoReturn

from megalm.errors import DataError
from megalm.launch import RankInfo
from megalm.launch.discovery import SRUN
from megalm.launch.job import Assignment
from megalm.launch.rendezvous import Meeting
from megalm.launch.signals import StopRequest
from megalm.launch.store import LOOPBACK, free_port_listener
from megalm.launch.worker import run_rank

CLIENT_FILES = 256
STUCK_SECONDS = 600.0
FAILING, WITNESS = 7, 9


def main(ranks: int, outcome: str, folder: Path) -> None:
    import torch.distributed  # noqa: F401 - what forks share

    gc.freeze()
    listener = free_port_listener()
    children = []
    for rank in range(ranks):
        child = os.fork()
        if child == 0:
            be_rank(rank, ranks, listener, outcome, folder)
        children.append(child)
    listener.close()
    codes = [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]
    print(json.dumps(codes))


def be_rank(rank: int, ranks: int, listener, outcome: str, folder: Path) -> NoReturn:
    port = listener.getsockname()[1]
    if rank:
        listener.close()
        resource.setrlimit(resource.RLIMIT_NOFILE, (CLIENT_FILES, CLIENT_FILES))
    else:  # what a login shell has; the hard limit is the machine's
        resource.setrlimit(resource.RLIMIT_NOFILE, (CLIENT_FILES, resource.getrlimit(resource.RLIMIT_NOFILE)[1]))
    info = RankInfo(
        rank=rank,
        world_size=ranks,
        local_rank=rank,
        local_world_size=ranks,
        launcher=SRUN,
        master_addr=LOOPBACK,
        master_port=port,
    )

    def prepare(held) -> Assignment:
        return Assignment(job="", plan=outcome, world_size=ranks, threads_per_rank=1, folder=folder, timeout_seconds=60)

    def carry_out(meeting: Meeting, assignment: Assignment, stop: StopRequest, console) -> int:
        stop.before_sudden_end((folder / f"{rank}.wish").touch)
        agreed = [meeting.all_agree("one", True), meeting.all_agree("two", rank != 3), meeting.all_agree("three", True)]
        files = len(list(Path("/proc/self/fd").iterdir()))
        limit = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
        (folder / f"{rank}").write_text(json.dumps({"agreed": agreed, "files": files, "limit": limit}))
        meeting.all_agree("written", True)
        if assignment.plan == "done":
            return 0
        if rank == FAILING and assignment.plan == "fails":
            raise DataError("data: damaged; another copy")
        if rank == FAILING:
            os.kill(os.getpid(), signal.SIGKILL)
        if rank == WITNESS and assignment.plan == "killed":
            raise RuntimeError("Connection closed by peer [127.0.0.1]:1234")
        time.sleep(STUCK_SECONDS)
        return 0

    run_rank(info, StopRequest.install(), prepare, listener if rank == 0 else None, carry_out=carry_out)


if __name__ == "__main__":
    main(int(sys.argv[1]), sys.argv[2], Path(sys.argv[3]))
