"""Opens the pickles that ``torch.save`` writes without running anything in them, and reads their tensors by mapping.

``torch.load`` with ``weights_only=True`` knows tensors and plain containers. What Megatron-LM and DeepSpeed put beside
them (enums, settings, scalers, random states) is on a list of names here, each read as an :class:`Inert`: it keeps what
the file says and does nothing. Any other name is refused, before torch sees the pickle: see ``pickle_scan``.
"""

from __future__ import annotations

import types
from argparse import Namespace
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path
from threading import Lock
from typing import Any, Self

import torch
from torch import Tensor

from megalm.convert.untrusted.pickle_scan import ATTRIBUTE_OF, refuse_names, scan
from megalm.convert.untrusted.torch_archive import read_archive
from megalm.core.dtype import DTYPE_NAMES
from megalm.errors import CheckpointError

DTYPES = tuple(DTYPE_NAMES)
"""Dtypes that weights may have."""

_FORGET_BYTES = 1 << 26
"""Bytes read of a file after which its mapping is released, so that pages that were read do not pile up."""

_ZIP = b"PK"
"""Begins a file of ``torch.save``."""
_LARGEST_BARE_PICKLE = 1 << 22
"""Bytes of a bare pickle that are looked at."""

_LOCK = Lock()
"""The list of allowed names is torch's, and one for all threads."""

_INERT_NAMES = {
    "_io": ("BytesIO",),
    "deepspeed.runtime.config": ("DtypeEnum",),
    "deepspeed.runtime.fp16.loss_scaler": (
        "DynamicLossScaler",
        "LossScaleConfig",
        "LossScaleProfile",
        "LossScaler",
        "LossScalerBase",
    ),
    "deepspeed.runtime.zero.config": ("DeepSpeedZeroConfig", "ZeroStageEnum"),
    "deepspeed.runtime.zero.offload_config": (
        "DeepSpeedZeroOffloadOptimizerConfig",
        "DeepSpeedZeroOffloadParamConfig",
        "OffloadDeviceEnum",
    ),
    "deepspeed.utils.tensor_fragment": ("fragment_address", "tensor_fragment"),
    "fp16.loss_scaler": ("DynamicLossScaler", "LossScaler"),
    "megatron.core.enums": ("Fp4Recipe", "Fp8Recipe", "ModelType"),
    "megatron.core.optimizer": ("OptimizerConfig",),
    "megatron.core.optimizer.optimizer_config": ("OptimizerConfig",),
    "megatron.core.pipeline_parallel.pipeline_parallel_layer_layout": ("PipelineParallelLayerLayout",),
    "megatron.core.rerun_state_machine": ("RerunDiagnostic", "RerunMode", "RerunState", "RerunValidationStatus"),
    "megatron.core.transformer.enums": (
        "AttnBackend",
        "AttnMaskType",
        "AttnType",
        "CudaGraphScope",
        "LayerType",
        "ModelType",
    ),
    "megatron.enums": ("AttnMaskType", "AttnType", "LayerType", "ModelType", "PositionEmbeddingType"),
    "megatron.fp16.loss_scaler": ("DynamicLossScaler", "LossScaler"),
    "megatron.legacy.model.enums": ("AttnMaskType", "AttnType", "LayerType", "ModelType"),
    "megatron.model.enums": ("AttnMaskType", "AttnType", "LayerType", "ModelType", "PositionEmbeddingType"),
    "numpy": ("dtype", "ndarray"),
    "numpy._core.multiarray": ("_reconstruct", "scalar"),
    "numpy.core.multiarray": ("_reconstruct", "scalar"),
    "numpy.dtypes": ("Float32DType", "Float64DType", "Int32DType", "Int64DType", "UInt32DType"),
    "pathlib": ("Path", "PosixPath", "PurePosixPath"),
    "pathlib._local": ("Path", "PosixPath", "PurePosixPath"),
    "signal": ("Signals",),
}
"""Modules ▶ what of them an :class:`Inert` stands for."""

_INERT_FULL_NAMES = frozenset(f"{module}.{name}" for module, names in _INERT_NAMES.items() for name in names)


class Inert:
    """Placeholder for an object of a class that is not loaded; keeps its arguments and state from the file."""

    args: tuple[object, ...]
    state: object

    def __new__(cls, *args: object) -> Self:
        """What a pickle calls, whether the class is made or called."""
        made = super().__new__(cls)
        made.args, made.state = args, None
        return made

    def __setstate__(self, state: object) -> None:
        self.state = state


def _member(kind: object, name: str) -> Inert:  # noqa: ARG001 - the class is not loaded
    """Stands for ``getattr`` of a class that is not loaded, which the scan has made sure of."""
    return Inert(name)


def load(path: Path) -> Any:
    """What a file of ``torch.save`` holds, its tensors as views of the mapped file.

    Raises:
        CheckpointError: no such file, or not one of ``torch.save``'s of this decade; damaged; its pickle claims other
            lengths than its tensors have; or it names something that is not a tensor, a plain container, or on the
            list above.
    """
    try:
        archive = read_archive(path)
    except CheckpointError:
        _refuse_bare_pickle(path)
        raise
    scan(path, archive, _INERT_FULL_NAMES)
    allowed: list[Any] = [Namespace, types.SimpleNamespace, *((Inert, name) for name in _INERT_FULL_NAMES)]
    allowed += [(_member, name) for name in ATTRIBUTE_OF]
    try:
        with _LOCK, torch.serialization.safe_globals(allowed):
            return torch.load(path, map_location="cpu", mmap=True, weights_only=True)
    except Exception as error:  # a damaged pickle can fail in any way
        raise CheckpointError(f"{path}: damaged, or made to run code: {_first_line(error)}") from None


def _refuse_bare_pickle(path: Path) -> None:
    """Name what a pickle without an archive would import: megalm reads none, but code in one is worth a word."""
    if not path.is_file():
        return
    with path.open("rb") as file:
        data = file.read(_LARGEST_BARE_PICKLE)
    if not data.startswith(_ZIP):
        refuse_names(path, data, _INERT_FULL_NAMES, "a bare pickle, which torch.save has not written since 1.6")


def _first_line(error: object) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:200]


@dataclass(frozen=True)
class Header:
    """What is known of a tensor before it is read."""

    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def numel(self) -> int:
        """Elements."""
        return prod(self.shape)


class PickledTensors:
    """Some of the tensors of one file, by name, mapped and not held.

    Args:
        path: the file.
        pick: finds the tensors in what the file holds; called anew whenever the file is mapped anew.

    Raises:
        CheckpointError: see :func:`load`; or something picked is no plain tensor.
    """

    def __init__(self, path: Path, pick: Callable[[Any], Mapping[str, Any]]) -> None:
        self.path = path
        self._pick = pick
        self._lock = Lock()
        self._read_bytes = 0
        self._mapped: dict[str, Tensor] | None = self._map()
        self.headers = {name: Header(tuple(t.shape), t.dtype) for name, t in self._mapped.items()}

    def get(self, name: str) -> Tensor:
        """A tensor, as a view of the mapped file."""
        with self._lock:
            if self._mapped is None:
                self._mapped = self._map()
                self._read_bytes = 0
            tensor = self._mapped.get(name)
            self._read_bytes += 0 if tensor is None else tensor.nbytes
            if self._read_bytes > _FORGET_BYTES:
                self._mapped = None  # the mapping goes with the last tensor that a caller still holds
        if tensor is None or Header(tuple(tensor.shape), tensor.dtype) != self.headers[name]:
            raise CheckpointError(f"{self.path}: {name}: changed while it was being converted")
        return tensor

    def _map(self) -> dict[str, Tensor]:
        return {name: _plain(self.path, name, value) for name, value in self._pick(load(self.path)).items()}


def _plain(path: Path, name: str, value: object) -> Tensor:
    """A tensor of numbers that are all in the file; subclasses, sparse ones and made-up expansions are none."""
    if not isinstance(value, Tensor) or type(value) not in (Tensor, torch.nn.Parameter):
        raise CheckpointError(f"{path}: {name}: a {type(value).__name__}, not a tensor")
    if value.layout != torch.strided or value.device.type != "cpu" or value.is_quantized:
        raise CheckpointError(f"{path}: {name}: a {value.layout} tensor on {value.device}, not a plain one")
    tensor = value.detach()
    if tensor.untyped_storage().nbytes() < tensor.nbytes:
        raise CheckpointError(f"{path}: {name}: {tensor.nbytes:,} bytes by its shape, fewer in the file")
    return tensor
