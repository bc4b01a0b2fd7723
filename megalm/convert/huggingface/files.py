"""The files of a Hugging Face folder: which may be read, and what their headers say of each tensor.

They are safetensors, or, where a folder has none, the pickles of ``torch.save`` that older models were published as.
Those are opened by ``untrusted/safe_pickle.py``: nothing in them is run.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from torch import Tensor

from megalm.checkpoint.tensor_file import DTYPE_NAMES
from megalm.convert.checks import same_values, some_of
from megalm.convert.mapping import Shape
from megalm.convert.untrusted.json_fields import read_json
from megalm.convert.untrusted.safe_path import safe_file
from megalm.convert.untrusted.safe_pickle import PickledTensors
from megalm.errors import CheckpointError

WEIGHTS_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
DTYPES = {name: dtype for dtype, name in DTYPE_NAMES.items()}
"""Dtypes that weights may have."""

PICKLE_FILE = "pytorch_model.bin"
PICKLE_INDEX_FILE = "pytorch_model.bin.index.json"
_COMPARED_ROWS = 4096


@dataclass(frozen=True)
class Stored:
    """Where a tensor is stored, with its dtype and shape from the file's header.

    Attributes:
        file: the file.
        name: of the tensor there.
        shape: its shape.
        dtype: as safetensors calls it; of dtypes that weights do not have, as whoever wrote the file calls it.
        pickled: the tensors of a pickle; None: the file is safetensors.
    """

    file: Path
    name: str
    shape: Shape
    dtype: str
    pickled: PickledTensors | None = None


def read_headers(path: Path) -> dict[str, Stored]:
    """Every tensor of the folder's files by its name there; of safetensors where there are any. No tensor is read.

    Raises:
        CheckpointError: there are none, one is damaged, holds code or is outside the folder, or the index does not fit
            them.
    """
    for name, index, header in ((WEIGHTS_FILE, INDEX_FILE, _header), (PICKLE_FILE, PICKLE_INDEX_FILE, _pickled)):
        if safe_file(path, name).exists():
            return header(safe_file(path, name))
        if safe_file(path, index).exists():
            return _indexed(path, safe_file(path, index), header)
    raise CheckpointError(f"{path}: holds neither {WEIGHTS_FILE} nor {INDEX_FILE} nor {PICKLE_FILE}")


def is_pickled(path: Path) -> bool:
    """Whether a folder's weights are pickles, which the library is never asked to open."""
    return not (path / WEIGHTS_FILE).exists() and not (path / INDEX_FILE).exists()


def _indexed(path: Path, index: Path, header: Callable[[Path], dict[str, Stored]]) -> dict[str, Stored]:
    """The tensors of the files that an index names, each in the file where the index has it."""
    places = _read_index(index)
    found: dict[str, Stored] = {}
    for name in sorted(set(places.values())):
        file = safe_file(path, name)
        if not file.exists():
            raise CheckpointError(f"{file}: missing; {index.name} names it")
        found |= {tensor: stored for tensor, stored in header(file).items() if places.get(tensor, name) == name}
    problems = [f"{tensor}: not in {file}, where {index.name} has it" for tensor, file in places.items()]
    problems = [line for line, tensor in zip(problems, places, strict=True) if tensor not in found]
    problems += [f"{tensor}: in {found[tensor].file.name}, not in {index.name}" for tensor in found.keys() - places]
    if problems:
        raise CheckpointError(some_of(problems, f"{path}: "))
    return {tensor: found[tensor] for tensor in places}


def _read_index(index: Path) -> Mapping[str, str]:
    places = read_json(index).get("weight_map")
    if not isinstance(places, dict) or not places or not all(isinstance(name, str) for name in places.values()):
        raise CheckpointError(f"{index}: weight_map is no mapping of tensors to files")
    return places


def _pickled(file: Path) -> dict[str, Stored]:
    def weights(found: Any) -> Mapping[str, Any]:
        if not isinstance(found, Mapping) or not found or not all(isinstance(name, str) for name in found):
            raise CheckpointError(f"{file}: holds a {type(found).__name__}, not tensors by their names")
        return found

    tensors = PickledTensors(file, weights)
    return {
        name: Stored(file, name, header.shape, DTYPE_NAMES.get(header.dtype, str(header.dtype)), tensors)
        for name, header in tensors.headers.items()
    }


def _header(file: Path) -> dict[str, Stored]:
    try:
        with safe_open(file, "pt") as opened:
            slices = {name: opened.get_slice(name) for name in opened.keys()}  # noqa: SIM118 - it is no mapping
            return {
                name: Stored(file, name, tuple(part.get_shape()), part.get_dtype()) for name, part in slices.items()
            }
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{file}: no whole safetensors file: {error}") from None


def read_tensor(stored: Stored) -> Tensor:
    """A tensor, as a view of its mapped file.

    Raises:
        CheckpointError: the file is not what its header said any more.
    """
    if stored.pickled is not None:
        return stored.pickled.get(stored.name)
    # The file is mapped for as long as the tensor lives: pages of tensors that were read before do not pile up.
    try:
        with safe_open(stored.file, "pt") as opened:
            tensor: Tensor = opened.get_tensor(stored.name)
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{stored.file}: {stored.name}: cannot be read: {error}") from None
    if tuple(tensor.shape) != stored.shape or tensor.dtype != DTYPES.get(stored.dtype):
        raise CheckpointError(f"{stored.file}: {stored.name}: changed while it was being converted")
    return tensor


def same_tensor(one: Stored, other: Stored) -> bool:
    """Whether two stored tensors are equal, compared by blocks of rows."""
    if one.dtype != other.dtype or one.shape != other.shape:
        return False
    left, right = read_tensor(one), read_tensor(other)  # mapped: memory is that of the rows that are compared
    return all(
        same_values(left[start : start + _COMPARED_ROWS], right[start : start + _COMPARED_ROWS])
        for start in range(0, one.shape[0], _COMPARED_ROWS)
    )
