"""What reaches a rank's log, and what a progress bar sees."""

import io

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress

from megalm.launch.logs import Tee


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
