"""A folder of this machine; its large files are mapped into memory."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from megalm.data.shards.store.base import MissingFile, check_size
from megalm.errors import DataError


@dataclass(frozen=True)
class MappedFile:
    """A file in memory as far as it is touched.

    Attributes:
        data: all of its bytes.
    """

    data: NDArray[np.uint8]

    def view(self, offset: int, length: int) -> NDArray[np.uint8]:
        """Some bytes, not copied."""
        return self.data[offset : offset + length]


@dataclass(frozen=True)
class LocalStore:
    """A folder.

    Attributes:
        folder: where it is.
    """

    folder: Path

    @property
    def location(self) -> str:
        """The folder."""
        return str(self.folder)

    @property
    def is_local(self) -> bool:
        """Yes."""
        return True

    def path_of(self, name: str) -> str:
        """The path of a file."""
        return str(self.folder / name)

    def below(self, name: str) -> LocalStore:
        """A folder in this one."""
        return LocalStore(self.folder / name)

    def read(self, name: str) -> bytes:
        """A whole file."""
        path = self.folder / name
        try:
            return path.read_bytes()
        except (FileNotFoundError, NotADirectoryError):
            raise MissingFile(f"{path}: missing; copy it from where the dataset was prepared") from None
        except OSError as error:
            raise DataError(f"{path}: cannot be read: {error.strerror}") from None

    def size(self, name: str) -> int:
        """Bytes of a file."""
        path = self.folder / name
        try:
            return path.stat().st_size
        except (FileNotFoundError, NotADirectoryError):
            raise MissingFile(f"{path}: missing; copy it from where the dataset was prepared") from None
        except OSError as error:
            raise DataError(f"{path}: cannot be read: {error.strerror}") from None

    def open(self, name: str, size: int) -> MappedFile:
        """Map a file."""
        path = self.path_of(name)
        check_size(path, self.size(name), size)
        return map_file(Path(path))


def map_file(path: Path) -> MappedFile:
    """Map a file that is there; its descriptor is closed at once."""
    try:
        # A plain array over the mapping: slices of np.memmap cost ten times as much. By its name as text, since numpy
        # resolves a Path, with a question to the file system for each folder above it.
        return MappedFile(np.asarray(np.memmap(str(path), dtype=np.uint8, mode="r")).view(np.ndarray))
    except (OSError, ValueError) as error:
        raise DataError(f"{path}: cannot be read: {error}") from None
