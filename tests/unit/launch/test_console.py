"""Commands whose console ends: processes on pipes without a reader, full disks, closed streams and terminals."""

from __future__ import annotations

import io
import os
import pty
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from megalm.launch.console import LastingStream, OutputLostError, run_on_console

COMMAND = """
import os, sys
from megalm.launch.console import run_on_console

def command():
    for number in range(3):
        print("line", number, flush=True)
        print("error", number, file=sys.stderr, flush=True)
    with open(sys.argv[1], "w") as work:
        assert work.fileno() > 2, "a library that prints to descriptor 1 would write into this file"
        os.system("echo from a child 2> /dev/null")
        work.write("done")
    print("last word")
    return 0

sys.exit(run_on_console(command, works=sys.argv[2] == "works"))
"""


def without_reader() -> int:
    reading, writing = os.pipe()
    os.close(reading)
    return writing


def hung_up() -> int:
    terminal, line = pty.openpty()
    os.close(terminal)
    return line


def full() -> int:
    return os.open("/dev/full", os.O_WRONLY)


CONSOLES = pytest.mark.parametrize("console", [without_reader, hung_up, full])


def run(folder: Path, kind: str, out: int, err: int | None = None) -> tuple[int, str, bool]:
    """Exit code, standard error where it is no given descriptor, and whether the work was done."""
    work = folder / "work"
    command = [sys.executable, "-c", COMMAND, str(work), kind]
    done = subprocess.run(command, stdout=out, stderr=subprocess.PIPE if err is None else err, check=False)
    os.close(out)
    return done.returncode, (done.stderr or b"").decode(), work.exists() and work.read_text() == "done"


@CONSOLES
@pytest.mark.parametrize("both", [False, True])
def test_work_is_done_whoever_watches(tmp_path: Path, console: Callable[[], int], both: bool) -> None:
    out = console()
    code, err, is_done = run(tmp_path, "works", out, out if both else None)
    assert (code, is_done) == (0, True), err
    assert both or err.splitlines() == ["error 0", "error 1", "error 2"]


@pytest.mark.parametrize("closed", [">&-", "2>&-", ">&- 2>&-", "<&- >&- 2>&-"])
def test_what_is_opened_does_not_take_the_place_of_a_closed_console(tmp_path: Path, closed: str) -> None:
    line = f'"$@" {closed}'
    work = tmp_path / "work"
    done = subprocess.run(["sh", "-c", line, "sh", sys.executable, "-c", COMMAND, work, "works"], check=False)
    assert (done.returncode, work.read_text()) == (0, "done")


@pytest.mark.parametrize(
    ("console", "code", "words"),
    [
        (without_reader, 141, ""),
        (full, 3, "standard output: No space left on device"),
        (hung_up, 3, "standard output: Input/output error"),
    ],
)
def test_a_command_that_only_prints_does_not_end_as_done(
    tmp_path: Path, console: Callable[[], int], code: int, words: str
) -> None:
    found, err, is_done = run(tmp_path, "prints", console())
    assert (found, err.strip(), is_done) == (code, words, False)


def test_an_error_keeps_its_exit_code() -> None:
    broken = without_reader()
    line = [sys.executable, "-m", "megalm", "check", "experiment=quickstart", "parallel.tp=3"]
    assert subprocess.run(line, stdout=broken, stderr=broken, check=False).returncode == 2
    os.close(broken)


def test_help_that_nobody_reads_ends_like_cat() -> None:
    broken = without_reader()
    line = [sys.executable, "-m", "megalm", "check", "--help"]
    done = subprocess.run(line, stdout=broken, stderr=subprocess.PIPE, check=False)
    os.close(broken)
    assert (done.returncode, done.stderr) == (141, b"")


def test_only_work_outlasts_its_terminal() -> None:
    def hang_up() -> int:
        os.kill(os.getpid(), signal.SIGHUP)
        return 0

    heard: list[int] = []
    before = signal.signal(signal.SIGHUP, lambda number, _: heard.append(number))
    try:
        assert run_on_console(hang_up, works=True) == 0
        assert heard == []
        assert run_on_console(hang_up, works=False) == 0
        assert heard == [signal.SIGHUP], "and what was there before is there again"
    finally:
        signal.signal(signal.SIGHUP, before)


class Disk(io.StringIO):
    """Has no room for a while."""

    is_full = True

    def write(self, text: str) -> int:
        if self.is_full:
            raise OSError(28, "No space left on device")
        return super().write(text)


def test_a_disk_with_room_again_gets_lines_again() -> None:
    disk = Disk()
    stream = LastingStream(disk)
    print("lost", file=stream)
    disk.is_full = False
    print("kept", file=stream)
    assert (disk.getvalue(), stream.lost) == ("kept\n", None)


def test_required_output_is_not_lost_in_silence() -> None:
    with pytest.raises(OutputLostError, match="No space left"):
        LastingStream(Disk(), required=True).write("text")


def test_characters_that_a_terminal_lacks_are_escaped() -> None:
    terminal = io.TextIOWrapper(io.BytesIO(), encoding="latin-1")
    print("caf\xe9 ▶", file=LastingStream(terminal), flush=True)
    assert terminal.buffer.getvalue() == b"caf\xe9 \\u25b6\n"


def test_streams_are_given_back(capsys) -> None:
    before = sys.stdout, sys.stderr
    assert run_on_console(lambda: print("said") or 5, works=True) == 5
    assert (sys.stdout, sys.stderr) == before
    assert capsys.readouterr().out == "said\n"
