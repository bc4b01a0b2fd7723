"""A rank that does no work: what ``megalm.launch.local`` starts in these tests, as ``python -m probe``.

``PROBE_MODE`` says what it does, ``PROBE_DIR`` where it writes what it saw.
"""

from __future__ import annotations

import os
import signal
import socket
import sys
import time
from pathlib import Path
from typing import NoReturn

from megalm.launch.signals import STOP_SIGNALS, StopRequest
from megalm.launch.worker import _die_with

HANG_SECONDS = 60


def main() -> NoReturn:
    rank, _, port, parent = map(int, sys.argv[1:5])
    folder = Path(os.environ["PROBE_DIR"])
    _die_with(parent)
    mode, _, argument = os.environ["PROBE_MODE"].partition(":")
    if mode == "exit":  # one code per rank; negative: ends by that signal
        code = int(argument.split(",")[rank])
        if code < 0:
            os.kill(os.getpid(), -code)
        sys.exit(code)
    if mode == "one-fails":  # rank 1 fails, the others are in a collective that never ends
        if rank == 1:
            sys.exit(int(argument))
        time.sleep(HANG_SECONDS)
    if mode == "count-signals":
        count_signals(folder / f"rank-{rank}.signals", folder / f"rank-{rank}.ready")
    if mode == "slow-start":  # as a rank that has yet to import what it needs
        (folder / f"rank-{rank}.ready").touch()
        time.sleep(0.5)
        sys.exit({"TERM": 85, None: 1}[StopRequest.install().pending()])
    if mode == "hang":
        StopRequest.install()
        (folder / f"rank-{rank}.ready").write_text(str(os.getpid()))
        time.sleep(HANG_SECONDS)
    if mode == "tell" and rank == 0:
        listener = socket.socket(fileno=int(sys.argv[5]))
        (folder / "told").write_text(f"{listener.getsockname()[1] == port} {sys.stdin.read()}")
    (folder / f"rank-{rank}.threads").write_text(os.environ["OMP_NUM_THREADS"])
    sys.exit(0)


def count_signals(seen: Path, ready: Path) -> NoReturn:
    """Write the names of all signals that arrive until half a second after the first one, and exit 130."""
    names: list[str] = []
    for number in STOP_SIGNALS:
        signal.signal(number, lambda n, _: names.append(signal.Signals(n).name))
    signal.pthread_sigmask(signal.SIG_UNBLOCK, STOP_SIGNALS)
    ready.touch()
    deadline = time.monotonic() + HANG_SECONDS
    while not names and time.monotonic() < deadline:
        time.sleep(0.01)
    until = time.monotonic() + 0.5
    while time.monotonic() < until:
        time.sleep(0.01)
    seen.write_text(" ".join(names))
    sys.exit(130)


if __name__ == "__main__":
    main()
