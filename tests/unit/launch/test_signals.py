"""Stop requests: the first signal counts, and none is lost while handlers are not there yet."""

import os
import signal
import subprocess
import sys

import pytest

from megalm.signals import STOP_SIGNALS, StopRequest


@pytest.fixture(autouse=True)
def handlers():
    before = {number: signal.getsignal(number) for number in STOP_SIGNALS}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.mark.parametrize("name", ["INT", "TERM", "USR1", "USR2"])
def test_first_signal_counts(name):
    stop = StopRequest.install()
    assert stop.pending() is None
    os.kill(os.getpid(), getattr(signal, f"SIG{name}"))
    os.kill(os.getpid(), signal.SIGTERM)
    os.kill(os.getpid(), signal.SIGINT)
    assert stop.pending() == name


def test_signals_held_back_before_are_received():
    signal.pthread_sigmask(signal.SIG_BLOCK, STOP_SIGNALS)
    os.kill(os.getpid(), signal.SIGUSR2)
    assert StopRequest.install().pending() == "USR2"


def test_importing_needs_no_torch():
    code = "import sys, megalm.launch.local, megalm.worker; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
