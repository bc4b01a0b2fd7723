"""A web server of one folder that knows ranges, and faults."""

from __future__ import annotations

import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

from megalm.data.shards.store.http import HttpStore


@dataclass
class Server:
    """A web server of one folder, with faults to come: one for each of the next requests."""

    folder: Path
    port: int = 0
    faults: list[str] = field(default_factory=list)
    requests: list[tuple[str, str, str | None]] = field(default_factory=list)
    authorisation: list[str | None] = field(default_factory=list)

    @property
    def address(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    @property
    def store(self) -> HttpStore:
        return HttpStore(self.address, pause_seconds=0.01)


@contextmanager
def serve(folder: Path) -> Iterator[Server]:
    """Answers requests for the files of a folder, ranges included, on a free port of this machine."""
    state = Server(folder)

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, *_) -> None:
            pass

        def do_HEAD(self) -> None:
            self.do_GET()

        def do_GET(self) -> None:
            span = self.headers.get("Range")
            state.requests.append((self.command, self.path, span))
            state.authorisation.append(self.headers.get("Authorization"))
            fault = state.faults.pop(0) if state.faults else ""
            path = folder / self.path.lstrip("/")
            if fault.isdigit() or not path.is_file():
                self.send_response(int(fault or 404))
                self.send_header("Retry-After", "0")
                self.send_header("Content-Length", "0")
                self.end_headers()
                return
            data, status = path.read_bytes(), 200
            whole = len(data)
            if span and fault != "no ranges":
                first, last = map(int, re.fullmatch(r"bytes=(\d+)-(\d+)", span).groups())
                if last >= whole:
                    self.send_response(416)
                    self.send_header("Content-Length", "0")
                    self.end_headers()
                    return
                data, status = data[first : last + 1], 206
            self.send_response(status)
            if status == 206:
                self.send_header("Content-Range", f"bytes {first}-{last}/{whole}")
            cut = data[: len(data) // 2] if fault in ("cut", "short") else data
            self.send_header("Content-Length", str(len(cut if fault == "short" else data)))
            self.end_headers()
            if self.command == "GET":
                self.wfile.write(cut)
            if fault == "cut":
                self.close_connection = True

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as http:
        state.port = http.server_address[1]
        thread = threading.Thread(target=http.serve_forever, args=(0.01,), daemon=True)
        thread.start()
        yield state
        http.shutdown()
        thread.join()
