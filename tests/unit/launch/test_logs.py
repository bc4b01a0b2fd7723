"""What reaches a rank's log, and what a progress bar sees."""

import errno
import io
import subprocess
import sys

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress

from megalm.launch.console import LastingStream
from megalm.launch.logs import Tee, log_path


class Terminal(io.StringIO):
    def isatty(self):
        return True


def test_lines_go_to_both_and_colours_to_the_terminal_alone():
    terminal, log = io.StringIO(), io.StringIO()
    tee = Tee(terminal, log)
    print("\x1b[31mred\x1b[0m and", "plain", file=tee)
    tee.write("not ")
    tee.write("finished")
    assert terminal.getvalue() == "\x1b[31mred\x1b[0m and plain\nnot finished"
    assert log.getvalue() == "red and plain\n"
    print(file=tee)
    assert log.getvalue() == "red and plain\nnot finished\n"


def test_a_full_disk_takes_the_log_and_nothing_else():
    class FullDisk(io.StringIO):
        def write(self, *_):
            raise OSError(errno.ENOSPC, "No space left on device")

        flush = write

    terminal = io.StringIO()
    print("said", file=Tee(terminal, FullDisk()), flush=True)
    assert terminal.getvalue() == "said\n"


def test_a_console_that_goes_is_told_of_in_the_log_which_has_the_rest():
    class Gone(io.StringIO):
        def write(self, *_):
            raise BrokenPipeError(errno.EPIPE, "Broken pipe")

    log = io.StringIO()
    tee = Tee(LastingStream(Gone()), log)
    assert tee.lost is None
    print("first", file=tee)
    print("second", file=tee, flush=True)
    assert log.getvalue().splitlines() == [
        "the console is gone (Broken pipe): what follows is in this log alone",
        "first",
        "second",
    ]
    assert tee.lost == "Broken pipe" and not tee.isatty()


def test_a_progress_bar_leaves_the_lines_above_it_and_its_last_state():
    terminal, log = Terminal(), io.StringIO()
    console = Console(file=Tee(terminal, log), force_terminal=True, width=60, highlight=False)
    with Progress(BarColumn(), MofNCompleteColumn(), console=console, auto_refresh=False) as progress:
        task = progress.add_task("step", total=3)
        for step in range(3):
            progress.update(task, completed=step + 1)
            progress.refresh()
            progress.console.print(f"step {step + 1}")
    lines = log.getvalue().splitlines()
    assert lines[:3] == ["step 1", "step 2", "step 3"]
    assert [line for line in lines[3:] if line.strip()][-1].endswith("3/3")
    assert "\x1b" not in log.getvalue() and "\r" not in log.getvalue()
    assert terminal.getvalue().count("\r") > 3


def test_a_launchers_terminal_is_not_drawn_on():
    assert Tee(Terminal(), io.StringIO()).isatty()
    assert not Tee(Terminal(), io.StringIO(), may_draw=False).isatty()
    assert not Tee(io.StringIO(), io.StringIO()).isatty()


WRITE = """
import os, sys
from pathlib import Path
from megalm.launch import RankInfo
from megalm.launch.console import LastingStream
from megalm.launch.logs import start_log
rank = int(sys.argv[2])
start_log(Path(sys.argv[1]), RankInfo(rank=rank, world_size=2, local_rank=rank, local_world_size=2, launcher="local",
                                      master_addr="", master_port=0))
print("from Python")
print("an error", file=sys.stderr)
sys.stdout.flush()
os.system("echo from a library")
"""


def write(run_dir, rank):
    command = [sys.executable, "-c", WRITE, str(run_dir), str(rank)]
    return subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=True).stdout


def test_ranks_above_0_write_to_their_log_alone_libraries_included(tmp_path):
    assert write(tmp_path, 1) == ""
    first, *rest = log_path(tmp_path, 1).read_text().splitlines()
    assert "rank 1 of 2 (local), cpu, pid" in first
    assert rest == ["from Python", "an error", "from a library"]


def test_rank_0_writes_to_terminal_and_log(tmp_path):
    assert sorted(write(tmp_path, 0).splitlines()) == ["an error", "from Python", "from a library"]
    assert log_path(tmp_path, 0).read_text().splitlines()[1:] == ["from Python", "an error"]


def test_a_resumed_run_adds_to_its_logs(tmp_path):
    write(tmp_path, 1)
    write(tmp_path, 1)
    assert log_path(tmp_path, 1).read_text().count("from Python") == 2
