"""A process that has torch, DeepSpeed and the trainer imported, and forks commands and ranks for tests.

Importing torch and DeepSpeed takes longer than most tests of ranks, and each rank does it anew. Here one process per
session does it, before it has a second thread, and a fork of it is a rank or a command in milliseconds. What such a
fork runs is what users run (``megalm.cli.main.main``, ``megalm.launch.worker.main``); only how a process comes to be is
another. Tests of exactly that (``test_launchers.py``, ``test_jobs.py``, ``tests/unit/launch``) start processes as users
do. megalm itself never forks a rank.

Every fork begins from the same state and leaves nothing behind, so a case cannot disturb the next one. ``MALLOC_*`` is
read when a process is executed and ``OMP_NUM_THREADS`` when torch is imported: the server has what
``megalm.launch.local`` gives its ranks.
"""

from __future__ import annotations

import atexit
import contextlib
import gc
import io
import os
import pickle
import selectors
import signal
import socket
import subprocess
import sys
import tempfile
import time
import traceback
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

_MESSAGE_BYTES = 4096
_PRELOADED = (
    "torch.distributed",
    "torch._dynamo",  # by AdamW, when it is made
    "deepspeed",
    "deepspeed.runtime.zero.muon.muon_optimizer",  # by DeepSpeed's engine, when it is made
    "mpi4py",
    "megalm.cli.train",
    "megalm.cli.verify",
    "megalm.cli.evaluate",
    "megalm.cli.generate",
    "megalm.cli.data",
    "megalm.config.compose",
    "megalm.convert.convert",
    "megalm.evaluate.perplexity",
    "megalm.generate.run",
    "megalm.launch.device",
    "megalm.launch.run",
    "megalm.launch.worker",
    "megalm.plan.preflight",
    "megalm.runs.loss_curve",
    "megalm.training.setup",
    "megalm.verify.run",
)


@dataclass(frozen=True)
class Request:
    """What a fork is to be.

    Attributes:
        function: called with ``arguments``; its result is the exit code.
        arguments: picklable.
        environment: all of it.
        folder: where it works.
        path: ``sys.path``.
        new_session: whether it leads a session of its own.
    """

    function: Callable[..., int | None]
    arguments: tuple[Any, ...]
    environment: dict[str, str]
    folder: str
    path: list[str]
    new_session: bool


class _Process(ABC):
    """What of ``subprocess.Popen`` and ``multiprocessing.Process`` follows from ``pid``, ``poll`` and ``wait``."""

    pid: int

    @abstractmethod
    def poll(self) -> int | None:
        """The exit code, or None while it runs; minus the signal that killed it."""

    @abstractmethod
    def wait(self, timeout: float | None = None) -> int:
        """Until it has ended."""

    def send_signal(self, number: int) -> None:
        """Nothing happens to one that has ended."""
        if self.poll() is None:
            with contextlib.suppress(ProcessLookupError):
                os.kill(self.pid, number)

    def kill(self) -> None:
        """End it at once."""
        self.send_signal(signal.SIGKILL)

    def terminate(self) -> None:
        """Ask it to end."""
        self.send_signal(signal.SIGTERM)

    def is_alive(self) -> bool:
        """Whether it runs."""
        return self.poll() is None

    @property
    def exitcode(self) -> int | None:
        """As :meth:`poll`."""
        return self.poll()

    def join(self) -> None:
        """As :meth:`wait`."""
        self.wait()


class ForkedProcess(_Process):
    """A process that the server has forked, with the part of ``subprocess.Popen`` and ``Process`` that tests use."""

    def __init__(self, server: ForkServer, pid: int, stdout: Any, stderr: Any) -> None:
        self._server = server
        self.pid = pid
        self.stdout, self.stderr = stdout, stderr
        self.returncode: int | None = None

    def poll(self) -> int | None:
        """The exit code, or None while it runs; minus the signal that killed it."""
        if self.returncode is None:
            self.returncode = self._server.exit_code_of(self.pid)
        return self.returncode

    def wait(self, timeout: float | None = None) -> int:
        """Until it has ended."""
        deadline = None if timeout is None else time.monotonic() + timeout
        while self.poll() is None:
            if deadline is not None and time.monotonic() > deadline:
                raise subprocess.TimeoutExpired("a forked process", timeout or 0.0)
            self._server.wait_for_news(0.05)
        assert self.returncode is not None
        return self.returncode

    def communicate(self, timeout: float | None = None) -> tuple[Any, Any]:
        """All that it prints, and its end."""
        streams = [stream for stream in (self.stdout, self.stderr) if stream is not None]
        found: dict[Any, list[bytes]] = {stream: [] for stream in streams}
        deadline = None if timeout is None else time.monotonic() + timeout
        with selectors.DefaultSelector() as selector:
            for stream in streams:
                selector.register(stream, selectors.EVENT_READ)
            while selector.get_map():
                left = None if deadline is None else deadline - time.monotonic()
                if left is not None and left < 0:
                    raise subprocess.TimeoutExpired("a forked process", timeout or 0.0)
                for key, _ in selector.select(left):
                    data = os.read(key.fd, 1 << 16)
                    found[key.fileobj].append(data)
                    if not data:
                        selector.unregister(key.fileobj)
        self.wait(None if deadline is None else max(deadline - time.monotonic(), 1.0))
        texts = [
            None if stream is None else b"".join(found[stream]).decode("utf-8", errors="replace")
            for stream in (self.stdout, self.stderr)
        ]
        return texts[0], texts[1]

    def __enter__(self) -> ForkedProcess:
        return self

    def __exit__(self, *_: object) -> None:
        for stream in (self.stdout, self.stderr):
            if stream is not None:
                stream.close()
        self.wait()


class ForkServer:
    """The test session's end of the server."""

    def __init__(self) -> None:
        from megalm.launch.local import KEEPS_MEMORY

        self._connection, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        environment = {**KEEPS_MEMORY, **os.environ, "OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu"}
        environment["PYTHONPATH"] = os.pathsep.join(entry for entry in sys.path if entry)
        self._process = subprocess.Popen(
            [sys.executable, __file__, str(theirs.fileno())],
            env=environment,
            pass_fds=(theirs.fileno(),),
            stdin=subprocess.DEVNULL,
            start_new_session=True,
        )
        theirs.close()
        self._codes: dict[int, int] = {}
        assert self._message() == {"ready": True}, "the fork server did not start"

    def fork(
        self,
        function: Callable[..., int | None],
        *arguments: Any,
        environment: Mapping[str, str] | None = None,
        stdout: Any = None,
        stderr: Any = None,
        new_session: bool = True,
    ) -> ForkedProcess:
        """Fork a process that calls ``function(*arguments)``; streams as of ``subprocess.Popen``."""
        request = Request(
            function,
            arguments,
            dict(os.environ if environment is None else environment),
            str(Path.cwd()),
            list(sys.path),
            new_session,
        )
        pipes: list[Any] = []
        descriptors: list[int] = []
        opened: list[int] = []
        for stream, own in ((stdout, 1), (stderr, 2)):
            if stream == subprocess.PIPE:
                read, write = os.pipe()
                pipes.append(os.fdopen(read, "rb", buffering=0))
                descriptors.append(write)
                opened.append(write)
            else:
                pipes.append(None)
                same = stream == subprocess.STDOUT
                descriptors.append(descriptors[0] if same else own if stream is None else stream.fileno())
        with tempfile.NamedTemporaryFile(prefix="megalm-fork-") as file:
            file.write(pickle.dumps(request))
            file.flush()
            socket.send_fds(self._connection, [file.name.encode()], descriptors)
            for descriptor in opened:
                os.close(descriptor)
            while "pid" not in (message := self._message()):
                self._take(message)
        self._codes.pop(message["pid"], None)  # of an earlier process: the kernel gives numbers again
        return ForkedProcess(self, message["pid"], *pipes)

    def exit_code_of(self, pid: int) -> int | None:
        """Of a process that was forked; None while it runs."""
        self.wait_for_news(0.0)
        return self._codes.get(pid)

    def wait_for_news(self, seconds: float) -> None:
        """Until a process has ended, or time is up."""
        self._connection.settimeout(seconds or 1e-6)
        with contextlib.suppress(TimeoutError, BlockingIOError):
            while True:
                self._take(self._message(blocking=False))
                self._connection.settimeout(1e-6)

    def close(self) -> None:
        """End the server, and with it what it has forked."""
        self._connection.close()
        self._process.wait()

    def _take(self, message: dict[str, Any]) -> None:
        self._codes[message["ended"]] = message["code"]

    def _message(self, *, blocking: bool = True) -> dict[str, Any]:
        if blocking:
            self._connection.settimeout(120)
        data = self._connection.recv(_MESSAGE_BYTES)
        if not data:
            raise RuntimeError("the fork server has ended")
        found: dict[str, Any] = pickle.loads(data)
        return found


@cache
def server() -> ForkServer:
    """The session's; it ends with this process."""
    started = ForkServer()
    atexit.register(started.close)
    return started


def run_megalm(arguments: Sequence[str]) -> int:
    """What ``python -m megalm`` runs; ranks that it starts are forks of this process."""
    import megalm.launch.function_ranks
    import megalm.launch.local
    from megalm.cli.main import main

    megalm.launch.local.exec_rank = _ForkedRank
    megalm.launch.function_ranks.spawn_rank = _forked_function
    return main(list(arguments))


@dataclass
class _Child(_Process):
    """A fork of this process: the part of ``subprocess.Popen`` and ``Process`` that ``megalm.launch`` uses."""

    pid: int
    stdin: Any = None
    returncode: int | None = field(default=None)

    def poll(self) -> int | None:
        if self.returncode is None:
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            if pid:
                self.returncode = os.waitstatus_to_exitcode(status)
        return self.returncode

    def wait(self, timeout: float | None = None) -> int:
        if self.returncode is None:
            self.returncode = os.waitstatus_to_exitcode(os.waitpid(self.pid, 0)[1])
        return self.returncode


_rank_zero_alone: list[int] = []
"""Descriptors that a command holds for its rank 0: the writing end of its standard input, and its store's listener."""


def _ForkedRank(  # noqa: N802 - stands for a class
    module: str,
    arguments: Sequence[str],
    environment: dict[str, str],
    *,
    reads_plan: bool,
    descriptors: tuple[int, ...],
    output: int | None = None,
) -> _Child:
    """Like :func:`megalm.launch.local.exec_rank`."""
    read, write = os.pipe() if reads_plan else (os.open(os.devnull, os.O_RDONLY), -1)
    pid = os.fork()
    if pid:
        os.close(read)
        if not reads_plan:
            return _Child(pid)
        _rank_zero_alone.extend([write, *descriptors[-1:]])
        return _Child(pid, os.fdopen(write, "w", encoding="utf-8"))
    try:
        os.setsid()
        os.dup2(read, 0)
        if output is not None:
            os.dup2(output, 1)
        for descriptor in {write, *_rank_zero_alone} - {-1, 0, 1, 2, *descriptors}:
            with contextlib.suppress(OSError):
                os.close(descriptor)
        _begin(environment)
        code = _worker(module, list(arguments))
    except BaseException:
        traceback.print_exc()
        code = 1
    _leave(code)
    raise AssertionError("unreachable")


def _worker(module: str, arguments: list[str]) -> int:
    from megalm.launch import worker
    from megalm.launch.console import run_on_console

    assert module == worker.__name__, f"{module}: only megalm's own ranks are forked"
    return run_on_console(lambda: worker.main(arguments), works=True)


def _forked_function(target: Callable[..., None], arguments: tuple[Any, ...]) -> _Child:
    """Like :func:`megalm.launch.function_ranks.spawn_rank`."""
    pid = os.fork()
    if pid:
        return _Child(pid)
    try:
        _begin(dict(os.environ))
        target(*arguments)
    except BaseException:
        traceback.print_exc()
    _leave(1)
    raise AssertionError("unreachable")


def _begin(environment: Mapping[str, str]) -> None:
    """A process's own state, as after an exec."""
    import torch

    os.environ.clear()
    os.environ.update(environment)
    sys.stdin = open(0, encoding="utf-8", closefd=False)  # noqa: SIM115 - as long as the process lives
    for number, name in ((1, "stdout"), (2, "stderr")):
        binary = io.FileIO(number, "w", closefd=False)
        stream = io.TextIOWrapper(
            io.BufferedWriter(binary), encoding="utf-8", errors="backslashreplace", line_buffering=number == 2
        )
        setattr(sys, name, stream)
        setattr(sys, f"__{name}__", stream)
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))


def _leave(code: int | None) -> None:
    with contextlib.suppress(Exception):
        atexit._run_exitfuncs()
        sys.stdout.flush()
        sys.stderr.flush()
    os._exit(code or 0)


def _serve(connection: socket.socket) -> None:
    """Fork on request, and tell which of the forks have ended, until the session's end of the connection closes."""
    woken, waker = socket.socketpair()
    woken.setblocking(False)
    waker.setblocking(False)
    signal.set_wakeup_fd(waker.fileno())
    signal.signal(signal.SIGCHLD, lambda *_: None)
    alive: set[int] = set()
    connection.send(pickle.dumps({"ready": True}))
    with selectors.DefaultSelector() as selector:
        selector.register(connection, selectors.EVENT_READ)
        selector.register(woken, selectors.EVENT_READ)
        while True:
            ready = {key.fileobj for key, _ in selector.select()}
            if woken in ready:
                with contextlib.suppress(BlockingIOError):
                    woken.recv(_MESSAGE_BYTES)
                for pid, code in _ended(alive):
                    connection.send(pickle.dumps({"ended": pid, "code": code}))
            if connection in ready:
                name, descriptors, _, _ = socket.recv_fds(connection, _MESSAGE_BYTES, 2)
                if not name:
                    break
                request: Request = pickle.loads(Path(os.fsdecode(name)).read_bytes())
                pid = os.fork()
                if not pid:
                    for other in (connection, woken, waker):
                        other.detach()
                    _become(request, descriptors)
                alive.add(pid)
                for descriptor in set(descriptors):
                    os.close(descriptor)
                connection.send(pickle.dumps({"pid": pid}))
    for pid in alive:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(pid, signal.SIGKILL)


def _ended(alive: set[int]) -> list[tuple[int, int]]:
    found = []
    for pid in list(alive):
        done, status = os.waitpid(pid, os.WNOHANG)
        if done:
            alive.discard(pid)
            found.append((pid, os.waitstatus_to_exitcode(status)))
    return found


def _become(request: Request, descriptors: Sequence[int]) -> None:
    """In the fork: do what was asked for, and end."""
    code: int | None = 1
    try:
        signal.set_wakeup_fd(-1)
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        if request.new_session:
            os.setsid()
        os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
        for number, descriptor in zip((1, 2), descriptors, strict=True):
            os.dup2(descriptor, number)
        os.closerange(3, 1 << 16)
        os.chdir(request.folder)
        sys.path[:] = request.path
        _begin(request.environment)
        code = request.function(*request.arguments)
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else 1
    except BaseException:
        traceback.print_exc()
    _leave(code)


def _preload() -> None:
    from importlib import import_module

    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        for name in _PRELOADED:
            import_module(name)
    import torch

    torch.set_num_threads(1)
    threads = len([*Path("/proc/self/task").iterdir()])
    assert threads == 1, (
        f"{threads} threads after the imports: a fork would lose all but one, and their locks with them"
    )
    gc.collect()
    gc.freeze()  # a collection in a fork touches, and so copies, nothing of this


if __name__ == "__main__":
    # Requests name this module as tests do.
    sys.modules["fork_server"] = sys.modules["__main__"]
    _preload()
    _serve(socket.socket(fileno=int(sys.argv[1])))
