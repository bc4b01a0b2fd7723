"""Pickles run nothing, name what they refuse, and never make more of a file than is in it."""

from __future__ import annotations

import enum
import io
import sys
import time
import types
import zipfile
from argparse import Namespace
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from golden import Marker, refused

from megalm.convert.untrusted import safe_pickle
from megalm.convert.untrusted.safe_pickle import Inert, PickledTensors, load
from megalm.errors import CheckpointError


def _rewritten(path: Path, change) -> Path:
    """The archive with its pickle replaced."""
    with zipfile.ZipFile(path) as archive:
        parts = {member.filename: archive.read(member) for member in archive.infolist()}
    with zipfile.ZipFile(path, "w", zipfile.ZIP_STORED) as archive:
        for name, data in parts.items():
            archive.writestr(name, change(data) if name.endswith("data.pkl") else data)
    return path


def test_tensors_and_plain_values_are_read(tmp_path: Path) -> None:
    state = {"args": Namespace(a=1, dtype=torch.bfloat16), "model": {"w": torch.arange(6.0).view(2, 3)}, "n": [1, "x"]}
    torch.save(state, tmp_path / "f.pt")
    found = load(tmp_path / "f.pt")
    assert found["args"] == state["args"] and found["n"] == state["n"]
    assert torch.equal(found["model"]["w"], state["model"]["w"])


def test_random_states_and_buffers_of_the_tools_are_inert(tmp_path: Path) -> None:
    torch.save({"np": np.random.get_state(), "extra": io.BytesIO(b"x"), "path": Path("/x")}, tmp_path / "f.pt")
    found = load(tmp_path / "f.pt")
    assert isinstance(found["np"][1], Inert) and isinstance(found["extra"], Inert) and isinstance(found["path"], Inert)


BY_VALUE = lambda self, _: (type(self), (self.value,))  # noqa: E731 - Python before and after early versions of 3.11
BY_NAME = lambda self, _: (getattr, (type(self), self.name))  # noqa: E731


@pytest.mark.parametrize(("pickled", "args"), [(BY_VALUE, (3,)), (BY_NAME, ("gpt",))], ids=["by value", "by name"])
def test_enums_of_megatron_are_read_without_megatron(
    pickled: Any, args: tuple[object], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    module = types.ModuleType("megatron.core.enums")
    module.ModelType = enum.Enum("ModelType", {"gpt": 3}, module=module.__name__)
    module.ModelType.__reduce_ex__ = pickled
    for name in ("megatron", "megatron.core"):
        monkeypatch.setitem(sys.modules, name, types.ModuleType(name))
    monkeypatch.setitem(sys.modules, module.__name__, module)
    torch.save(Namespace(model_type=module.ModelType.gpt), tmp_path / "f.pt")
    monkeypatch.delitem(sys.modules, module.__name__)
    assert load(tmp_path / "f.pt").model_type.args == args


class Reaching:
    """Pickles as an attribute of something."""

    def __init__(self, *of: object) -> None:
        self.of = of

    def __reduce__(self) -> tuple[Any, ...]:
        return getattr, self.of


@pytest.mark.parametrize("of", [(torch.Tensor, "numpy"), (dict, "keys"), ("text", "upper")])
def test_an_attribute_of_anything_else_is_refused(of: tuple[object, ...], tmp_path: Path) -> None:
    torch.save({"w": Reaching(*of)}, tmp_path / "f.pt")
    with pytest.raises(CheckpointError, match=r"could run code|damaged"):
        load(tmp_path / "f.pt")


def test_code_is_refused_by_its_name_and_not_run(tmp_path: Path) -> None:
    torch.save({"model": {"w": Marker(tmp_path / "ran")}}, tmp_path / "f.pt")
    refused(lambda: load(tmp_path / "f.pt"), str(tmp_path / "f.pt"), "posix.mkdir")
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize(
    "code",
    [
        b"cos\nsystem\n(S'touch ran'\ntR.",
        b"\x80\x02cbuiltins\neval\nX\x04\x00\x00\x001 + \x85R.",
        b"\x80\x02cposix\nsystem\nX\x01\x00\x00\x00a\x85R.",
        b"\x80\x02csubprocess\nPopen\nX\x01\x00\x00\x00a\x85R.",
    ],
)
def test_hand_made_code_is_refused(tmp_path: Path, code: bytes) -> None:
    torch.save({}, tmp_path / "f.pt")
    refused(lambda: load(_rewritten(tmp_path / "f.pt", lambda _: code)), "f.pt")


def test_inert_names_cannot_be_called_into_something(tmp_path: Path) -> None:
    torch.save({}, tmp_path / "f.pt")
    code = b"\x80\x02cpathlib\nPosixPath\nX\x02\x00\x00\x00/x\x85R."
    found = load(_rewritten(tmp_path / "f.pt", lambda _: code))
    assert isinstance(found, Inert) and found.args == ("/x",)


def test_old_compressed_and_other_files_are_refused(tmp_path: Path) -> None:
    old, packed, text = tmp_path / "old.pt", tmp_path / "packed.pt", tmp_path / "text.pt"
    torch.save({"w": torch.ones(3)}, old, _use_new_zipfile_serialization=False)
    torch.save({"w": torch.zeros(3000)}, tmp_path / "f.pt")
    with zipfile.ZipFile(tmp_path / "f.pt") as archive, zipfile.ZipFile(packed, "w", zipfile.ZIP_DEFLATED) as other:
        for member in archive.infolist():
            other.writestr(member.filename, archive.read(member))
    text.write_text("hello")
    refused(lambda: load(old), "old.pt", "torch.load")
    refused(lambda: load(packed), "packed.pt", "compressed")
    refused(lambda: load(text), "text.pt")
    refused(lambda: load(tmp_path / "none.pt"), "none.pt", "No such file")
    refused(lambda: load(tmp_path), str(tmp_path))


def test_a_file_cut_off_anywhere_is_refused(tmp_path: Path) -> None:
    torch.save({"args": Namespace(a=1), "w": torch.ones(40)}, tmp_path / "f.pt")
    whole = (tmp_path / "f.pt").read_bytes()
    for length in range(0, len(whole), 37):
        (tmp_path / "cut.pt").write_bytes(whole[:length])
        refused(lambda: load(tmp_path / "cut.pt"), "cut.pt")


@pytest.mark.filterwarnings("ignore:Detected pickle protocol", "ignore:invalid escape sequence")
def test_a_damaged_pickle_is_an_error_of_the_file(tmp_path: Path) -> None:
    torch.save({"args": Namespace(a=1, b="two"), "w": torch.ones(4)}, tmp_path / "f.pt")
    random = np.random.RandomState(0)
    with zipfile.ZipFile(tmp_path / "f.pt") as archive:
        pickled = next(archive.read(name) for name in archive.namelist() if name.endswith("data.pkl"))
    for _ in range(300):
        damaged = bytearray(pickled)
        for _ in range(random.randint(1, 4)):
            damaged[random.randint(len(damaged))] = random.randint(256)
        try:
            load(_rewritten(tmp_path / "f.pt", lambda _, damaged=bytes(damaged): damaged))
        except safe_pickle.CheckpointError as error:
            assert "f.pt" in str(error)


def test_a_tensor_larger_than_its_bytes_is_refused(tmp_path: Path) -> None:
    torch.save({"w": torch.ones(1).expand(1 << 40)}, tmp_path / "f.pt")
    refused(lambda: PickledTensors(tmp_path / "f.pt", dict), "f.pt", "w:", "fewer in the file")


def test_only_plain_tensors_are_weights(tmp_path: Path) -> None:
    others = {"sparse": torch.ones(2, 2).to_sparse(), "meta": torch.ones(2, device="meta")}
    for kind, value in others.items():
        torch.save({"w": value}, tmp_path / kind)
        refused(lambda kind=kind: load(tmp_path / kind), kind, "_rebuild_")
    torch.save({"w": "text"}, tmp_path / "f.pt")
    refused(lambda: PickledTensors(tmp_path / "f.pt", dict), "f.pt", "w: a str, not a tensor")


def _claiming(count: int, key: bytes = b"1") -> Callable[[bytes], bytes]:
    """Changes a pickle of two storages of 4 elements: of the last one, the key or the number of elements."""
    claimed = b"K" + bytes([count])

    def change(pickled: bytes) -> bytes:
        start, last = pickled.rsplit(b"X\x01\x00\x00\x001", 1)
        return start + b"X" + len(key).to_bytes(4, "little") + key + last.replace(b"K\x04", claimed, 1)

    return change


def test_storages_are_as_long_as_their_part_of_the_file(tmp_path: Path) -> None:
    path = tmp_path / "f.pt"
    torch.save({"w": torch.zeros(4), "secret": torch.ones(4)}, path)
    assert load(_rewritten(path, _claiming(4)))["secret"].sum() == 4
    for claimed in (_claiming(40), _claiming(3), _claiming(0)):
        torch.save({"w": torch.zeros(4), "secret": torch.ones(4)}, path)
        refused(lambda claimed=claimed: load(_rewritten(path, claimed)), "f.pt", "data/1 has 16 bytes")
    torch.save({"w": torch.zeros(4), "secret": torch.ones(4)}, path)
    refused(lambda: load(_rewritten(path, _claiming(4, b"../x"))), "f.pt", "holds no data/../x")


def test_parts_of_the_file_do_not_overlap(tmp_path: Path) -> None:
    path = tmp_path / "f.pt"
    torch.save({"w": torch.zeros(400), "v": torch.ones(4)}, path)
    with zipfile.ZipFile(path) as archive:
        member = next(m for m in archive.infolist() if m.filename.endswith("data/0"))
    content = bytearray(path.read_bytes())
    content[member.header_offset + 28 : member.header_offset + 30] = (900).to_bytes(2, "little")  # its extra field
    path.write_bytes(content)
    refused(lambda: load(path), "f.pt", "data/0 reaches into")


def test_two_parts_of_one_name_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "f.pt"
    torch.save({"w": torch.zeros(4)}, path)
    with zipfile.ZipFile(path, "a") as archive:
        archive.writestr(archive.namelist()[0].split("/")[0] + "/DATA.pkl", b"\x80\x02}.")
    refused(lambda: load(path), "two of its parts have one name")


_LARGE = b"\x8a\x05\x00\x00\x00\x00\x02\x85"  # (1 << 33,)


@pytest.mark.parametrize(
    ("code", "name"),
    [
        (b"cbuiltins\nbytearray\n" + _LARGE + b"R.", "builtins.bytearray"),
        (b"c__builtin__\nbytearray\n" + _LARGE + b"R.", "__builtin__.bytearray"),
        (b"ctorch\nTensor\n" + _LARGE + b"R.", "a call of torch.Tensor"),
        (b"ctorch\nTensor\nq\x00h\x00" + _LARGE + b"\x81.", "a call of torch.Tensor"),
        (b"ctorch.storage\nUntypedStorage\n" + _LARGE + b"R.", "a call of torch.storage.UntypedStorage"),
        (b"c_codecs\nencode\nX\x01\x00\x00\x00aX\x03\x00\x00\x00hex\x86R.", "a call of _codecs.encode"),
        (b"X\x01\x00\x00\x00a" + b"q\x00h\x00\x86" * 40 + b".", "tuples of more than"),
        (b"]X\x08\x00\x00\x00builtinsX\x09\x00\x00\x00bytearray\x93.", "STACK_GLOBAL"),
        (b"]\x85R.", "less on the stack"),
        (b"]]R.", "calls what is no function"),
        (b"K\x00Q.", "no storage of a tensor"),
    ],
)
def test_what_fills_memory_is_refused_unseen_by_torch(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: bytes, name: str
) -> None:
    torch.save({}, tmp_path / "f.pt")
    bomb = _rewritten(tmp_path / "f.pt", lambda _: b"\x80\x02" + code)
    monkeypatch.setattr(torch, "load", lambda *_, **__: pytest.fail("torch saw it"))
    started = time.perf_counter()
    refused(lambda: load(bomb), "f.pt", name)
    assert time.perf_counter() - started < 0.5


def test_tensors_with_attributes_and_parameters_are_read(tmp_path: Path) -> None:
    tensor = torch.arange(3.0)
    tensor.tensor_model_parallel = True  # as Megatron-LM marks them
    torch.save({"a": tensor, "b": torch.nn.Parameter(torch.ones(2)), "none": torch.empty(0)}, tmp_path / "f.pt")
    found = PickledTensors(tmp_path / "f.pt", dict)
    assert torch.equal(found.get("a"), torch.arange(3.0)) and torch.equal(found.get("b"), torch.ones(2))


def test_a_mapping_is_released_and_made_anew(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "f.pt"
    torch.save({"a": torch.ones(100), "b": torch.zeros(100)}, path)
    monkeypatch.setattr(safe_pickle, "_FORGET_BYTES", 100)
    tensors = PickledTensors(path, dict)
    assert torch.equal(tensors.get("a"), torch.ones(100)) and torch.equal(tensors.get("b"), torch.zeros(100))
    torch.save({"a": torch.ones(50), "b": torch.zeros(100)}, tmp_path / "other.pt")
    (tmp_path / "other.pt").replace(path)
    refused(lambda: tensors.get("a"), "changed")


def test_no_pickle_module_is_used_directly() -> None:
    source = Path(safe_pickle.__file__).read_text()
    assert "import pickle" not in source and "weights_only=False" not in source
