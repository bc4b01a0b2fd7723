"""Stop requests: the first signal counts, and none is lost while handlers are not there yet."""

import os
import signal
import subprocess
import sys

import pytest

from megalm.launch.signals import STOP_SIGNALS, StopRequest


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
    # In a process of its own: here, a thread of some library that holds nothing back would take it, and end us all.
    lines = (
        "import os, signal; from megalm.launch.signals import STOP_SIGNALS, StopRequest; "
        "signal.pthread_sigmask(signal.SIG_BLOCK, STOP_SIGNALS); os.kill(os.getpid(), signal.SIGUSR2); "
        "print(StopRequest.install().pending())"
    )
    done = subprocess.run([sys.executable, "-c", lines], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (0, "USR2\n")


def test_importing_needs_no_torch():
    code = "import sys, megalm.launch.local, megalm.launch.worker; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


@pytest.mark.parametrize(("interrupts", "code"), [(1, 0), (2, 0), (3, -signal.SIGINT)])
def test_the_third_interrupt_kills_a_process_that_does_not_stop(interrupts, code):
    lines = (
        "import os, signal; from megalm.launch.signals import StopRequest; StopRequest.install(); "
        f"[os.kill(os.getpid(), signal.SIGINT) for _ in range({interrupts})]"
    )
    assert subprocess.run([sys.executable, "-c", lines], check=False).returncode == code
