"""Reads Hugging Face folders: ``config.json``, and safetensors or ``pytorch_model.bin``, with or without an index.

The files are validated: they must lie in the folder, the safetensors library checks their headers, nothing in a pickle
is run, and every tensor must have the shape that ``config.json`` implies.
"""

from __future__ import annotations

from collections.abc import Mapping
from math import prod
from pathlib import Path
from threading import Lock

from torch import Tensor

from megalm.config.schema import Model
from megalm.config.violation import spoken_list
from megalm.convert.checks import check_size, some_of
from megalm.convert.huggingface.files import (
    DTYPES,
    WEIGHTS_FILE,
    Stored,
    is_pickled,
    read_headers,
    read_tensor,
    safe_file,
    same_tensor,
)
from megalm.convert.huggingface.names import (
    Architecture,
    foreign_shapes,
    missing_head,
    read_architecture,
    sort_names,
)
from megalm.convert.huggingface.token_ids import TokenIds
from megalm.convert.mapping import Rule, missing_and_extra
from megalm.convert.untrusted.json_fields import read_json
from megalm.convert.weights import SourceInfo, WeightSource, full_shapes
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
        architecture = _read_config(path)
        self.family, model = architecture.family, architecture.model
        found = read_headers(path)
        check_size(path / CONFIG_FILE, model, sum(prod(stored.shape) for stored in found.values()), len(found))
        names = sort_names(path, self.family, model, {name: stored.shape for name, stored in found.items()})
        self._stored = {name: found[stored] for name, stored in names.stored.items()}
        self._rules = {rule.name: rule for rule in self.family.rules(model)}
        self._duplicates = names.duplicates
        self._check_tensors(path, model, names.ignored)
        notes = (*architecture.notes, *names.notes, *_pickle_notes(path), *_generation_notes(path))
        self._unequal: dict[str, bool] = {}
        self._lock = Lock()
        self.info = SourceInfo(
            format="hf",
            path=path,
            model=model,
            dtype=DTYPES[self._stored[next(iter(self._rules.values())).foreign[0]].dtype],
            tokenizer=path,
            notes=notes,
            architecture=self.family.model_type,
            ids=TokenIds.of_folder(path, safe_file),
        )

    def read(self, name: str) -> Tensor:
        """See the base class."""
        rule = self._rules[name]
        self._check_duplicates(rule)
        parts = [read_tensor(self._stored[foreign]) for foreign in rule.foreign]
        return rule.form.to_megalm(parts).contiguous()

    def _check_tensors(self, path: Path, model: Model, ignored: frozenset[str]) -> None:
        """Prove by the headers that the tensors are those of the model."""
        present = {name: tensor.shape for name, tensor in self._stored.items()}
        if (headless := missing_head(self.family, model, present)) is not None:
            raise CheckpointError(f"{path}: {headless}")
        problems = missing_and_extra(list(self._rules.values()), full_shapes(model), present, ignored=ignored)
        if not problems:
            problems = _dtype_problems({name: self._stored[name] for name in foreign_shapes(self.family, model)})
        if problems:
            raise CheckpointError(some_of(problems, f"{path}: "))

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


def _read_config(path: Path) -> Architecture:
    """The architecture of a folder."""
    if not path.is_dir():
        reason = "not a folder" if path.exists() else "no such folder"
        raise CheckpointError(f"{path}: {reason}; a Hugging Face folder holds {CONFIG_FILE} and {WEIGHTS_FILE}")
    file = safe_file(path, CONFIG_FILE)
    if not file.exists():
        raise CheckpointError(f"{path}: holds no {CONFIG_FILE}, which every Hugging Face folder has")
    return read_architecture(file)


def _pickle_notes(path: Path) -> list[str]:
    """That weights are read from a pickle, and what that is without."""
    if not is_pickled(path):
        return []
    return [
        "the weights are pickled: megalm runs nothing that is in them, and has --verify compute the source's logits "
        "without transformers"
    ]


def _generation_notes(path: Path) -> list[str]:
    """What a folder says of how to generate, which is kept for exports; ``megalm generate`` is told it each time."""
    file = safe_file(path, GENERATION_FILE)
    if not file.exists():
        return []
    try:
        values = read_json(file)
    except CheckpointError as error:
        return [f"left out {GENERATION_FILE}: {error}"]
    names = [name for name in values if name not in _NOT_OF_GENERATION and not name.startswith("_")]
    kept = f"kept for exports, and not what megalm generate goes by: {spoken_list(names, 'and')}"
    return [f"{GENERATION_FILE}: {kept}"] if names else []


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
