"""Reads DeepSpeed's checkpoints: ``global_step100/mp_rank_00_model_states.pt`` and ZeRO's partitions beside it.

They hold weights under the names of the trained module, but not its architecture. Megatron-DeepSpeed adds its ``args``;
for other models the architecture is read from a Hugging Face ``config.json`` or a megalm ``config.yaml``, beside the
files or in the folder above.
"""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Collection, Mapping
from pathlib import Path
from threading import Lock
from types import MappingProxyType
from typing import Any

import torch
import yaml
from torch import Tensor

from megalm.config.parse import config_from_dict, config_to_dict
from megalm.config.schema import Model
from megalm.config.violation import spoken_list
from megalm.convert.checks import check_architecture, check_size, config_around, same_values, some_of
from megalm.convert.deepspeed.zero import ModuleTensors, RankFiles, ZeroTensors, find_files
from megalm.convert.huggingface.names import read_architecture, sort_names
from megalm.convert.huggingface.token_ids import TokenIds
from megalm.convert.mapping import Rule, missing_and_extra
from megalm.convert.megatron.args import model_from_args
from megalm.convert.megatron.weights import MegatronWeights, RankTensors, Tensors
from megalm.convert.untrusted.json_fields import Fields
from megalm.convert.untrusted.safe_path import safe_file
from megalm.convert.untrusted.safe_pickle import Header, load
from megalm.convert.weights import SourceInfo, WeightSource, full_shapes
from megalm.errors import CheckpointError, ConfigError

LATEST_FILE = "latest"
HF_CONFIG, MEGALM_CONFIG = "config.json", "config.yaml"

_MEGALM_NAME = "embedding.weight"
_WRAPPER = "module."


class DeepSpeedSource(WeightSource):
    """A DeepSpeed checkpoint, opened for reading.

    Args:
        path: the folder with the file ``latest``, or one of the folders that it can name.

    Raises:
        CheckpointError: see :class:`WeightSource`.
    """

    def __init__(self, path: Path) -> None:
        folder = _tag_folder(path)
        files = find_files(folder, path)
        states = [_module_state(rank) for rank in files]
        ranks = [
            ZeroTensors(rank, state) if rank.optimizers else ModuleTensors(rank)
            for rank, state in zip(files, states, strict=True)
        ]
        args = states[0].get("args")
        self._weights: MegatronWeights | _NamedWeights
        if isinstance(args, Namespace):
            self._weights = _megatron_weights(path, files[0].module, args, [RankTensors(_unwrapped(r)) for r in ranks])
        else:
            self._weights = _named_weights(path, folder, ranks)
        self.info = SourceInfo(
            format="deepspeed",
            path=path,
            model=self._weights.model,
            dtype=self._weights.dtype,
            step=_count(states[0].get("global_steps")),
            tokenizer=path,
            notes=(*_notes(ranks[0]), *self._weights.notes),
            architecture=self._weights.architecture if isinstance(self._weights, _NamedWeights) else "",
            ids=TokenIds.of_folder(path, safe_file),
        )

    def read(self, name: str) -> Tensor:
        """See the base class."""
        return self._weights.read(name)


def open_source(path: Path) -> WeightSource:
    """A DeepSpeed checkpoint, opened for reading."""
    return DeepSpeedSource(path)


class _Renamed:
    """Renamed tensors.

    Args:
        stored: the tensors.
        names: new ones ▶ those that they have.
    """

    def __init__(self, stored: Tensors, names: Mapping[str, str]) -> None:
        self.path = stored.path
        self._stored = stored
        self._names = names
        self.headers: dict[str, Header] = {ours: stored.headers[name] for ours, name in names.items()}

    def get(self, name: str) -> Tensor:
        """One tensor."""
        return self._stored.get(self._names[name])


def _unwrapped(stored: Tensors) -> _Renamed:
    """Without the ``module.`` that wrappers put before every name."""
    wrapped = all(name.startswith(_WRAPPER) for name in stored.headers)
    return _Renamed(stored, {name.removeprefix(_WRAPPER) if wrapped else name: name for name in stored.headers})


class _NamedWeights:
    """Whole tensors under the names of rules.

    Args:
        stored: the tensors.
        model: the architecture.
        rules: where each of its tensors is.
        ignored: names that may be there beside them.
        duplicates: names of tensors that are there twice and must be equal ▶ the second's.
        notes: what a user should know.
        architecture: the ``model_type`` of the library that the names are of; empty: of none.

    Raises:
        CheckpointError: a tensor is missing, unknown, or of another shape.
    """

    def __init__(
        self,
        stored: _Renamed,
        model: Model,
        rules: list[Rule],
        *,
        ignored: Collection[str] = (),
        duplicates: Mapping[str, str] = MappingProxyType({}),
        notes: tuple[str, ...] = (),
        architecture: str = "",
    ) -> None:
        self.model, self.notes, self.architecture = model, notes, architecture
        self._stored = stored
        self._duplicates = duplicates
        self._is_equal: dict[str, bool] = {}
        self._lock = Lock()
        self._rules = {rule.name: rule for rule in rules}
        present = {name: header.shape for name, header in stored.headers.items()}
        problems = missing_and_extra(rules, full_shapes(model), present, ignored=ignored)
        dtypes = {stored.headers[name].dtype for rule in rules for name in rule.foreign if name in stored.headers}
        if not problems and len(dtypes) > 1:
            problems = [f"weights of dtypes {sorted(map(str, dtypes))}; convert models of one dtype"]
        if problems:
            raise CheckpointError(some_of(problems, f"{stored.path}: "))
        self.dtype: torch.dtype = dtypes.pop()

    def read(self, name: str) -> Tensor:
        """One full tensor by megalm's name, contiguous."""
        rule = self._rules[name]
        for foreign in rule.foreign:
            self._check_duplicate(foreign)
        return rule.form.to_megalm([self._stored.get(foreign) for foreign in rule.foreign]).contiguous()

    def _check_duplicate(self, foreign: str) -> None:
        """A tensor that is there twice must be the same, which is found out once."""
        other = self._duplicates.get(foreign)
        if other is None:
            return
        with self._lock:
            if foreign not in self._is_equal:
                self._is_equal[foreign] = same_values(self._stored.get(other), self._stored.get(foreign))
        if not self._is_equal[foreign]:
            raise CheckpointError(
                f"{self._stored.path}: {other} differs from {foreign}, and the config says that they are one tensor; "
                "where they are meant to be two, set tie_word_embeddings to false in it"
            )


def _tag_folder(path: Path) -> Path:
    """The folder that the file ``latest`` names, or the one that was named."""
    latest = safe_file(path, LATEST_FILE)
    try:
        if not latest.is_file():
            return path
        tag = latest.read_text(encoding="utf-8").strip()
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{latest}: cannot be read: {error}") from None
    if not tag or Path(tag).name != tag or tag in (".", ".."):
        raise CheckpointError(f"{latest}: names {tag[:80]!r}; the name of a folder beside it would be right")
    if not (path / tag).is_dir():
        raise CheckpointError(f"{path / tag}: no such folder, and {latest} names it")
    return path / tag


def _module_state(rank: RankFiles) -> dict[str, Any]:
    state = load(rank.module)
    if not isinstance(state, dict) or "module" not in state:
        raise CheckpointError(f"{rank.module}: holds no module; it is not a file of DeepSpeed's")
    # Without the tensors: those are mapped when they are read.
    with_tensors = ("module", "optimizer", "frozen_param_fragments")
    return {name: value for name, value in state.items() if name not in with_tensors}


def _megatron_weights(path: Path, file: Path, args: Namespace, ranks: list[RankTensors]) -> MegatronWeights:
    """Megatron-DeepSpeed's: model-parallel ranks are tensor-parallel ones."""
    fields = Fields(file, {name: value for name, value in vars(args).items() if isinstance(name, str)}, place="args.")
    legacy = any("language_model" in ranks[0].as_stored(name) for name in ranks[0].headers)
    model = model_from_args(fields, legacy=legacy)
    fields.check()
    check_architecture(file, model)
    return MegatronWeights(path, model, [ranks])


def _named_weights(path: Path, folder: Path, ranks: list[ZeroTensors | ModuleTensors]) -> _NamedWeights:
    """Hugging Face's or megalm's names, by a config beside the files."""
    stored = _unwrapped(ranks[0])
    if len(ranks) > 1:
        raise CheckpointError(
            f"{folder}: {len(ranks)} model-parallel ranks, and no args that say how they share tensors; only "
            "Megatron-DeepSpeed's are read"
        )
    is_megalm = _MEGALM_NAME in stored.headers
    wanted = MEGALM_CONFIG if is_megalm else HF_CONFIG
    places = [safe_file(place, wanted) for place in dict.fromkeys((folder, path, folder.parent))]
    config = next((place for place in places if place.is_file()), None)
    if config is None:
        raise CheckpointError(
            f"{folder}: DeepSpeed records no architecture; put the {wanted} of the model "
            f"({'megalm' if is_megalm else 'Hugging Face'}) beside the files or into the folder above. The first "
            f"tensors are named {spoken_list(list(stored.headers)[:3], 'and')}"
        )
    if not is_megalm:
        return _hf_weights(stored, config)
    model = _megalm_model(config)
    _check_size(config, model, stored)
    return _NamedWeights(stored, model, [Rule(name, (name,)) for name in full_shapes(model)])


def _check_size(config: Path, model: Model, stored: Tensors) -> None:
    check_size(config, model, sum(header.numel for header in stored.headers.values()), len(stored.headers))


def _hf_weights(stored: _Renamed, config: Path) -> _NamedWeights:
    architecture = read_architecture(config)
    family, model = architecture.family, architecture.model
    _check_size(config, model, stored)
    shapes = {name: header.shape for name, header in stored.headers.items()}
    names = sort_names(stored.path, family, model, shapes)
    renamed = _Renamed(stored, names.stored)
    return _NamedWeights(
        renamed,
        model,
        family.rules(model),
        ignored=names.ignored,
        duplicates=names.duplicates,
        notes=(*architecture.notes, *names.notes),
        architecture=family.model_type,
    )


def _megalm_model(config: Path) -> Model:
    """The model's section of a run's config; the rest need not be there."""
    try:
        text = yaml.safe_load(config.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError, yaml.YAMLError) as error:
        raise CheckpointError(f"{config}: cannot be read: {error}") from None
    section = text.get("model") if isinstance(text, Mapping) else None
    if not isinstance(section, Mapping):
        raise CheckpointError(f"{config}: has no section model, as megalm's configs have")
    around = config_to_dict(config_around(Model(num_layers=1, hidden_size=1, num_heads=1, sequence_length=1)))
    try:
        model = config_from_dict(around | {"model": section}).model
    except ConfigError as error:
        raise CheckpointError("\n".join(f"{config}: {line}" for line in error.lines)) from None
    if model.vocab_size is None:
        raise CheckpointError(f"{config}: model.vocab_size=null: write the number of words; it is not taken from data")
    check_architecture(config, model)
    return model


def _count(value: object) -> int:
    return value if isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 2**53 else 0


def _notes(rank: ZeroTensors | ModuleTensors) -> tuple[str, ...]:
    if isinstance(rank, ModuleTensors):
        return ("no ZeRO partitions: the weights are the module's own, in its dtype",)
    return (f"fp32 weights of ZeRO stage {rank.stage}; left out the optimizer's moments",)
