"""One rank of a run as a user's launcher starts it, which writes in the end what it has imported and opened.

    python rank_imports.py RANK WORLD_SIZE PORT PLAN

``PLAN`` is a file with the text that rank 0 sends to the others; ``rankRANK.json`` beside it is written.
"""

from __future__ import annotations

import json
import os
import sys
from collections import Counter
from pathlib import Path
from typing import Any

opened: Counter[str] = Counter()
_seen: set[str] = set()


def count(event: str, arguments: tuple[Any, ...]) -> None:
    """An audit hook: files of Python's libraries and of megalm by package."""
    if event != "open" or not isinstance(arguments[0], str | bytes):
        return
    path = os.fsdecode(arguments[0])
    if "site-packages/" in path:
        opened[path.partition("site-packages/")[2].split("/")[0]] += 1
    elif "/megalm/" in path and path.endswith((".py", ".pyc")):
        module = path.replace("__pycache__/", "").partition(".")[0]
        opened["megalm"] += module not in _seen  # where bytecode is not kept, as an installed package's is, twice
        _seen.add(module)
    elif "/lib/python3" in path:
        opened["python"] += 1


def main(rank: int, world_size: int, port: int, plan: Path) -> None:
    """Meet the others and train."""
    import megalm.launch.worker  # noqa: F401 - what a rank begins with
    from megalm.launch.discovery import LOCAL, RankInfo
    from megalm.launch.job import load_job
    from megalm.launch.signals import StopRequest

    info = RankInfo(
        rank=rank,
        world_size=world_size,
        local_rank=rank,
        local_world_size=world_size,
        launcher=LOCAL,
        master_addr="127.0.0.1",
        master_port=port,
    )
    text = plan.read_text()
    job = load_job("megalm.training.job:JOB")
    before_torch = sum(opened.values())

    import torch.distributed as dist

    store = dist.TCPStore("127.0.0.1", port, world_size, is_master=rank == 0)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=world_size)
    job.run(text, info, StopRequest())
    found = {"opened": opened, "before_torch": before_torch, "modules": sorted(sys.modules)}
    plan.with_name(f"rank{rank}.json").write_text(json.dumps(found))
    dist.barrier()
    os._exit(0)


if __name__ == "__main__":
    sys.addaudithook(count)
    main(*map(int, sys.argv[1:4]), Path(sys.argv[4]))
