"""The files of a Hugging Face folder: which may be read, and what the headers of its safetensors say."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from safetensors import SafetensorError, safe_open
from torch import Tensor

from megalm.checkpoint.tensor_file import DTYPE_NAMES
from megalm.convert.checks import same_values, some_of
from megalm.convert.mapping import Shape
from megalm.convert.untrusted.json_fields import read_json
from megalm.convert.untrusted.safe_path import safe_file
from megalm.errors import CheckpointError

WEIGHTS_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
DTYPES = {name: dtype for dtype, name in DTYPE_NAMES.items()}
"""Dtypes that weights may have."""

_PICKLES = ("pytorch_model.bin", "pytorch_model.bin.index.json")
_COMPARED_ROWS = 4096


@dataclass(frozen=True)
class Stored:
    """Where a tensor is stored, with its dtype and shape from the file's header."""

    file: Path
    name: str
    shape: Shape
    dtype: str


def read_headers(path: Path) -> dict[str, Stored]:
    """Every tensor of the folder's safetensors files by its name there; no tensor is read.

    Raises:
        CheckpointError: there are none, one is damaged or outside the folder, or the index does not fit them.
    """
    single, index = safe_file(path, WEIGHTS_FILE), safe_file(path, INDEX_FILE)
    if single.exists():
        return _header(single)
    if not index.exists():
        raise CheckpointError(_no_weights(path))
    places = _read_index(index)
    found: dict[str, Stored] = {}
    for name in sorted(set(places.values())):
        file = safe_file(path, name)
        if not file.exists():
            raise CheckpointError(f"{file}: missing; {INDEX_FILE} names it")
        found |= {tensor: stored for tensor, stored in _header(file).items() if places.get(tensor, name) == name}
    problems = [f"{tensor}: not in {file}, where {INDEX_FILE} has it" for tensor, file in places.items()]
    problems = [line for line, tensor in zip(problems, places, strict=True) if tensor not in found]
    problems += [f"{tensor}: in {found[tensor].file.name}, not in {INDEX_FILE}" for tensor in found.keys() - places]
    if problems:
        raise CheckpointError(some_of(problems, f"{path}: "))
    return {tensor: found[tensor] for tensor in places}


def _read_index(index: Path) -> Mapping[str, str]:
    places = read_json(index).get("weight_map")
    if not isinstance(places, dict) or not places or not all(isinstance(name, str) for name in places.values()):
        raise CheckpointError(f"{index}: weight_map is no mapping of tensors to files")
    return places


def _header(file: Path) -> dict[str, Stored]:
    try:
        with safe_open(file, "pt") as opened:
            slices = {name: opened.get_slice(name) for name in opened.keys()}  # noqa: SIM118 - it is no mapping
            return {
                name: Stored(file, name, tuple(part.get_shape()), part.get_dtype()) for name, part in slices.items()
            }
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{file}: no whole safetensors file: {error}") from None


def _no_weights(path: Path) -> str:
    pickles = [name for name in _PICKLES if (path / name).exists()]
    if pickles:
        return (
            f"{path}: holds its weights as {pickles[0]} only, and reading a pickle runs whatever code is in it; take "
            "the safetensors of the same model, or, where you trust it, load it with transformers and save it with "
            "model.save_pretrained(FOLDER)"
        )
    return f"{path}: holds neither {WEIGHTS_FILE} nor {INDEX_FILE}"


def read_tensor(stored: Stored) -> Tensor:
    """A tensor, as a view of its mapped file.

    Raises:
        CheckpointError: the file is not what its header said any more.
    """
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
    with safe_open(one.file, "pt") as first, safe_open(other.file, "pt") as second:
        left, right = first.get_slice(one.name), second.get_slice(other.name)
        return all(
            same_values(left[start : start + _COMPARED_ROWS], right[start : start + _COMPARED_ROWS])
            for start in range(0, one.shape[0], _COMPARED_ROWS)
        )
