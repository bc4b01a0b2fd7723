"""What every rank of any job runs, whoever started it: meet the others, get the assignment, do the job, leave together.

Also the module that megalm starts for each rank on this machine:
``python -m megalm.launch.worker RANK WORLD_SIZE PORT PARENT_PID [LISTENING_DESCRIPTOR]``, with the assignment on rank
0's standard input.
"""

# ruff: noqa: E402 - the folder that Python puts first must not be looked into for what follows
from __future__ import annotations

from megalm.launch.isolation import look_for_no_plugins, shield

shield()
look_for_no_plugins()

import ctypes
import os
import signal
import socket
import sys
import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import replace
from typing import NoReturn

from megalm.errors import ConfigError, ExitCode
from megalm.launch import cuda_environment
from megalm.launch.console import run_on_console
from megalm.launch.discovery import LOCAL, MPIRUN, RankInfo
from megalm.launch.interfaces import check_interfaces
from megalm.launch.job import Assignment, load_job
from megalm.launch.logs import Console
from megalm.launch.mpi import meet_over_mpi
from megalm.launch.rendezvous import Meeting, abort_communicators, init_process_group
from megalm.launch.reporter import Reporter
from megalm.launch.signals import StopRequest
from megalm.launch.store import LOOPBACK, free_port_listener, open_store, room
from megalm.launch.waiting import Patience, StoppedError, how_to_be_alone
from megalm.launch.watch import FailureWatch
from megalm.mesh.transport import GLOO, NCCL, transport_of

_PR_SET_PDEATHSIG = 1

_DISMISSAL_SECONDS = 60.0
"""How long rank 0 stays to tell ranks that are still importing torch that there is nothing to do."""


def main(arguments: list[str]) -> NoReturn:
    """One rank that megalm has started on this machine."""
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
    run_rank(info, stop, _assignment_of_launcher, listener)


def run_launched(rank: RankInfo, job: str, arguments: list[str]) -> NoReturn:
    """One rank that an external launcher has started; rank 0 alone prepares the job.

    Args:
        rank: this rank.
        job: ``module:name``; see ``job.py``.
        arguments: of the command line.
    """
    stop = StopRequest.install()

    def prepare(held: ExitStack) -> Assignment:
        def say(line: str) -> None:
            print(line, file=sys.stderr, flush=True)

        prepared = load_job(job).prepare(
            arguments, rank.world_size, say=say, cancelled=lambda: stop.pending() is not None
        )
        try:
            return held.enter_context(prepared).assignment
        except ConfigError as error:
            if not any(line.startswith("world_size=") for line in error.lines):
                raise
            raise ConfigError([*error.lines, f"world_size={rank.world_size}: {how_to_be_alone(os.environ)}"]) from None

    run_rank(rank, stop, prepare)


def _assignment_of_launcher(held: ExitStack) -> Assignment:
    """The launcher owns the folder; it may be stopped alone, by Ctrl-Z, so rank 0 renews the heartbeat too."""
    assignment = Assignment.from_json(sys.stdin.read())
    if assignment.claim is not None:
        held.enter_context(assignment.claim.kept_alive())
    return assignment


CarryOut = Callable[[Meeting, Assignment, StopRequest, Console], int]
"""Does a job on one rank that has met the others, and gives its exit code."""


def run_rank(
    rank: RankInfo,
    stop: StopRequest,
    prepare: Callable[[ExitStack], Assignment],
    listener: socket.socket | None = None,
    carry_out: CarryOut | None = None,
) -> NoReturn:
    """Run one rank to its end, and leave the process with the job's exit code.

    Args:
        rank: this rank.
        stop: whether it has been asked to stop.
        prepare: makes the assignment, and may leave what is to be closed when the job has ended; called on rank 0
            alone, before torch is imported.
        listener: a socket for rank 0's store that listens already.
        carry_out: None: choose a device, begin the log, make the process group, and run the assignment's job.
    """
    # Ranks above 0 will write to their log alone; what ends a run must be seen on the terminal too.
    console = Console()
    reporter = Reporter(console)
    held = ExitStack()
    watch: FailureWatch | None = None
    try:
        assignment: Assignment | None = None
        failure: Exception | None = None
        if rank.rank == 0:
            try:
                assignment = prepare(held)
            except Exception as error:  # the other ranks wait to hear of it
                failure = error
        meeting = _meet(rank, listener, stop, console)
        reporter.meeting = meeting
        if failure is not None:  # nobody has to come for that to be said
            code = _dismiss(meeting, reporter, failure)
        else:
            meeting.gather()
            assignment = _shared(meeting, assignment)
            if assignment is None or assignment.nothing_to_do:
                code = _without_work(meeting, assignment)
            else:
                watch = _watch(meeting, reporter, stop)
                code = (carry_out or _carry_out)(meeting, assignment, stop, console)
                meeting.leave_together(float(assignment.timeout_seconds), when_ended=watch.stop)
    except StoppedError as error:  # while others were waited for: they are not there to be told, or were stopped too
        if rank.rank == 0:
            console.write(f"{error}\n")
        code = int(error.exit_code)
    except Exception as error:
        if watch is not None:
            watch.stop()
        code = reporter.report(error)
        if watch is not None and reporter.failed_first and _is_on_nccl():
            # A closed connection may end the others with a code of torch's: they are to read of this rank's first.
            time.sleep(watch.seconds_to_learn)
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
    connections = room(rank, listener) if rank.rank == 0 else 0
    meeting = Meeting(open_store(rank, listener, patience), rank, patience)
    if connections:
        meeting.allow(connections)
    return meeting


def _dismiss(meeting: Meeting, reporter: Reporter, failure: Exception) -> int:
    """Rank 0 has no assignment: say why, and tell the others before the store goes with this process."""
    code = reporter.report(failure)
    meeting.dismiss()
    meeting.leave_together(_DISMISSAL_SECONDS)
    return code


def _shared(meeting: Meeting, assignment: Assignment | None) -> Assignment | None:
    """Rank 0's assignment, on every rank; None: rank 0 has none, and has said why."""
    if assignment is not None:
        meeting.publish(assignment.to_json())
        return assignment
    text = meeting.receive()
    return Assignment.from_json(text) if text else None


def _without_work(meeting: Meeting, assignment: Assignment | None) -> int:
    """Leave, as there is nothing to do or rank 0 could not say what; the exit code."""
    code = int(ExitCode.DONE)
    if assignment is None:
        first = meeting.claim_failure(ExitCode.BUG)
        code = first[1] if first else ExitCode.BUG
    elif meeting.rank.rank == 0:
        print(*assignment.nothing_to_do, sep="\n")
    meeting.leave_together(_DISMISSAL_SECONDS)
    return code


def _watch(meeting: Meeting, reporter: Reporter, stop: StopRequest) -> FailureWatch:
    """From now on this rank ends if another one fails, whatever it does."""

    def abort() -> bool:
        if not _is_on_nccl():
            return False
        abort_communicators()
        return True

    watch = FailureWatch(
        meeting.rank, meeting.failures(), abort=abort, last_wish=stop.fulfil_last_wishes, log=reporter.log
    )
    watch.start()
    return watch


def _is_on_nccl() -> bool:
    """Whether this rank has communicators of NCCL."""
    import torch.distributed as dist

    return dist.is_initialized() and dist.get_backend() == NCCL


def _carry_out(meeting: Meeting, assignment: Assignment, stop: StopRequest, console: Console) -> ExitCode:
    """Everything that needs torch."""
    if assignment.overlaps and assignment.device != "cpu" and meeting.rank.world_size > 1:
        cuda_environment.set_defaults(os.environ)
    from megalm.launch.device import choose_device, slow_format
    from megalm.launch.logs import start_log

    rank = meeting.rank
    device = choose_device(assignment.device, meeting)
    rank = replace(rank, device=device)
    start_log(assignment.folder, rank, console)
    if rank.rank == 0:
        for note in (*assignment.notes, slow_format(device, assignment.dtype)):
            if note is not None:
                print(note, flush=True)
    _tell_libraries(rank)
    if transport_of(device) == GLOO:
        check_interfaces(os.environ)
    init_process_group(meeting.store, rank, assignment.timeout_seconds)
    return load_job(assignment.job).run(assignment.plan, rank, stop)


def _tell_libraries(rank: RankInfo) -> None:
    """DeepSpeed and others look for torchrun's variables, and take ``LOCAL_RANK`` for the number of their GPU."""
    _, _, gpu = rank.device.partition(":")
    os.environ.update(
        RANK=str(rank.rank),
        WORLD_SIZE=str(rank.world_size),
        LOCAL_RANK=gpu or str(rank.local_rank),
        LOCAL_WORLD_SIZE=str(rank.local_world_size),
        MASTER_ADDR=rank.master_addr,
        MASTER_PORT=str(rank.master_port),
    )


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
