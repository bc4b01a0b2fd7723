"""Full fp32 weights from the flat partitions that DeepSpeed's ZeRO optimizers save, one tensor at a time.

Stages 1 and 2 lay the parameters of a group one after the other and cut the whole into equal runs, one per replica.
Stage 3 cuts every parameter: each replica's run holds its part of the first, then of the second, … Names, shapes and
their order are in the file of the module's states. From ``deepspeed/utils/zero_to_fp32.py`` and the optimizers.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate
from math import prod
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megalm.config.violation import format_value
from megalm.convert.mapping import Shape
from megalm.convert.untrusted.safe_path import safe_path
from megalm.convert.untrusted.safe_pickle import DTYPES, Header, Inert, PickledTensors, load
from megalm.errors import CheckpointError

_OPTIMIZER = re.compile(r"(?:bf16_|fp16_)?zero_pp_rank_(\d{1,5})_mp_rank_(\d{2,4})_optim_states\.pt")
_MODULE = re.compile(r"(?:zero_pp_rank_(\d{1,5})_)?mp_rank_(\d{2,4})_model_states\.pt")
_PARTITIONS = {1: "single_partition_of_fp32_groups", 2: "single_partition_of_fp32_groups", 3: "fp32_flat_groups"}
"""ZeRO stage ▶ under which key an optimizer's file has the fp32 weights."""

_MOST_DIMS = 8
"""Of a parameter: a claimed shape of a million dims would take long to multiply."""


@dataclass(frozen=True)
class RankFiles:
    """The files of one model-parallel rank.

    Attributes:
        module: names and shapes of the parameters, and what the client put beside them.
        optimizers: of each replica, in order; empty: ZeRO was off.
    """

    module: Path
    optimizers: tuple[Path, ...]


def find_files(folder: Path, home: Path) -> list[RankFiles]:
    """The files of every model-parallel rank of a DeepSpeed checkpoint, in order.

    Args:
        folder: where they are.
        home: what the user named, which they must lie in.

    Raises:
        CheckpointError: the folder is none, has files that are not converted or links to elsewhere, or lacks some.
    """
    if not folder.is_dir():
        raise CheckpointError(f"{folder}: no such folder; a DeepSpeed checkpoint is one with a file named latest")
    names = sorted(child.name for child in folder.iterdir())
    if any(re.match(r"layer_\d+", name) for name in names):
        raise CheckpointError(
            f"{folder}: a checkpoint of DeepSpeed's PipelineModule (layer_…-model_states.pt), which is not converted; "
            "save the model without pipeline parallelism"
        )
    if any("expert" in name for name in names):
        raise CheckpointError(f"{folder}: holds files of experts; megalm has no mixture of experts")
    modules = {int(found[2]): folder / found[0] for found in _matches(_MODULE, names) if int(found[1] or 0) == 0}
    optimizers = {(int(found[2]), int(found[1])): folder / found[0] for found in _matches(_OPTIMIZER, names)}
    if not modules:
        raise CheckpointError(
            f"{folder}: holds neither latest nor mp_rank_00_model_states.pt, as DeepSpeed writes them"
        )
    ranks, replicas = len(modules), 1 + max((replica for _, replica in optimizers), default=-1)
    if sorted(modules) != list(range(ranks)):
        raise CheckpointError(f"{folder}: model states of the ranks {sorted(modules)} only; copy all of the checkpoint")
    if len(optimizers) != ranks * replicas:
        raise CheckpointError(
            f"{folder}: {len(optimizers)} files …_optim_states.pt where {ranks} ranks × {replicas} replicas have "
            f"{ranks * replicas}; copy all of the checkpoint"
        )
    missing = [(rank, replica) for rank in range(ranks) for replica in range(replicas)]
    if any(place not in optimizers for place in missing):
        raise CheckpointError(f"{folder}: its …_optim_states.pt are not those of {ranks} ranks × {replicas} replicas")
    return [
        RankFiles(
            safe_path(home, modules[rank]),
            tuple(safe_path(home, optimizers[rank, replica]) for replica in range(replicas)),
        )
        for rank in range(ranks)
    ]


def _matches(pattern: re.Pattern[str], names: Sequence[str]) -> Iterator[re.Match[str]]:
    return (found for name in names if (found := pattern.fullmatch(name)))


class ModuleTensors:
    """The weights of one model-parallel rank where ZeRO was off: as the module has them."""

    def __init__(self, files: RankFiles) -> None:
        self.path = files.module
        self._stored = PickledTensors(files.module, lambda state: _tensors_of(state.get("module")))
        self.headers = self._stored.headers

    def get(self, name: str) -> Tensor:
        """One tensor."""
        return self._stored.get(name)


class ZeroTensors:
    """The fp32 weights of one model-parallel rank, put together from its replicas' partitions.

    Args:
        files: of the rank.
        state: what the module's file holds.

    Raises:
        CheckpointError: the partitions do not hold what the module's file says.
    """

    def __init__(self, files: RankFiles, state: Mapping[str, Any]) -> None:
        self.path = files.module
        self.stage, settings = _optimizer_settings(files)
        groups = _param_shapes(files.module, state)
        key = _PARTITIONS[self.stage]
        self._replicas = [PickledTensors(file, lambda state: _partitions(state, key)) for file in files.optimizers]
        self._check_partitions()
        lengths = [[header.numel for header in replica.headers.values()] for replica in self._replicas]
        if self.stage == 3:
            self._runs = _partitioned_runs(self.path, groups, lengths)
        else:
            self._runs = _flat_runs(self.path, groups, lengths, settings)
        self._frozen = PickledTensors(files.module, lambda state: _tensors_of(state.get("frozen_param_fragments")))
        if self.stage == 3 and self._frozen.headers:
            raise CheckpointError(f"{self.path}: frozen parameters under ZeRO 3 are not converted; unfreeze and save")
        shapes = {name: shape for group in groups for name, shape in group.items()}
        shapes |= {name: header.shape for name, header in self._frozen.headers.items()}
        self._aliases = _shared(state, shapes)
        shapes |= {alias: shapes[name] for alias, name in self._aliases.items()}
        self.headers = {name: Header(shape, torch.float32) for name, shape in shapes.items()}

    def get(self, name: str) -> Tensor:
        """One full tensor."""
        name = self._aliases.get(name, name)
        if name in self._frozen.headers:
            return self._frozen.get(name).float()
        header = self.headers[name]
        pieces = [
            self._replicas[run.replica].get(run.partition)[run.start : run.start + run.length]
            for run in self._runs[name]
        ]
        # A tensor that lies in one partition stays a view of the mapped file.
        return (pieces[0] if len(pieces) == 1 else torch.cat(pieces))[: header.numel].view(header.shape)

    def _check_partitions(self) -> None:
        for replica in self._replicas:
            if list(replica.headers) != list(self._replicas[0].headers):
                raise CheckpointError(
                    f"{replica.path}: {len(replica.headers)} partitions; {self._replicas[0].path.name} has others"
                )
            for name, header in replica.headers.items():
                if header.dtype != torch.float32 or len(header.shape) != 1:
                    raise CheckpointError(
                        f"{replica.path}: partition {name}: {header.dtype} {list(header.shape)}, not a row of float32"
                    )


@dataclass(frozen=True)
class _Run:
    """Some consecutive elements of a replica's partition."""

    replica: int
    partition: str
    start: int
    length: int


_STAGE_NAMES = {"optimizer_states": 1, "gradients": 2, "weights": 3}
"""Members of DeepSpeed's enum, which some versions of Python pickle by name."""


def _optimizer_settings(files: RankFiles) -> tuple[int, Mapping[str, Any]]:
    """The ZeRO stage, and the first replica's file without its tensors."""
    file = files.optimizers[0]
    settings = _optimizer_state(file, load(file))
    stage = settings.get("zero_stage")
    if isinstance(stage, Inert):  # an enum of DeepSpeed's
        stage = stage.args[0] if stage.args else None
        stage = _STAGE_NAMES.get(stage, stage) if isinstance(stage, str) else stage
    if not isinstance(stage, int) or stage not in _PARTITIONS:
        raise CheckpointError(f"{file}: zero_stage={format_value(stage)}; partitions of stages 1, 2 and 3 are read")
    counts = settings.get("partition_count")
    counts = counts if isinstance(counts, list) else [counts]
    if not all(isinstance(count, int) and count == len(files.optimizers) for count in counts):
        raise CheckpointError(
            f"{file}: partition_count={format_value(counts)}, and there are {len(files.optimizers)} files of replicas; "
            "copy all of the checkpoint (partitions of experts are not converted)"
        )
    return stage, {name: settings.get(name) for name in ("param_alignment_paddings",)}


def _optimizer_state(file: Path, state: Any) -> Mapping[str, Any]:
    inner = state.get("optimizer_state_dict") if isinstance(state, dict) else None
    if not isinstance(inner, dict):
        raise CheckpointError(f"{file}: holds no optimizer_state_dict; it is not a file of DeepSpeed's ZeRO")
    return inner


def _partitions(state: Any, key: str) -> dict[str, Tensor]:
    """A replica's flat partitions, by number."""
    inner = state.get("optimizer_state_dict") if isinstance(state, dict) else None
    groups = inner.get(key) if isinstance(inner, dict) else None
    return dict(zip(map(str, range(len(groups))), groups, strict=True)) if isinstance(groups, list) else {}


def _tensors_of(found: Any) -> dict[str, Tensor]:
    if not isinstance(found, dict):
        return {}
    return {
        name: tensor
        for name, tensor in found.items()
        if isinstance(name, str) and isinstance(tensor, Tensor) and tensor.dtype in DTYPES
    }


def _param_shapes(file: Path, state: Mapping[str, Any]) -> list[dict[str, Shape]]:
    """Names and shapes of the parameters of each group, in the order in which they lie in the partitions."""
    groups = state.get("param_shapes")
    valid = isinstance(groups, list) and all(
        isinstance(group, dict) and all(isinstance(name, str) for name in group) for group in groups
    )
    shapes = [shape for group in groups for shape in group.values()] if valid and groups else []
    if not shapes or not all(_is_shape(shape) for shape in shapes):
        raise CheckpointError(f"{file}: param_shapes does not list shapes by name, as DeepSpeed's ZeRO saves them")
    assert groups is not None
    named = [{name: tuple(shape) for name, shape in group.items()} for group in groups]
    if len({name for group in named for name in group}) != len(shapes):
        raise CheckpointError(f"{file}: param_shapes has a name twice")
    return named


def _is_shape(shape: object) -> bool:
    if not isinstance(shape, tuple | list) or len(shape) > _MOST_DIMS:
        return False
    return all(isinstance(n, int) and 0 <= n < 2**48 for n in shape)


def _shared(state: Mapping[str, Any], shapes: Mapping[str, Shape]) -> dict[str, str]:
    """Other names of parameters ▶ those under which they are stored."""
    shared = state.get("shared_params")
    pairs = shared.items() if isinstance(shared, dict) else ()
    return {alias: name for alias, name in pairs if isinstance(alias, str) and name in shapes and alias not in shapes}


def _flat_runs(
    file: Path, groups: list[dict[str, Shape]], lengths: list[list[int]], settings: Mapping[str, Any]
) -> dict[str, list[_Run]]:
    """Stages 1 and 2: where each parameter lies in a group's partitions, one behind the other."""
    if len(groups) != len(lengths[0]):
        raise CheckpointError(f"{file}: param_shapes has {len(groups)} groups, the partitions have {len(lengths[0])}")
    runs: dict[str, list[_Run]] = {}
    for number, shapes in enumerate(groups):
        sizes = [replica[number] for replica in lengths]
        gaps = _gaps(file, settings, number, len(shapes))
        offset = 0
        for (name, shape), gap in zip(shapes.items(), gaps, strict=True):
            runs[name] = list(_cut(sizes, str(number), offset, prod(shape)))
            offset += prod(shape) + gap
        _check_length(file, number, offset, sum(sizes), alignment=2 * len(sizes))
    return runs


def _gaps(file: Path, settings: Mapping[str, Any], number: int, count: int) -> Sequence[int]:
    """Elements between a group's parameters, which some versions align."""
    gaps = settings["param_alignment_paddings"]
    if gaps is None:
        return (0,) * count
    group = gaps[number] if isinstance(gaps, list) and number < len(gaps) else None
    if not isinstance(group, list) or len(group) != count or not all(isinstance(g, int) and g >= 0 for g in group):
        raise CheckpointError(f"{file}: param_alignment_paddings of group {number} does not fit its {count} parameters")
    return group


def _check_length(file: Path, number: int, needed: int, present: int, *, alignment: int) -> None:
    """The parameters fill the partitions, up to what rounds them to a multiple of the alignment."""
    if -(-needed // alignment) != -(-present // alignment) or needed > present:
        raise CheckpointError(
            f"{file}: the parameters of group {number} have {needed:,} elements, the partitions {present:,}; a file is "
            "damaged, or from another checkpoint"
        )


def _cut(sizes: Sequence[int], partition: str, start: int, length: int) -> Iterator[_Run]:
    """The runs of a group's partitions that hold ``length`` elements from ``start`` on."""
    begins = accumulate(sizes, initial=0)
    for replica, (begin, size) in enumerate(zip(begins, sizes, strict=False)):
        first, last = max(start, begin), min(start + length, begin + size)
        if first < last:
            yield _Run(replica, partition, first - begin, last - first)


def _partitioned_runs(file: Path, groups: list[dict[str, Shape]], lengths: list[list[int]]) -> dict[str, list[_Run]]:
    """Stage 3: where each replica's part of each parameter lies; the last parts are padded to the same length."""
    replicas = len(lengths)
    if any(replica != lengths[0] for replica in lengths):
        raise CheckpointError(f"{file}: the replicas' partitions are of unequal lengths; a file is damaged")
    runs: dict[str, list[_Run]] = {}
    offset = 0
    for shapes in groups:
        for name, shape in shapes.items():
            part = -(-prod(shape) // replicas)
            runs[name] = [run for replica in range(replicas) for run in _cut_groups(lengths[0], replica, offset, part)]
            offset += part
    _check_length(file, 0, offset, sum(lengths[0]), alignment=2 * replicas)
    return runs


def _cut_groups(sizes: Sequence[int], replica: int, start: int, length: int) -> Iterator[_Run]:
    """The runs of one replica's partitions, taken as one, that hold ``length`` elements from ``start`` on."""
    for number, run in ((run.replica, run) for run in _cut(sizes, "", start, length)):
        yield _Run(replica, str(number), run.start, run.length)
