"""Shows the error that ended a job once, however many ranks it ended. No torch."""

from __future__ import annotations

import sys
import time
import traceback

from megalm.errors import ExitCode, MegalmError
from megalm.launch.guard import explained
from megalm.launch.logs import Console, Tee
from megalm.launch.rendezvous import Meeting

_NOTICE_SECONDS = 2.0
"""How long a rank that failed because another one did waits to be ended, so that the launcher sees that one first."""

_MAX_LIBRARY_CHARACTERS = 4000
"""Characters of libraries' own output that are shown if there is no log to read."""

_LOST_PEER = (
    "Connection closed by peer",
    "Connection reset by peer",
    "Broken pipe",
    "Socket closed",
    "remote process",
    "ncclRemoteError",
    "NCCL communicator was aborted",
)


class Reporter:
    """Shows an error if this rank failed first, and logs it otherwise.

    Args:
        console: where the user reads.
    """

    def __init__(self, console: Console) -> None:
        self._console = console
        self.meeting: Meeting | None = None
        self.failed_first = False
        """Whether this rank's error is the one that ended the job."""

    def report(self, error: Exception) -> int:
        """Log an error, show it if this rank failed first, and return the exit code of the job."""
        known = explained(error)
        code = int(ExitCode.BUG if known is None else known.exit_code)
        is_users = known is not None
        trace = "".join(traceback.format_exception(error))
        text = trace if known is None else f"{known}\n"
        if is_users and not isinstance(error, MegalmError):
            self.log(trace)
        if not is_users and not isinstance(sys.stderr, Tee):  # there is no log yet
            text = self._console.held_back()[-_MAX_LIBRARY_CHARACTERS:] + text
        if self.meeting is None:
            self._show(text)
            return code
        rank = self.meeting.rank.rank
        is_consequence = not is_users and any(sign in str(error) for sign in _LOST_PEER)
        if is_consequence:
            # Who has lost a peer that could not say why tells those that have no connection to it.
            first = self.meeting.first_failure(_NOTICE_SECONDS) or self.meeting.claim_failure(ExitCode.PEER_FAILED)
        else:
            first = self.meeting.claim_failure(code)
        if first is not None and first[0] == rank and not is_consequence:
            self.failed_first = True
            self._show(text if is_users else f"rank {rank} failed:\n{text}")
            return code
        self.log(text)
        time.sleep(_NOTICE_SECONDS)
        return first[1] if first is not None else ExitCode.PEER_FAILED

    def _show(self, text: str) -> None:
        """On the terminal, and in the log if there is one."""
        sys.stdout.flush()
        sys.stderr.flush()
        self._console.write(text)
        self.log(text)

    def log(self, text: str) -> None:
        """In the log alone, once there is one."""
        if isinstance(sys.stderr, Tee):
            sys.stderr.write_log(text)
        elif not self._console.is_same(sys.stderr):
            sys.stderr.write(text)
        sys.stderr.flush()
