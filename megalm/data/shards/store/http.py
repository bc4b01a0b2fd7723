"""A web server's folder, read by ranges: no shard is fetched whole, nothing is kept."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any
from urllib.parse import quote, urlsplit, urlunsplit

import numpy as np
import urllib3
from numpy.typing import NDArray

from megalm.data.shards.store.base import MissingFile, RefusedFile, check_size
from megalm.errors import DataError

_TRIES = 5
_TIMEOUT_SECONDS = 30.0
_STATUSES_TO_RETRY = (408, 429, 500, 502, 503, 504)


@dataclass(frozen=True)
class HttpStore:
    """Files below an address; requests are tried again with growing pauses, and the server's ``Retry-After`` is kept.

    Attributes:
        address: ``http(s)://host/folder``; may hold a user name and password, which are sent and never shown.
        pause_seconds: pause before the second try of a request, doubled each time.
    """

    address: str
    pause_seconds: float = 0.5

    @property
    def location(self) -> str:
        """The address, without a password."""
        parts = urlsplit(self.address)
        return urlunsplit(parts._replace(netloc=parts.netloc.rpartition("@")[2])).rstrip("/")

    @property
    def is_local(self) -> bool:
        """No."""
        return False

    def path_of(self, name: str) -> str:
        """The address of a file."""
        return f"{self.location}/{quote(name)}"

    def below(self, name: str) -> HttpStore:
        """A folder in this one."""
        parts = urlsplit(self.address)
        deeper = parts._replace(path=f"{parts.path.rstrip('/')}/{quote(name)}")
        return replace(self, address=urlunsplit(deeper))

    def read(self, name: str) -> bytes:
        """A whole file."""
        response = self._request("GET", name, {})
        self._check_status(name, response.status, (200,))
        return bytes(response.data)

    def size(self, name: str) -> int | None:
        """What the server says of a file, if it says."""
        response = self._request("HEAD", name, {})
        if response.status in (403, 405, 501):  # some refuse HEAD, and would answer a GET
            return None
        self._check_status(name, response.status, (200,))
        length = response.headers.get("Content-Length")
        return int(length) if length is not None and length.isdigit() else None

    def open(self, name: str, size: int) -> RangedFile:
        """A file that is read by ranges."""
        found = self.size(name)
        if found is not None:
            check_size(self.path_of(name), found, size)
        return RangedFile(self, name)

    def read_range(self, name: str, offset: int, length: int) -> bytes:
        """``length`` bytes from ``offset`` on."""
        end = offset + length - 1
        for _ in range(_TRIES):
            response = self._request("GET", name, {"Range": f"bytes={offset}-{end}"})
            if response.status == 200:
                raise DataError(
                    f"{self.path_of(name)}: the server ignores ranges and would send the whole file for every chunk; "
                    "use a server that answers them (206), or pipe:curl"
                )
            if response.status == 416:
                raise DataError(f"{self.path_of(name)}: ends before byte {end}: cut short; copy the file again")
            self._check_status(name, response.status, (206,))
            span = response.headers.get("Content-Range", "")
            if len(response.data) == length and span.startswith(f"bytes {offset}-{end}/"):
                return bytes(response.data)
        raise DataError(
            f"{self.path_of(name)}: asked for bytes {offset} to {end}, the server sent {len(response.data)} bytes "
            f"({span or 'no Content-Range'}), {_TRIES} times"
        )

    def _request(self, method: str, name: str, headers: dict[str, str]) -> Any:
        try:
            return self._pool.request(method, self.path_of(name), headers={**self._authorisation, **headers})
        except urllib3.exceptions.HTTPError as error:
            cause = getattr(error, "reason", None) or error
            raise DataError(f"{self.path_of(name)}: no answer after {_TRIES} tries: {cause}") from None

    def _check_status(self, name: str, status: int, wanted: tuple[int, ...]) -> None:
        where = self.path_of(name)
        if status in (404, 410):
            raise MissingFile(f"{where}: the server says it is not there (status {status})")
        if status in (401, 403):
            raise RefusedFile(
                f"{where}: the server refuses it (status {status}); https://USER:PASSWORD@host/… sends both"
            )
        if status not in wanted:
            raise DataError(f"{where}: the server answers with status {status}")

    @cached_property
    def _pool(self) -> urllib3.PoolManager:
        retries = urllib3.Retry(
            total=_TRIES - 1,
            backoff_factor=self.pause_seconds,
            backoff_max=60.0,
            status_forcelist=_STATUSES_TO_RETRY,
            allowed_methods=("GET", "HEAD"),
            raise_on_status=False,
        )
        return urllib3.PoolManager(retries=retries, timeout=urllib3.Timeout(_TIMEOUT_SECONDS))

    @cached_property
    def _authorisation(self) -> dict[str, str]:
        who = urlsplit(self.address).netloc.rpartition("@")[0]
        return urllib3.make_headers(basic_auth=who) if who else {}

    def __getstate__(self) -> dict[str, Any]:
        """What another process needs; connections stay here."""
        return {"address": self.address, "pause_seconds": self.pause_seconds}


@dataclass(frozen=True)
class RangedFile:
    """A file of a server.

    Attributes:
        store: where it is.
        name: of the file.
    """

    store: HttpStore
    name: str

    def view(self, offset: int, length: int) -> NDArray[np.uint8]:
        """Some bytes, fetched."""
        return np.frombuffer(self.store.read_range(self.name, offset, length), dtype=np.uint8)
