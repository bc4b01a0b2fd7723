"""Functions for ranks that a test starts: one that never returns, one that dies, one that does as it should."""

from __future__ import annotations

import os
import time

import torch
import torch.distributed as dist


def act(item: str) -> float:
    """Hang, die or add up ranks."""
    if item == "hang":
        time.sleep(600)
    if item == "die" and dist.get_rank() == 1:
        print("about to die")
        os._exit(9)
    total = torch.tensor([1.0 + dist.get_rank()])
    dist.all_reduce(total)
    return float(total)
