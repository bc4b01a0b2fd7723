"""Pickles run nothing, name what they refuse, and never make more of a file than is in it."""

from __future__ import annotations

import enum
import io
import pickle
import sys
import types
import zipfile
from argparse import Namespace
from pathlib import Path

import numpy as np
import pytest
import torch
from golden import Marker, refused

from megalm.checkpoint.adapters import safe_pickle
from megalm.checkpoint.adapters.safe_pickle import Inert, PickledTensors, load


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


def test_enums_of_megatron_are_read_without_megatron(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    module = types.ModuleType("megatron.core.enums")
    module.ModelType = enum.Enum("ModelType", {"gpt": 3}, module=module.__name__)
    for name in ("megatron", "megatron.core"):
        monkeypatch.setitem(sys.modules, name, types.ModuleType(name))
    monkeypatch.setitem(sys.modules, module.__name__, module)
    torch.save(Namespace(model_type=module.ModelType.gpt), tmp_path / "f.pt")
    monkeypatch.delitem(sys.modules, module.__name__)
    assert load(tmp_path / "f.pt").model_type.args == (3,)


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


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
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
    for number, value in enumerate((torch.ones(2, 2).to_sparse(), torch.ones(2, device="meta"), "text")):
        path = tmp_path / f"{number}.pt"
        torch.save({"w": value}, path)
        refused(lambda path=path: PickledTensors(path, dict), path.name, "w:")


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
    assert "pickle.load" not in source and "weights_only=False" not in source
    assert pickle.UnpicklingError.__name__ in source
