"""What every rank runs, whoever started it: meet the others, learn the plan, train, leave together.

Also the module that ``megalm train`` starts for each local rank:
``python -m megalm.launch.worker RANK WORLD_SIZE PORT PARENT_PID [LISTENING_DESCRIPTOR]``, the plan on rank 0's
standard input.
"""

# ruff: noqa: E402 - the folder that Python puts first must not be looked into for what follows
from __future__ import annotations

from megalm.launch.isolation import shield

shield()

import ctypes
import os
import signal
import socket
import sys
import time
import traceback
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import replace
from typing import NoReturn

from megalm.errors import ConfigError, ExitCode, MegalmError
from megalm.launch.console import run_on_console
from megalm.launch.discovery import LOCAL, MPIRUN, RankInfo
from megalm.launch.guard import explained
from megalm.launch.interfaces import check_interfaces
from megalm.launch.logs import Console, Tee
from megalm.launch.mpi import meet_over_mpi
from megalm.launch.rendezvous import Meeting, init_process_group
from megalm.launch.signals import StopRequest
from megalm.launch.store import LOOPBACK, free_port_listener, open_store
from megalm.launch.waiting import Patience, StoppedError, how_to_be_alone
from megalm.plan.preflight import Plan, completion_lines, owned_plan

_PR_SET_PDEATHSIG = 1

_NOTICE_SECONDS = 2.0
"""How long a rank that failed because another one did waits to be ended, so that the launcher sees that one first."""

_CALL_OFF_SECONDS = 60.0
"""How long rank 0 stays to tell ranks that are still importing torch that there is nothing to do."""

_MOST_HELD_BACK = 4000
"""Characters of what libraries have written that are shown where there is no log to look into."""

_LOST_PEER = ("Connection closed by peer", "Connection reset by peer", "Broken pipe", "Socket closed", "remote process")


def main(arguments: list[str]) -> NoReturn:
    """One rank that ``megalm train`` has started on this machine."""
    stop = StopRequest.install()
    rank, world_size, port, parent = map(int, arguments[:4])
    _die_with(parent)
    info = RankInfo(
        rank=rank,
        world_size=world_size,
        local_rank=rank,
        local_world_size=world_size,
        launcher=LOCAL,
        master_addr=LOOPBACK,
        master_port=port,
    )
    listener = socket.socket(fileno=int(arguments[4])) if rank == 0 else None
    run_rank(info, stop, _plan_of_launcher, listener)


def run_launched(rank: RankInfo, overrides: list[str]) -> NoReturn:
    """One rank that an external launcher has started; rank 0 alone composes and checks the config."""
    stop = StopRequest.install()

    def prepare(held: ExitStack) -> Plan:
        def say(line: str) -> None:
            print(line, file=sys.stderr, flush=True)

        owned = owned_plan(overrides, rank.world_size, say=say, cancelled=lambda: stop.pending() is not None)
        try:
            return held.enter_context(owned)[0]
        except ConfigError as error:
            if not any(line.startswith("world_size=") for line in error.lines):
                raise
            raise ConfigError([*error.lines, f"world_size={rank.world_size}: {how_to_be_alone(os.environ)}"]) from None

    run_rank(rank, stop, prepare)


def _plan_of_launcher(held: ExitStack) -> Plan:
    """The launcher owns the run's folder; it may be stopped alone, by Ctrl-Z, so rank 0 upholds that, too."""
    plan = Plan.from_json(sys.stdin.read())
    if plan.claim is not None:
        held.enter_context(plan.claim.kept_alive())
    return plan


def run_rank(
    rank: RankInfo, stop: StopRequest, prepare: Callable[[ExitStack], Plan], listener: socket.socket | None = None
) -> NoReturn:
    """Run one rank to its end, and leave the process with the run's exit code.

    Args:
        rank: this rank.
        stop: whether it has been asked to stop.
        prepare: makes the plan, and may leave what is to be closed when the run has ended; called on rank 0 alone,
            before torch is imported.
        listener: a socket for rank 0's store that listens already.
    """
    # Ranks above 0 will write to their log alone; what ends a run must be seen on the terminal too.
    console = Console()
    reporter = _Reporter(console)
    held = ExitStack()
    try:
        plan: Plan | None = None
        failure: Exception | None = None
        if rank.rank == 0:
            try:
                plan = prepare(held)
            except Exception as error:  # the other ranks wait to hear of it
                failure = error
        meeting = _meet(rank, listener, stop, console)
        reporter.meeting = meeting
        if failure is not None:  # nobody has to come for that to be said
            code = _call_off(meeting, reporter, failure)
        else:
            meeting.gather()
            code = _follow(meeting, plan, stop, console)
    except StoppedError as error:  # while others were waited for: they are not there to be told, or were stopped too
        if rank.rank == 0:
            console.write(f"{error}\n")
        code = int(error.exit_code)
    except Exception as error:
        code = reporter.report(error)
    held.close()
    _leave(code)


def _meet(rank: RankInfo, listener: socket.socket | None, stop: StopRequest, console: Console) -> Meeting:
    """Every rank's way to the others; a rank without others needs nobody and no address."""

    def say(line: str) -> None:
        console.write(f"{line}\n")

    if rank.world_size == 1 and listener is None:
        listener = free_port_listener()
        rank = replace(rank, master_addr=LOOPBACK, master_port=listener.getsockname()[1])
    elif rank.launcher == MPIRUN:
        rank, listener = meet_over_mpi(rank, Patience(rank, stop, say), os.environ)
    console.hold_back_libraries(rank)
    # Ranks that megalm starts itself wait for seconds at most: a signal stops them after their first step, in order.
    patience = Patience(rank) if rank.launcher == LOCAL else Patience(rank, stop, say)
    return Meeting(open_store(rank, listener, patience), rank, patience)


def _call_off(meeting: Meeting, reporter: _Reporter, failure: Exception) -> int:
    """Rank 0 has no plan: say why, and tell the others before the store goes with this process."""
    code = reporter.report(failure)
    meeting.dismiss()
    meeting.leave_together(_CALL_OFF_SECONDS)
    return code


def _follow(meeting: Meeting, plan: Plan | None, stop: StopRequest, console: Console) -> int:
    """Share the plan and carry it out; the exit code."""
    rank = meeting.rank
    if plan is not None:
        meeting.publish(plan.to_json())
    else:
        text = meeting.receive()
        if not text:  # rank 0 has said why
            first = meeting.claim_failure(ExitCode.BUG)
            meeting.leave_together(_CALL_OFF_SECONDS)
            return first[1] if first else ExitCode.BUG
        plan = Plan.from_json(text)
    if plan.complete:
        if rank.rank == 0:
            print(*completion_lines(plan), sep="\n")
        meeting.leave_together(60.0)
        return ExitCode.DONE
    code = _train(meeting, plan, stop, console)
    meeting.leave_together(float(plan.config.launch.timeout_seconds))
    return code


def _train(meeting: Meeting, plan: Plan, stop: StopRequest, console: Console) -> ExitCode:
    """Everything that needs torch."""
    from megalm.launch.device import choose_device, slow_format
    from megalm.launch.logs import start_log

    config, rank = plan.config, meeting.rank
    device, line = choose_device(config.launch.device, meeting)
    rank = replace(rank, device=device)
    start_log(plan.run_dir, rank, console)
    if rank.rank == 0:
        for note in (*plan.notes, line, slow_format(device, config.engine.dtype)):
            if note is not None:
                print(note, flush=True)
    _tell_libraries(rank)
    check_interfaces(os.environ)
    init_process_group(meeting.store, rank, config.launch.timeout_seconds)

    from megalm.train.setup import run_training

    return run_training(config, rank, stop, plan.start, plan.claim)


def _tell_libraries(rank: RankInfo) -> None:
    """DeepSpeed and others look for torchrun's variables."""
    os.environ.update(
        RANK=str(rank.rank),
        WORLD_SIZE=str(rank.world_size),
        LOCAL_RANK=str(rank.local_rank),
        LOCAL_WORLD_SIZE=str(rank.local_world_size),
        MASTER_ADDR=rank.master_addr,
        MASTER_PORT=str(rank.master_port),
    )


class _Reporter:
    """Shows an error once, however many ranks it brought down."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self.meeting: Meeting | None = None

    def report(self, error: Exception) -> int:
        """Log an error, show it if this rank failed first, and return the exit code of the run."""
        known = explained(error)
        code = int(ExitCode.BUG if known is None else known.exit_code)
        is_users = known is not None
        trace = "".join(traceback.format_exception(error))
        text = trace if known is None else f"{known}\n"
        if is_users and not isinstance(error, MegalmError):
            self._log(trace)
        if not is_users and not isinstance(sys.stderr, Tee):  # there is no log yet to look into
            text = self._console.held_back()[-_MOST_HELD_BACK:] + text
        if self.meeting is None:
            self._show(text)
            return code
        rank = self.meeting.rank.rank
        is_consequence = not is_users and any(sign in str(error) for sign in _LOST_PEER)
        first = None if is_consequence else self.meeting.claim_failure(code)
        if first is not None and first[0] == rank:
            self._show(text if is_users else f"rank {rank} failed:\n{text}")
            return code
        self._log(text)
        time.sleep(_NOTICE_SECONDS)
        return first[1] if first is not None else code

    def _show(self, text: str) -> None:
        """On the terminal, and in the log where there is one."""
        sys.stdout.flush()
        sys.stderr.flush()
        self._console.write(text)
        self._log(text)

    def _log(self, text: str) -> None:
        """In the log alone, once there is one."""
        if isinstance(sys.stderr, Tee):
            sys.stderr.write_log(text)
        elif not self._console.is_same(sys.stderr):
            sys.stderr.write(text)
        sys.stderr.flush()


def _leave(code: int) -> NoReturn:
    """End at once: an interpreter that winds down could wait for threads of a collective that will never come."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def _die_with(parent: int) -> None:
    """Have the kernel end this process when its launcher ends, even by SIGKILL (Linux)."""
    if sys.platform != "linux":
        return
    ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:  # it was faster
        os._exit(ExitCode.BUG)


if __name__ == "__main__":
    run_on_console(lambda: main(sys.argv[1:]), works=True)
