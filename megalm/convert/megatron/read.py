"""Reads Megatron-LM checkpoints: ``iter_0000100/mp_rank_00_000/model_optim_rng.pt``, one file per rank.

From ``megatron/training/checkpointing.py``. Weights are read; optimizer and random states are left out.
"""

from __future__ import annotations

import re
from argparse import Namespace
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from megalm.config.schema import Model
from megalm.config.violation import format_value
from megalm.convert.checks import check_architecture
from megalm.convert.megatron.args import model_from_args
from megalm.convert.megatron.weights import MegatronWeights, RankTensors
from megalm.convert.untrusted.json_fields import Fields
from megalm.convert.untrusted.safe_path import safe_file, safe_path
from megalm.convert.untrusted.safe_pickle import PickledTensors, load
from megalm.convert.weights import SourceInfo, WeightSource
from megalm.errors import CheckpointError

TRACKER_FILE = "latest_checkpointed_iteration.txt"
RANK_FILE = "model_optim_rng.pt"
RELEASE = "release"

_RANK = re.compile(r"mp_rank_(\d{2,4})(?:_(\d{3,4}))?")
_DISTRIBUTED = (".metadata", "metadata.json", "common.pt")
_OLDEST = 2.0
_LONGEST_NAME = 1000
"""Characters; what lies deeper in mappings is no tensor of Megatron-LM's."""


class MegatronSource(WeightSource):
    """A Megatron-LM checkpoint, opened for reading.

    Args:
        path: the folder with the tracker file, or one of its ``iter_…`` or ``release`` folders.

    Raises:
        CheckpointError: see :class:`WeightSource`.
    """

    def __init__(self, path: Path) -> None:
        folder = _iteration_folder(path)
        grid = _rank_files(folder, path)
        first = load(grid[0][0])
        fields, names = _args(grid[0][0], first), _model_names(grid[0][0], first)
        legacy = any(name.split("/", 1)[1].startswith("language_model.") for name in _pick(first))
        _check_version(grid[0][0], first, legacy=legacy)
        model = model_from_args(fields, legacy=legacy)
        _check_degrees(fields, tp=len(grid[0]), pp=len(grid))
        fields.check()
        check_architecture(grid[0][0], model)
        files = [[PickledTensors(file, _pick) for file in row] for row in grid]
        # The chunks of virtual stages take turns: first of all ranks, second of all ranks, …
        chunks = [[RankTensors(file, f"{name}/") for file in row] for name in names for row in files]
        self._weights = MegatronWeights(path, model, chunks)
        self.info = SourceInfo(
            format="megatron",
            path=path,
            model=model,
            dtype=self._weights.dtype,
            step=_step(first),
            notes=tuple(_notes(first, model, fields)),
        )

    def read(self, name: str) -> Tensor:
        """See the base class."""
        return self._weights.read(name)


def open_source(path: Path) -> WeightSource:
    """A Megatron-LM checkpoint, opened for reading."""
    return MegatronSource(path)


def _iteration_folder(path: Path) -> Path:
    """The folder that the tracker file names, or the one that was named."""
    tracker = safe_file(path, TRACKER_FILE)
    try:
        is_there = tracker.is_file()
        text = tracker.read_text(encoding="utf-8").strip() if is_there else ""
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{tracker}: cannot be read: {error}") from None
    if not is_there:
        return path
    if text != RELEASE and not re.fullmatch(r"[0-9]{1,12}", text):
        raise CheckpointError(f"{tracker}: says {text[:80]!r}; an iteration's number, or {RELEASE}, would be right")
    folder = path / (RELEASE if text == RELEASE else f"iter_{int(text):07d}")
    if not folder.is_dir():
        raise CheckpointError(f"{folder}: no such folder, and {tracker} names it")
    return folder


def _rank_files(folder: Path, home: Path) -> list[list[Path]]:
    """Every rank's file, by pipeline rank, then tensor-parallel rank; all in what the user named."""
    if not folder.is_dir():
        raise CheckpointError(f"{folder}: no such folder; a Megatron-LM checkpoint is one with {TRACKER_FILE}")
    found: dict[tuple[int, int], Path] = {}
    for child in sorted(folder.iterdir()):
        if not child.name.startswith("mp_rank_"):
            continue
        match = _RANK.fullmatch(child.name)
        if match is None:
            raise CheckpointError(f"{child}: no mp_rank_TT or mp_rank_TT_PPP; expert parallelism is not converted")
        place = int(match[2] or 0), int(match[1])
        if place in found:
            raise CheckpointError(f"{child}: the same rank as {found[place].parent.name}; move one of them away")
        found[place] = safe_path(home, child / RANK_FILE)
    if not found:
        raise CheckpointError(_no_ranks(folder))
    pp, tp = (1 + max(place[axis] for place in found) for axis in (0, 1))
    if pp * tp > 2 * len(found):  # before a list is made of numbers that folder names claim
        raise CheckpointError(f"{folder}: folders of {len(found)} ranks, numbered up to tp={tp} and pp={pp}")
    missing = [(stage, rank) for stage in range(pp) for rank in range(tp) if (stage, rank) not in found]
    if missing:
        stage, rank = missing[0]
        raise CheckpointError(
            f"{folder}: no folder of tensor-parallel rank {rank}, pipeline rank {stage}, of tp={tp} and pp={pp}"
        )
    return [[found[stage, rank] for rank in range(tp)] for stage in range(pp)]


def _no_ranks(folder: Path) -> str:
    if any((folder / name).exists() for name in _DISTRIBUTED):
        return (
            f"{folder}: Megatron-LM's torch_dist format, which is not converted; let Megatron-LM load it and save it "
            "again with --ckpt-convert-format torch"
        )
    return f"{folder}: holds neither {TRACKER_FILE} nor mp_rank_00/{RANK_FILE}"


def _args(file: Path, state: Any) -> Fields:
    args = state.get("args") if isinstance(state, dict) else None
    if not isinstance(args, Namespace):
        raise CheckpointError(f"{file}: holds no args, by which Megatron-LM records the architecture")
    return Fields(file, {name: value for name, value in vars(args).items() if isinstance(name, str)}, place="args.")


def _model_names(file: Path, state: Mapping[str, Any]) -> list[str]:
    """Under which keys the file has its chunks: ``model``, or ``model0``, ``model1``, … with virtual stages."""
    if "model" in state:
        return ["model"]
    names = [f"model{number}" for number in range(len(state)) if f"model{number}" in state]
    if not names or names != [f"model{number}" for number in range(len(names))]:
        raise CheckpointError(f"{file}: holds neither model nor model0, model1, …")
    return names


def _pick(state: Any) -> dict[str, Tensor]:
    """The weights of a rank's file, named ``model/…`` or ``model0/…``; nested ones with dots between."""
    if not isinstance(state, dict):
        return {}
    models = {name: value for name, value in state.items() if isinstance(name, str) and re.fullmatch(r"model\d*", name)}
    return {
        f"{model}/{name}": tensor
        for model, tensors in models.items()
        for name, tensor in _flattened(tensors)
        if not name.endswith("_extra_state")
    }


def _flattened(tensors: Any) -> Iterator[tuple[str, Tensor]]:
    """Tensors of mappings in mappings, each mapping once; what is neither (settings, None) is passed over."""
    seen: set[int] = set()
    left: list[tuple[str, Any]] = [("", tensors)]
    while left:
        prefix, here = left.pop()
        if not isinstance(here, dict) or id(here) in seen or len(prefix) > _LONGEST_NAME:
            continue
        seen.add(id(here))
        for name, value in here.items():
            if not isinstance(name, str):
                continue
            if isinstance(value, Tensor):
                yield f"{prefix}{name}", value
            else:
                left.append((f"{prefix}{name}.", value))


def _check_version(file: Path, state: Mapping[str, Any], *, legacy: bool) -> None:
    """Before version 2 query, key and value rows had another order; Megatron-Core never wrote those."""
    version = state.get("checkpoint_version", 0.0 if legacy else _OLDEST)
    if not isinstance(version, int | float) or version < _OLDEST:
        raise CheckpointError(
            f"{file}: checkpoint_version={format_value(version)}, whose query, key and value rows are in another "
            "order; let a Megatron-LM of 2021 or later load it and save it again"
        )


def _check_degrees(fields: Fields, *, tp: int, pp: int) -> None:
    for name, found in (("tensor_model_parallel_size", tp), ("pipeline_model_parallel_size", pp)):
        if fields.count(name, found) != found:
            fields.problem(name, f"there are folders of {found} ranks; copy all of the checkpoint")
    if fields.count("expert_model_parallel_size", 1) != 1:
        fields.problem("expert_model_parallel_size", "megalm has no mixture of experts")


def _step(state: Mapping[str, Any]) -> int:
    step = state.get("iteration", 0)
    return step if isinstance(step, int) and not isinstance(step, bool) and 0 <= step < 2**53 else 0


def _notes(state: Mapping[str, Any], model: Model, fields: Fields) -> list[str]:
    notes = [
        f"left out {what}" for name, what in (("optimizer", "the optimizer's state"),) if state.get(name) is not None
    ]
    if "vocab_size" not in fields:
        notes.append(
            f"args.vocab_size is not known: all {model.vocab_size:,} rows of the padded vocabulary are kept as words"
        )
    return notes
