"""Files that a command prints, such as a cloud's own copying tool: shards are fetched whole and kept in a cache."""

from __future__ import annotations

import fcntl
import hashlib
import os
import platform
import shlex
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

from megalm.data.shards.store.base import Cache, MissingFile, check_size
from megalm.data.shards.store.local import MappedFile, map_file
from megalm.errors import DataError

PIPE = "pipe:"
_FILE = "{file}"
_GIB = 2**30
_TRIES = 5


@dataclass(frozen=True)
class PipeStore:
    """What ``pipe:COMMAND`` prints; ``{file}`` in it becomes the name of the file, quoted for the shell.

    The ranks of a machine, of all its runs, share the cache: of those that need a shard, one fetches it. Where machines
    share it too, and locks of files do not hold between them, each may fetch: what is in its place is whole.

    Attributes:
        command: with its prefix, as a user gives it.
        cache: where shards are kept.
        folder: which folder of the dataset this is.
    """

    command: str
    cache: Cache
    folder: str = ""

    @property
    def location(self) -> str:
        """The command, for one folder."""
        return self.command.replace(_FILE, f"{self.folder}{_FILE}")

    @property
    def is_local(self) -> bool:
        """No: it takes a command to see a file, although shards are mapped once they are here."""
        return False

    def path_of(self, name: str) -> str:
        """The command that prints a file."""
        return self.command.replace(_FILE, self.folder + name)

    def below(self, name: str) -> PipeStore:
        """A folder in this one."""
        return replace(self, folder=f"{self.folder}{name}/")

    def read(self, name: str) -> bytes:
        """All that the command prints."""
        with tempfile.TemporaryFile() as file:
            self._run(name, file.fileno())
            file.seek(0)
            return file.read()

    def size(self, name: str) -> None:  # noqa: ARG002 - a command tells no size
        """Unknown."""
        return

    def open(self, name: str, size: int) -> MappedFile:
        """Fetch a file unless it is in the cache, and map it."""
        folder = self._cache_folder()
        key = hashlib.sha256(f"{self.command}\0{self.folder}{name}\0{size}".encode()).hexdigest()
        path = folder / f"{key}.shard"
        with _only_one(folder / f"{key}.lock"):
            for _ in range(_TRIES):
                if _size_of(path) != size:
                    self._fetch(name, size, path)
                if (file := _map_if_there(path)) is not None:
                    return file
        raise DataError(
            f"{self.path_of(name)}: was removed from {folder} each time that it had been fetched: the runs that share "
            "this cache need more than data.cache_gib; give them more, or data.cache_dir each of its own"
        )

    def _fetch(self, name: str, size: int, path: Path) -> None:
        limit = int(self.cache.max_gib * _GIB)
        if size > limit:
            raise DataError(
                f"data.cache_gib={self.cache.max_gib:g}: {self.path_of(name)} alone is {size / _GIB:.2f} GiB; "
                "give the cache more"
            )
        with _only_one(path.parent / "eviction.lock"):
            _make_room(path.parent, limit - size)
        # Left by a killed process of this machine, it is written anew.
        temporary = path.with_suffix(f".{platform.node()}.tmp")
        try:
            with temporary.open("wb") as file:
                self._run(name, file.fileno())
            check_size(self.path_of(name), temporary.stat().st_size, size)
            temporary.replace(path)
        except OSError as error:
            raise DataError(f"{temporary}: cannot be written: {error.strerror}; data.cache_dir names another") from None
        finally:
            temporary.unlink(missing_ok=True)

    def _run(self, name: str, output: int) -> None:
        command = self.command.removeprefix(PIPE).replace(_FILE, shlex.quote(self.folder + name))
        done = subprocess.run(
            command, shell=True, check=False, stdin=subprocess.DEVNULL, stdout=output, stderr=subprocess.PIPE
        )
        if done.returncode == 0:
            return
        said = done.stderr.decode(errors="replace").strip().splitlines()[-3:]
        problem = f"{PIPE}{command}: failed with exit code {done.returncode}: {' / '.join(said) or 'it said nothing'}"
        # A command has no code for "not there"; what fails for a small file is taken to be that.
        raise MissingFile(problem)

    def _cache_folder(self) -> Path:
        given = self.cache.folder
        folder = Path(given) if given else Path(tempfile.gettempdir()) / f"megalm-{os.getuid()}"
        try:
            folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        except OSError as error:
            raise DataError(f"data.cache_dir={folder}: cannot be made: {error.strerror}") from None
        if folder.stat().st_uid != os.getuid():
            raise DataError(f"data.cache_dir={folder}: belongs to another user; give data.cache_dir")
        return folder


def _size_of(path: Path) -> int | None:
    try:
        return path.stat().st_size
    except FileNotFoundError:
        return None


def _map_if_there(path: Path) -> MappedFile | None:
    """Map a file; None where another run that needed room has just removed it."""
    try:
        os.utime(path)  # used just now
        return map_file(path)
    except FileNotFoundError:
        return None
    except DataError:
        if path.exists():
            raise
        return None


def _make_room(folder: Path, limit: int) -> None:
    """Delete the shards used longest ago until the rest is within ``limit`` bytes.

    What a rank has mapped stays readable to it after its name is gone.
    """
    files = []
    for path in folder.glob("*.shard"):
        try:
            status = path.stat()
        except FileNotFoundError:  # another rank was faster
            continue
        files.append((status.st_mtime_ns, status.st_size, path))
    held = sum(size for _, size, _ in files)
    for _, size, path in sorted(files):
        if held <= limit:
            return
        path.unlink(missing_ok=True)
        held -= size


@contextmanager
def _only_one(path: Path) -> Iterator[None]:
    """Other processes of this machine wait; a killed one lets go."""
    with path.open("a") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield
