"""Writes a Hugging Face folder: safetensors of bounded size, ``config.json``, generation config, tokenizer."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megalm.checkpoint.tensor_file import TensorFileWriter, TensorSpec
from megalm.config.schema import Model
from megalm.convert.huggingface.families import family_of
from megalm.convert.huggingface.family import Family
from megalm.convert.huggingface.files import INDEX_FILE, WEIGHTS_FILE
from megalm.convert.huggingface.library_tokenizer import save_for_library
from megalm.convert.huggingface.read import CONFIG_FILE, GENERATION_FILE
from megalm.convert.huggingface.token_ids import TokenIds
from megalm.convert.mapping import Rule
from megalm.convert.parallel import run_all
from megalm.convert.transfer import Transfer
from megalm.data.tokenization.tokenizer import Tokenizer
from megalm.errors import CheckpointError

_METADATA = {"format": "pt"}


@dataclass(frozen=True)
class _Entry:
    """A megalm tensor, and the foreign tensors that it becomes, in one file."""

    rule: Rule
    specs: dict[str, TensorSpec]

    @property
    def nbytes(self) -> int:
        """Bytes of all of them."""
        return sum(spec.nbytes for spec in self.specs.values())


def write_hf(transfer: Transfer, folder: Path, *, tokenizer: Tokenizer | None, shard_bytes: int) -> Family:
    """Write a model into an empty folder.

    Args:
        transfer: the model.
        folder: where to.
        tokenizer: the model's; None: it has none.
        shard_bytes: most that one file of weights holds, unless a single tensor is larger.

    Returns:
        The architecture that the model is there.

    Raises:
        CheckpointError: no architecture can be this model, or not with its special tokens; or the source cannot be
            read.
        OSError: the disk is full or broken.
    """
    model = transfer.info.model
    family = family_of(model, transfer.info.architecture)
    ids = transfer.info.ids or TokenIds.of_tokenizer(tokenizer, model)
    _check_ids(family, model, ids.config)
    shards = _shards(transfer, family, shard_bytes)
    files = dict(zip(_file_names(len(shards)), shards, strict=True))
    tasks = [partial(_write_shard, transfer, folder / file, shard) for file, shard in files.items()]
    run_all(tasks, cancel=transfer.cancel)
    if len(files) > 1:
        places = {name: file for file, shard in files.items() for entry in shard for name in entry.specs}
        total = sum(entry.nbytes for shard in shards for entry in shard)
        _write_json(folder / INDEX_FILE, {"metadata": {"total_size": total}, "weight_map": places})
    _write_json(folder / CONFIG_FILE, _config(family, model, transfer.info.dtype, ids.config))
    if tokenizer is not None:
        save_for_library(tokenizer, folder, model)
    (folder / GENERATION_FILE).unlink(missing_ok=True)  # a tokenizer's own, which may say less
    if ids.generation is not None:
        _write_json(folder / GENERATION_FILE, dict(ids.generation))
    return family


def _check_ids(family: Family, model: Model, ids: Mapping[str, Any]) -> None:
    """Refuse a special token where the architecture, which computes with it, has another id."""
    for name, fixed in family.fixed_ids(model).items():
        if ids.get(name, fixed) not in (None, fixed):
            raise CheckpointError(
                f"the tokenizer's {name} is {ids[name]}, and {family.title} computes with {fixed}, which follows from "
                f"model.position_offset={model.position_offset}: it numbers positions from {name} + 1; train with a "
                f"tokenizer whose padding is token {fixed}, or with model.position_offset={ids[name] + 1}"
            )


def _config(family: Family, model: Model, dtype: torch.dtype, ids: Mapping[str, Any]) -> dict[str, Any]:
    return {
        "architectures": [family.architecture],
        "model_type": family.model_type,
        **family.config_from_model(model),
        **ids,
        **family.fixed_ids(model),
        "dtype": str(dtype).removeprefix("torch."),
    }


def _shards(transfer: Transfer, family: Family, shard_bytes: int) -> list[list[_Entry]]:
    """Tensors by file, in the order of the model; the parts of one tensor stay together."""
    model, dtype = transfer.info.model, transfer.info.dtype
    copies = family.copies(model)
    rules = {rule.name: rule for rule in family.rules(model)}
    shards: list[list[_Entry]] = [[]]
    size = 0
    for name, shape in transfer.shapes.items():
        rule = rules[name]
        specs = {
            foreign: TensorSpec(dtype, part)
            for foreign, part in zip(rule.foreign, rule.form.foreign_shapes(shape), strict=True)
        }
        specs |= {copy: specs[original] for copy, original in copies.items() if original in specs}
        entry = _Entry(rule, specs)
        if shards[-1] and size + entry.nbytes > shard_bytes:
            shards.append([])
            size = 0
        shards[-1].append(entry)
        size += entry.nbytes
    return shards


def _file_names(count: int) -> list[str]:
    if count == 1:
        return [WEIGHTS_FILE]
    return [f"model-{number:05d}-of-{count:05d}.safetensors" for number in range(1, count + 1)]


def _write_shard(transfer: Transfer, file: Path, shard: list[_Entry]) -> None:
    specs = {name: spec for entry in shard for name, spec in entry.specs.items()}
    with TensorFileWriter(file, specs, metadata=_METADATA) as writer:
        for entry in shard:
            with transfer.hold(entry.rule.name) as tensor:
                parts = entry.rule.form.to_foreign(tensor)
                for name, part in zip(entry.specs, _with_copies(parts, len(entry.specs)), strict=True):
                    writer.write(name, part.contiguous())


def _with_copies(parts: tuple[Tensor, ...], count: int) -> list[Tensor]:
    """The parts, and a single one again as often as it is written under other names."""
    return [*parts, *parts * (count - len(parts))]


def _write_json(path: Path, values: dict[str, Any]) -> None:
    path.write_text(json.dumps(values, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
