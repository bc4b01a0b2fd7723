"""What the launcher tells glibc's malloc, seen from a process that it would start."""

from __future__ import annotations

import os
import platform
import subprocess
import sys

import pytest

from megalm.launch.local import KEEPS_MEMORY

PAGES_TOUCHED_ANEW = """
import resource, torch
def faults(): return resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(5):  # what is freed first lies scattered, and is joined while steps go by
    before = faults()
    for _ in range(4):
        torch.empty(2**24).fill_(1.0)
print(faults() - before)
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="MALLOC_ variables are glibc's")
def test_freed_tensors_are_used_again_and_not_given_back_to_the_kernel() -> None:
    def run(extra: dict[str, str]) -> int:
        bare = {name: value for name, value in os.environ.items() if not name.startswith("MALLOC_")}
        command = [sys.executable, "-c", PAGES_TOUCHED_ANEW]
        return int(subprocess.run(command, env={**bare, **extra}, check=True, capture_output=True, text=True).stdout)

    assert run(KEEPS_MEMORY) < 100
    assert run({}) > 1000, "glibc's default has changed: is KEEPS_MEMORY still needed?"
