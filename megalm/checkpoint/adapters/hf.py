"""Hugging Face folders: ``config.json``, safetensors with or without an index, tokenizer; read and written.

Nothing of a folder that is read is trusted: files must lie in it, headers are checked by the safetensors library, and
every tensor must be what ``config.json`` says.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path
from threading import Lock

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from megalm.checkpoint.adapters.checks import check_architecture, check_size, same_values, some_of
from megalm.checkpoint.adapters.hf_families import FAMILIES
from megalm.checkpoint.adapters.hf_family import Family
from megalm.checkpoint.adapters.json_fields import Fields, read_json
from megalm.checkpoint.adapters.mapping import Rule, Shape, missing_and_extra
from megalm.checkpoint.adapters.weights import SourceInfo, WeightSource, full_shapes
from megalm.config.schema import Model
from megalm.config.violation import spoken_list
from megalm.errors import CheckpointError

CONFIG_FILE = "config.json"
WEIGHTS_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
DTYPES = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}
"""What weights may be stored as."""

_PICKLES = ("pytorch_model.bin", "pytorch_model.bin.index.json")
_COMPARED_ROWS = 4096


@dataclass(frozen=True)
class _Stored:
    """Where a tensor is, and what its file's header says of it."""

    file: Path
    name: str
    shape: Shape
    dtype: str


class HfSource(WeightSource):
    """A Hugging Face folder, opened for reading.

    Args:
        path: the folder.

    Raises:
        CheckpointError: see :class:`WeightSource`.
    """

    def __init__(self, path: Path) -> None:
        self.family, model, self.eos_id = _read_config(path)
        found = _headers(path)
        self._stored = _by_canonical_name(path, self.family, found)
        check_size(path / CONFIG_FILE, model, sum(prod(stored.shape) for stored in found.values()), len(found))
        self._rules = {rule.name: rule for rule in self.family.rules(model)}
        self._shapes = full_shapes(model)
        notes = self._check_tensors(path, model)
        self._duplicates = {
            original: name for name, original in self.family.duplicates(model).items() if name in self._stored
        }
        self._unequal: dict[str, bool] = {}
        self._lock = Lock()
        self.info = SourceInfo(
            format="hf",
            path=path,
            model=model,
            dtype=DTYPES[self._stored[next(iter(self._rules.values())).foreign[0]].dtype],
            tokenizer=path,
            notes=tuple(notes),
        )

    def read(self, name: str) -> Tensor:
        """See the base class."""
        rule = self._rules[name]
        self._check_duplicates(rule)
        parts = [_read_tensor(self._stored[foreign]) for foreign in rule.foreign]
        return rule.form.to_megalm(parts).contiguous()

    def _check_tensors(self, path: Path, model: Model) -> list[str]:
        """Prove by the headers that the tensors are those of the model; returns notes on what is left out."""
        family, stored = self.family, self._stored
        duplicates = family.duplicates(model)
        for name, original in duplicates.items():
            if name in stored and original not in stored:  # a file may keep either of two names of one tensor
                stored[original] = stored.pop(name)
        left_out = {name: what for name in stored if (what := family.what_is_left_out(name))}
        # Another than the tied tensor's shape would be an error too; where both agree, the bytes are compared later.
        wanted = self._shapes_of(model)
        ignored = [
            name
            for name in stored
            if name in left_out
            or family.is_ignored(name)
            or (name in duplicates and stored[name].shape == wanted.get(duplicates[name]))
        ]
        present = {name: tensor.shape for name, tensor in stored.items()}
        problems = missing_and_extra(list(self._rules.values()), self._shapes, present, ignored=ignored)
        if not problems:
            problems = _dtype_problems({foreign: stored[foreign] for foreign in wanted})
        if problems:
            raise CheckpointError(some_of(problems, f"{path}: "))
        return [f"left out {what} ({spoken_list(_names(left_out, what), 'and')})" for what in _unique(left_out)]

    def _shapes_of(self, model: Model) -> dict[str, Shape]:
        """Shapes of the foreign tensors that the rules name."""
        return {
            foreign: shape
            for rule in self.family.rules(model)
            for foreign, shape in zip(rule.foreign, rule.form.foreign_shapes(self._shapes[rule.name]), strict=True)
        }

    def _check_duplicates(self, rule: Rule) -> None:
        """A tensor that a file holds twice, under two names, must be the same."""
        for foreign in rule.foreign:
            name = self._duplicates.get(foreign)
            if name is None:
                continue
            with self._lock:
                if name not in self._unequal:
                    self._unequal[name] = not _same_tensor(self._stored[name], self._stored[foreign])
            if self._unequal[name]:
                raise CheckpointError(
                    f"{self._stored[name].file}: {self._stored[name].name} differs from {self._stored[foreign].name}, "
                    "and config.json says that they are one tensor; where they are meant to be two, set "
                    "tie_word_embeddings to false in config.json"
                )


def open_source(path: Path) -> WeightSource:
    """A Hugging Face folder, opened for reading."""
    return HfSource(path)


def safe_file(folder: Path, name: str) -> Path:
    """A file of a folder by a name that somebody else wrote; the file need not exist.

    The links of the library's download cache, from a snapshot to its blobs, are followed; others must stay inside.

    Raises:
        CheckpointError: the name leaves the folder.
    """
    if not name or Path(name).name != name or name in (".", ".."):
        raise CheckpointError(f"{folder}: file name {name!r} leaves the folder; only plain names can be read")
    path = folder / name
    real, home = path.resolve(), folder.resolve()
    blobs = home.parents[1] / "blobs" if home.parent.name == "snapshots" else None
    if not real.is_relative_to(home) and (blobs is None or real.parent != blobs):
        raise CheckpointError(f"{path}: a link to {real}, outside the folder; copy the file here")
    if path.exists() and not path.is_file():
        raise CheckpointError(f"{path}: not a file")
    return path


def _read_config(path: Path) -> tuple[Family, Model, int | None]:
    """The architecture, and the token that ends a text where ``config.json`` says it."""
    if not path.is_dir():
        reason = "not a folder" if path.exists() else "no such folder"
        raise CheckpointError(f"{path}: {reason}; a Hugging Face folder holds {CONFIG_FILE} and {WEIGHTS_FILE}")
    file = safe_file(path, CONFIG_FILE)
    if not file.exists():
        raise CheckpointError(f"{path}: holds no {CONFIG_FILE}, which every Hugging Face folder has")
    fields = Fields(file, read_json(file))
    model_type = fields.values.get("model_type")
    family = FAMILIES.get(model_type) if isinstance(model_type, str) else None
    if family is None:
        fields.problem("model_type", f"megalm converts {spoken_list(FAMILIES, 'and')}")
        fields.check()
    assert family is not None
    if "quantization_config" in fields:
        fields.problem("quantization_config", "quantized weights are not converted; take the original model")
    model = family.model_from_config(fields)
    fields.check()
    check_architecture(file, model)
    return family, model, _end_of(fields)


def _end_of(fields: Fields) -> int | None:
    """The first of the tokens that end a text; None where it is no word of the vocabulary."""
    value = fields.values.get("eos_token_id")
    first = value[0] if isinstance(value, list) and value else value
    return first if isinstance(first, int) and not isinstance(first, bool) and first >= 0 else None


def _headers(path: Path) -> dict[str, _Stored]:
    """Every tensor of the folder's safetensors files by its name there; no tensor is read."""
    single, index = safe_file(path, WEIGHTS_FILE), safe_file(path, INDEX_FILE)
    if single.exists():
        return _header(single)
    if not index.exists():
        raise CheckpointError(_no_weights(path))
    places = _read_index(index)
    found: dict[str, _Stored] = {}
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


def _header(file: Path) -> dict[str, _Stored]:
    try:
        with safe_open(file, "pt") as opened:
            slices = {name: opened.get_slice(name) for name in opened.keys()}  # noqa: SIM118 - it is no mapping
            return {
                name: _Stored(file, name, tuple(part.get_shape()), part.get_dtype()) for name, part in slices.items()
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


def _by_canonical_name(path: Path, family: Family, found: Mapping[str, _Stored]) -> dict[str, _Stored]:
    named: dict[str, _Stored] = {}
    for canonical, stored in family.canonical_names(found):
        if canonical in named:
            raise CheckpointError(f"{path}: {stored} and {named[canonical].name} are two names of one tensor")
        named[canonical] = found[stored]
    return named


def _dtype_problems(tensors: Mapping[str, _Stored]) -> list[str]:
    first = next(iter(tensors.values())).dtype
    wrong = [tensor for tensor in tensors.values() if tensor.dtype not in DTYPES]
    if wrong:
        accepted = spoken_list(DTYPES)
        return [f"{tensor.file.name}: {tensor.name}: dtype {tensor.dtype}, not {accepted}" for tensor in wrong]
    return [
        f"{tensor.file.name}: {tensor.name}: dtype {tensor.dtype} where others are {first}; convert models of one dtype"
        for tensor in tensors.values()
        if tensor.dtype != first
    ]


def _read_tensor(stored: _Stored) -> Tensor:
    # The file is mapped for as long as the tensor lives: pages of tensors that were read before do not pile up.
    try:
        with safe_open(stored.file, "pt") as opened:
            tensor: Tensor = opened.get_tensor(stored.name)
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{stored.file}: {stored.name}: cannot be read: {error}") from None
    if tuple(tensor.shape) != stored.shape or tensor.dtype != DTYPES.get(stored.dtype):
        raise CheckpointError(f"{stored.file}: {stored.name}: changed while it was being converted")
    return tensor


def _same_tensor(one: _Stored, other: _Stored) -> bool:
    """Whether two stored tensors are equal, compared by blocks of rows."""
    if one.dtype != other.dtype or one.shape != other.shape:
        return False
    with safe_open(one.file, "pt") as first, safe_open(other.file, "pt") as second:
        left, right = first.get_slice(one.name), second.get_slice(other.name)
        return all(
            same_values(left[start : start + _COMPARED_ROWS], right[start : start + _COMPARED_ROWS])
            for start in range(0, one.shape[0], _COMPARED_ROWS)
        )


def _names(left_out: Mapping[str, str], what: str) -> list[str]:
    return [name for name, described in left_out.items() if described == what]


def _unique(left_out: Mapping[str, str]) -> list[str]:
    return list(dict.fromkeys(left_out.values()))
