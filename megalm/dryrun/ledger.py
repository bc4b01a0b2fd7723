"""Bytes of tensors that are alive, by what they are: a count of storages, as torch's caching allocator gives them out.

Not counted: what the allocator holds without giving it out (fragmentation), the CUDA context (about half a GiB), and
NCCL's own buffers.
"""

from __future__ import annotations

import weakref
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field

from torch import Tensor

PARAMETERS, GRADIENTS, OPTIMIZER = "parameters", "gradients", "optimizer"
BATCH, TRANSFERS, ACTIVATIONS = "batch", "transfers", "activations"
KINDS = (PARAMETERS, GRADIENTS, OPTIMIZER, BATCH, TRANSFERS, ACTIVATIONS)
"""What memory is used for. Transfers are buffers between pipeline stages, until the work that takes them begins.
Activations are all that a step allocates and that is nothing else: what is gathered or computed for a moment, too."""

_ALIGNMENT = 512
"""Bytes to which CUDA's allocator rounds each block (``kMinBlockSize``)."""


@dataclass(frozen=True)
class Usage:
    """Bytes by kind at one moment."""

    by_kind: dict[str, int] = field(default_factory=dict)

    @property
    def total(self) -> int:
        """Bytes of all kinds."""
        return sum(self.by_kind.values())

    def plus(self, other: Usage) -> Usage:
        """The sum of two, kind by kind."""
        kinds = {**self.by_kind, **other.by_kind}
        return Usage({kind: self.by_kind.get(kind, 0) + other.by_kind.get(kind, 0) for kind in kinds})

    def minus(self, other: Usage) -> Usage:
        """The difference of two, kind by kind."""
        return self.plus(Usage({kind: -nbytes for kind, nbytes in other.by_kind.items()}))


class Ledger:
    """Storages that are alive, and the highest total since :meth:`restart_peak`.

    Args:
        default_kind: of a storage that nobody has named when it is first seen.
    """

    def __init__(self, default_kind: str = PARAMETERS) -> None:
        self.default_kind = default_kind
        self._live: Counter[str] = Counter()
        self._total = 0
        self._peak_total = 0
        self._peak: dict[str, int] = {}
        # By identity: a storage's key is valid as long as it lives, and its finaliser takes it out.
        self._entries: dict[int, tuple[str, int]] = {}

    def note(self, tensor: Tensor, kind: str | None = None) -> None:
        """Count a tensor's storage if it is new; of one that is known change the kind, where one is given."""
        if tensor.device.type == "meta":  # DeepSpeed makes some, to see shapes
            return
        storage = tensor.untyped_storage()
        key = storage._cdata
        known = self._entries.get(key)
        if known is None:
            self._add(key, kind or self.default_kind, self.rounded(storage.nbytes()))
            weakref.finalize(storage, self._remove, key).atexit = False
        elif kind is not None and known[0] != kind:
            self._live[known[0]] -= known[1]
            self._live[kind] += known[1]
            self._entries[key] = kind, known[1]

    def note_all(self, tensors: Iterable[Tensor], kind: str) -> None:
        """:meth:`note` of each."""
        for tensor in tensors:
            self.note(tensor, kind)

    def knows(self, tensor: Tensor) -> bool:
        """Whether a tensor's storage is counted already: then it is a view of something, or changed in place."""
        return tensor.untyped_storage()._cdata in self._entries

    @property
    def usage(self) -> Usage:
        """What is alive now."""
        return Usage({kind: nbytes for kind, nbytes in self._live.items() if nbytes})

    @property
    def peak(self) -> Usage:
        """What was alive at the highest total since :meth:`restart_peak`."""
        return Usage(dict(self._peak))

    def restart_peak(self) -> None:
        """Forget the peak: the highest total is now's."""
        self._peak_total, self._peak = self._total, {kind: nbytes for kind, nbytes in self._live.items() if nbytes}

    @staticmethod
    def rounded(nbytes: int) -> int:
        """What the allocator gives for so many bytes."""
        return -(-nbytes // _ALIGNMENT) * _ALIGNMENT

    def _add(self, key: int, kind: str, nbytes: int) -> None:
        self._entries[key] = kind, nbytes
        self._live[kind] += nbytes
        self._total += nbytes
        if self._total > self._peak_total:
            self.restart_peak()

    def _remove(self, key: int) -> None:
        kind, nbytes = self._entries.pop(key)
        self._live[kind] -= nbytes
        self._total -= nbytes
