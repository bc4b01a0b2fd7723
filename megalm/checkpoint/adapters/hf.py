"""Reads Hugging Face folders: ``config.json`` and safetensors, with or without an index.

Nothing of a folder that is read is trusted: files must lie in it, headers are checked by the safetensors library, and
every tensor must be what ``config.json`` says.
"""

from __future__ import annotations

from collections.abc import Mapping
from math import prod
from pathlib import Path
from threading import Lock

from torch import Tensor

from megalm.checkpoint.adapters.checks import check_architecture, check_size, some_of
from megalm.checkpoint.adapters.hf_families import FAMILIES
from megalm.checkpoint.adapters.hf_family import Family
from megalm.checkpoint.adapters.hf_files import (
    DTYPES,
    WEIGHTS_FILE,
    Stored,
    read_headers,
    read_tensor,
    safe_file,
    same_tensor,
)
from megalm.checkpoint.adapters.json_fields import Fields, read_json
from megalm.checkpoint.adapters.mapping import Rule, Shape, missing_and_extra
from megalm.checkpoint.adapters.weights import SourceInfo, WeightSource, full_shapes
from megalm.config.schema import Model
from megalm.config.violation import spoken_list
from megalm.errors import CheckpointError

CONFIG_FILE = "config.json"
GENERATION_FILE = "generation_config.json"
_NOT_OF_GENERATION = ("bos_token_id", "eos_token_id", "pad_token_id", "transformers_version")
"""What else stands there, and is known from elsewhere."""


class HfSource(WeightSource):
    """A Hugging Face folder, opened for reading.

    Args:
        path: the folder.

    Raises:
        CheckpointError: see :class:`WeightSource`.
    """

    def __init__(self, path: Path) -> None:
        self.family, model, self.eos_id, notes = _read_config(path)
        found = read_headers(path)
        self._stored = _by_canonical_name(path, self.family, found)
        check_size(path / CONFIG_FILE, model, sum(prod(stored.shape) for stored in found.values()), len(found))
        self._rules = {rule.name: rule for rule in self.family.rules(model)}
        self._shapes = full_shapes(model)
        notes += self._check_tensors(path, model) + _generation_notes(path)
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
        parts = [read_tensor(self._stored[foreign]) for foreign in rule.foreign]
        return rule.form.to_megalm(parts).contiguous()

    def _check_tensors(self, path: Path, model: Model) -> list[str]:
        """Prove by the headers that the tensors are those of the model; returns notes on what is left out."""
        family, stored = self.family, self._stored
        duplicates, stand_ins = family.duplicates(model), family.stand_ins(model)
        for name, original in (duplicates | stand_ins).items():
            if name in stored and original not in stored:  # a file may keep either of two names of one tensor
                stored[original] = stored.pop(name)
        left_out = {name: what for name in stored if (what := family.what_is_left_out(name))}
        # Another than the tied tensor's shape would be an error too; where both agree, the bytes are compared later.
        wanted = self._shapes_of(model)
        ignored = [
            name
            for name in stored
            if name in left_out
            or name in stand_ins
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
                    self._unequal[name] = not same_tensor(self._stored[name], self._stored[foreign])
            if self._unequal[name]:
                raise CheckpointError(
                    f"{self._stored[name].file}: {self._stored[name].name} differs from {self._stored[foreign].name}, "
                    "and config.json says that they are one tensor; where they are meant to be two, set "
                    "tie_word_embeddings to false in config.json"
                )


def open_source(path: Path) -> WeightSource:
    """A Hugging Face folder, opened for reading."""
    return HfSource(path)


def _read_config(path: Path) -> tuple[Family, Model, int | None, list[str]]:
    """The architecture, the token that ends a text where ``config.json`` says it, and notes on what is left out."""
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
    notes = family.notes(fields)
    fields.check()
    check_architecture(file, model)
    return family, model, _end_of(fields), notes


def _generation_notes(path: Path) -> list[str]:
    """What a folder says of how to generate, which is said to megalm's ``generate`` each time."""
    file = safe_file(path, GENERATION_FILE)
    if not file.exists():
        return []
    try:
        values = read_json(file)
    except CheckpointError as error:
        return [f"left out {GENERATION_FILE}: {error}"]
    names = [name for name in values if name not in _NOT_OF_GENERATION and not name.startswith("_")]
    return [f"left out {GENERATION_FILE}: {spoken_list(names, 'and')}"] if names else []


def _end_of(fields: Fields) -> int | None:
    """The first of the tokens that end a text; None where it is no word of the vocabulary."""
    value = fields.values.get("eos_token_id")
    first = value[0] if isinstance(value, list) and value else value
    return first if isinstance(first, int) and not isinstance(first, bool) and first >= 0 else None


def _by_canonical_name(path: Path, family: Family, found: Mapping[str, Stored]) -> dict[str, Stored]:
    named: dict[str, Stored] = {}
    for canonical, stored in family.canonical_names(found):
        if canonical in named:
            raise CheckpointError(f"{path}: {stored} and {named[canonical].name} are two names of one tensor")
        named[canonical] = found[stored]
    return named


def _dtype_problems(tensors: Mapping[str, Stored]) -> list[str]:
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


def _names(left_out: Mapping[str, str], what: str) -> list[str]:
    return [name for name, described in left_out.items() if described == what]


def _unique(left_out: Mapping[str, str]) -> list[str]:
    return list(dict.fromkeys(left_out.values()))
