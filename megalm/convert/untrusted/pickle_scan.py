"""Walks through a pickle of ``torch.save`` without executing it, and refuses what torch's own check would let through.

Torch's own list of harmless names has some that fill memory from a few bytes (``bytearray(1 << 33)``), and torch takes
the length of a storage from the pickle, not from the file. Both are seen here first: names outside a list, calls of
what is only ever named, and storages that are not as long as their part of the archive.
"""

from __future__ import annotations

import io
import pickletools
from collections.abc import Callable, Collection
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import torch

from megalm.config.violation import format_value, spoken_list
from megalm.convert.untrusted.torch_archive import Archive
from megalm.errors import CheckpointError

_REBUILDS = frozenset(
    f"torch._utils.{name}"
    for name in (
        "_rebuild_parameter",
        "_rebuild_parameter_with_state",
        "_rebuild_tensor",
        "_rebuild_tensor_v2",
        "_rebuild_tensor_v3",
    )
)
_WITH_ATTRIBUTES = "torch._tensor._rebuild_from_type_v2"
_ENCODE = "_codecs.encode"
ATTRIBUTE_OF = ("__builtin__.getattr", "builtins.getattr")
"""How early versions of Python 3.11 pickle the member of an enum: by its class and name, not by its value."""
_CALLED = _REBUILDS | {
    *ATTRIBUTE_OF,
    _WITH_ATTRIBUTES,
    _ENCODE,
    "argparse.Namespace",
    "builtins.complex",
    "builtins.set",
    "collections.OrderedDict",
    "torch.Size",
    "torch.device",
    "types.SimpleNamespace",
}
"""What a pickle may call, and torch or Python makes of it no more than its arguments hold."""

_ITEM_BYTES = {
    "torch.BFloat16Storage": 2,
    "torch.BoolStorage": 1,
    "torch.ByteStorage": 1,
    "torch.CharStorage": 1,
    "torch.ComplexDoubleStorage": 16,
    "torch.ComplexFloatStorage": 8,
    "torch.DoubleStorage": 8,
    "torch.FloatStorage": 4,
    "torch.HalfStorage": 2,
    "torch.IntStorage": 4,
    "torch.LongStorage": 8,
    "torch.ShortStorage": 2,
    "torch.storage.UntypedStorage": 1,
}
"""Kinds of storages ▶ bytes of an element."""

_DTYPES = frozenset(str(value) for value in vars(torch).values() if isinstance(value, torch.dtype))
_NAMED = frozenset(_ITEM_BYTES) | _DTYPES | {"torch.Tensor", "torch.nn.parameter.Parameter"}
"""What a pickle may name beside that, and not call."""

_PICKLES_OF_A_FILE = 5
"""In a file of a torch before 1.6: a number, a version, the system, the object, and keys; then bytes of tensors."""

_MOST_NAMES = 4
"""Names of a refused pickle that its message has."""

_HEAVIEST_TUPLE = 1 << 16
"""Items of a tuple and of the tuples in it, each as often as it is there: hashing one takes as many steps."""


@dataclass(frozen=True)
class _Name:
    """A class or function that the pickle names."""

    text: str


@dataclass(frozen=True, eq=False)
class _Tuple:
    items: tuple[object, ...]
    weight: int


class _Other:
    """Anything that cannot be called, and is no key or length of a storage."""


_OTHER, _MARK = _Other(), object()

_CONSTANTS = {"NONE": None, "NEWTRUE": True, "NEWFALSE": False}
_WITH_VALUE = {"BININT", "BININT1", "BININT2", "BINFLOAT", "BINUNICODE", "SHORT_BINSTRING", "LONG1"}
_EMPTY = {"EMPTY_LIST", "EMPTY_DICT", "EMPTY_SET"}
_TUPLES = {"EMPTY_TUPLE": 0, "TUPLE1": 1, "TUPLE2": 2, "TUPLE3": 3}
_POPPED = {"APPEND": 1, "SETITEM": 2, "BUILD": 1}
"""Operations that change the object below what they take from the stack ▶ how much they take."""


def scan(path: Path, archive: Archive, inert: Collection[str]) -> None:
    """Refuse a pickle that names, calls or claims what it should not.

    Args:
        path: of the file, for messages.
        archive: what was read of it.
        inert: full names that stand for objects that do nothing; they may be called with anything.

    Raises:
        CheckpointError: naming what is wrong.
    """
    machine = _Machine(path, archive.storages, inert)
    try:
        for operation, value, _ in pickletools.genops(archive.pickle):
            machine.step(operation.name, value)
    except (ValueError, IndexError, KeyError, TypeError) as error:
        text = (str(error).splitlines() or [""])[0][:200]
        raise CheckpointError(f"{path}: damaged: its pickle breaks off or makes no sense ({text})") from None
    except _UnknownOperation as operation:
        text = f"its pickle has the operation {operation}, which torch.save's have not"
        refuse_names(path, archive.pickle, inert, text)
        raise CheckpointError(f"{path}: damaged: {text}") from None


def refuse_names(path: Path, data: bytes, inert: Collection[str], why: str) -> None:
    """Refuse pickles that are of no kind that megalm reads, where they name what megalm would not import.

    Args:
        path: of the file, for messages.
        data: pickles, one after the other.
        inert: see :func:`scan`.
        why: what is wrong with them beside that, in words.

    Raises:
        CheckpointError: with the first of the names.
    """
    known = (_CALLED | _NAMED | set(inert)) - set(ATTRIBUTE_OF)  # nobody has looked at what it is called with
    names = [name for name in _names(data) if name not in known]
    if names:
        raise CheckpointError(_refusal(path, f"{spoken_list(names[:_MOST_NAMES], 'and')} ({why})")) from None


class _UnknownOperation(Exception):  # noqa: N818 - it never leaves this file
    """A pickle has an operation that torch's own reader does not know; its text is the operation's name."""


def _names(data: bytes) -> list[str]:
    """Classes and functions that pickles of any protocol name, in their order; they are not executed."""
    found: dict[str, None] = {}
    stream = io.BytesIO(data)
    with suppress(ValueError, IndexError, KeyError, TypeError):  # nobody who executes them gets beyond a break
        for _ in range(_PICKLES_OF_A_FILE):
            memo: dict[object, object] = {}
            pushed: list[object] = []
            for operation, value, _ in pickletools.genops(stream):
                if operation.name in ("GLOBAL", "INST"):
                    found[str(value).replace(" ", ".", 1)] = None
                elif operation.name == "STACK_GLOBAL":
                    found[".".join(map(str, pushed[-2:]))] = None
                if operation.name == "MEMOIZE":
                    memo[len(memo)] = pushed[-1]
                elif operation.name in ("PUT", "BINPUT", "LONG_BINPUT"):
                    memo[value] = pushed[-1]
                elif operation.name in ("GET", "BINGET", "LONG_BINGET"):
                    pushed.append(memo[value])
                else:
                    pushed.append(value)
    return list(found)


class _Machine:
    """The stack of a pickle, as far as it decides what is called with what."""

    def __init__(self, path: Path, storages: dict[str, int], inert: Collection[str]) -> None:
        self._path, self._storages, self._inert = path, storages, inert
        self._called = _CALLED | set(inert)
        self._stack: list[object] = []
        self._memo: dict[int, object] = {}

    def step(self, name: str, value: object) -> None:
        """One operation; those that torch's own reader does not know are refused."""
        if name in _WITH_VALUE:
            self._stack.append(value)
        elif name in _CONSTANTS:
            self._stack.append(_CONSTANTS[name])
        elif name in _EMPTY:
            self._stack.append(_OTHER)
        elif name in _TUPLES:
            self._stack.append(self._tuple(self._pop(_TUPLES[name])))
        elif name in _POPPED:
            self._pop(_POPPED[name])
        elif handler := self._HANDLERS.get(name):
            handler(self, value)
        else:
            raise _UnknownOperation(name)

    def _pop(self, count: int) -> list[object]:
        if count > len(self._stack):
            raise IndexError("less on the stack than is taken")
        found = self._stack[len(self._stack) - count :]
        del self._stack[len(self._stack) - count :]
        return found

    def _pop_mark(self) -> list[object]:
        place = len(self._stack) - 1
        while self._stack[place] is not _MARK:
            place -= 1
            if place < 0:
                raise IndexError("no mark on the stack")
        return self._pop(len(self._stack) - place)[1:]

    def _tuple(self, items: list[object]) -> _Tuple:
        weight = 1 + sum(item.weight if isinstance(item, _Tuple) else 1 for item in items)
        if weight > _HEAVIEST_TUPLE:
            raise CheckpointError(f"{self._path}: holds tuples of more than {_HEAVIEST_TUPLE:,} items, one in another")
        return _Tuple(tuple(items), weight)

    def _mark(self, _: object) -> None:
        self._stack.append(_MARK)

    def _marked_tuple(self, _: object) -> None:
        self._stack.append(self._tuple(self._pop_mark()))

    def _marked_items(self, _: object) -> None:
        self._pop_mark()

    def _put(self, place: object) -> None:
        assert isinstance(place, int)
        self._memo[place] = self._stack[-1]

    def _get(self, place: object) -> None:
        assert isinstance(place, int)
        self._stack.append(self._memo[place])

    def _nothing(self, _: object) -> None:
        """The pickle's first and last operation."""

    def _name(self, value: object) -> None:
        text = str(value).replace(" ", ".", 1)
        if text not in self._called and text not in _NAMED:
            raise CheckpointError(_refusal(self._path, text))
        self._stack.append(_Name(text))

    def _call(self, _: object) -> None:
        function, arguments = self._pop(2)
        if not isinstance(function, _Name) or not isinstance(arguments, _Tuple):
            raise CheckpointError(f"{self._path}: damaged: its pickle calls what is no function")
        if function.text not in self._called or not self._is_harmless(function.text, arguments.items):
            raise CheckpointError(_refusal(self._path, f"a call of {function.text}"))
        self._stack.append(_OTHER)

    def _is_harmless(self, function: str, arguments: tuple[object, ...]) -> bool:
        """Some are as harmless as their arguments: codecs can lengthen, and others reach for what they are given."""
        if function == _ENCODE:
            return len(arguments) == 2 and arguments[1] in ("latin1", "latin-1")
        first = arguments[0].text if arguments and isinstance(arguments[0], _Name) else None
        if function == _WITH_ATTRIBUTES:
            return first in _REBUILDS
        if function in ATTRIBUTE_OF:  # of a class that is not loaded, which the reader has a placeholder for
            return len(arguments) == 2 and first in self._inert and isinstance(arguments[1], str)
        return True

    def _storage(self, _: object) -> None:
        """What a tensor's bytes are claimed to be must be what the archive has under that key."""
        (found,) = self._pop(1)
        items = found.items if isinstance(found, _Tuple) and len(found.items) == 5 else (None,) * 5
        tag, kind, key, _location, count = items
        is_count = isinstance(count, int) and not isinstance(count, bool)
        item_bytes = _ITEM_BYTES.get(kind.text) if isinstance(kind, _Name) else None
        if tag != "storage" or item_bytes is None or not isinstance(key, str) or not is_count:
            raise CheckpointError(f"{self._path}: damaged: refers to something that is no storage of a tensor")
        assert isinstance(count, int)
        size = self._storages.get(key)
        if size is None:
            raise CheckpointError(f"{self._path}: damaged: holds no data/{key[:80]}, which a tensor refers to")
        if size != count * item_bytes:
            raise CheckpointError(
                f"{self._path}: data/{key[:80]} has {size:,} bytes, and its pickle claims {format_value(count)} × "
                f"{item_bytes} of them; the file is damaged, or made to read other bytes as weights"
            )
        self._stack.append(_OTHER)

    _HANDLERS: dict[str, Callable[[_Machine, object], None]] = {  # noqa: RUF012 - a table of methods
        "APPENDS": _marked_items,
        "BINGET": _get,
        "BINPERSID": _storage,
        "BINPUT": _put,
        "GLOBAL": _name,
        "LONG_BINGET": _get,
        "LONG_BINPUT": _put,
        "MARK": _mark,
        "NEWOBJ": _call,
        "PROTO": _nothing,
        "REDUCE": _call,
        "SETITEMS": _marked_items,
        "STOP": _nothing,
        "TUPLE": _marked_tuple,
    }


def _refusal(path: Path, what: str) -> str:
    return (
        f"{path}: holds {what[:200]}, which could run code or fill memory; megalm reads tensors, plain values and the "
        "settings of Megatron-LM and DeepSpeed only. Where you trust the file, open it with the tool that wrote it, "
        "drop that entry, and save it again"
    )
