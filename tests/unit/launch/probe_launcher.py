"""A launcher in a process of its own, which a test can signal and kill: ``python -m probe_launcher RANKS RUN_DIR``."""

from __future__ import annotations

import sys
from pathlib import Path

from megalm.launch.local import LocalJob, run_local

if __name__ == "__main__":
    job = LocalJob(int(sys.argv[1]), threads_per_rank=1, run_dir=Path(sys.argv[2]), plan="", module="probe")
    sys.exit(run_local(job, lambda line: print(line, flush=True)))
