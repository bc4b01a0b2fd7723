"""``pytorch_model.bin``: read as safetensors are, and nothing in it is run."""

from __future__ import annotations

import json
import os
import pickle
import zipfile
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from foreign_models import BERT, GPT2, LLAMA, ROBERTA, convert_quietly, write_random_run
from golden import Marker
from safetensors.torch import load_file

from megalm.config.schema import Model
from megalm.convert.huggingface.read import HfSource
from megalm.convert.run import RunSource
from megalm.errors import CheckpointError

PICKLE, SAFE = "pytorch_model.bin", "model.safetensors"
TIED = replace(LLAMA, tie_embeddings=True)


@pytest.fixture(autouse=True)
def _no_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "fsync", lambda _: None)


def _exported(folder: Path, model: Model, dtype: torch.dtype = torch.float32) -> dict[str, torch.Tensor]:
    """A folder for the library whose safetensors are taken away; returns the tensors."""
    write_random_run(folder / "run", model, dtype=dtype)
    convert_quietly("megalm", "hf", folder / "run", folder / "hf")
    tensors = load_file(folder / "hf" / SAFE)
    (folder / "hf" / SAFE).unlink()
    return tensors


def _refused(folder: Path, *fragments: str) -> None:
    with pytest.raises(CheckpointError) as refusal:
        convert_quietly("hf", "megalm", folder, folder.parent / "out")
    text = str(refusal.value)
    assert all(fragment in text for fragment in fragments), text
    assert len(text.splitlines()) == 1
    assert not (folder.parent / "out").exists()


def _assert_read(folder: Path, run: Path) -> None:
    """What a folder holds is, byte for byte, what was exported."""
    source, expected = HfSource(folder), RunSource(run)
    assert source.info.dtype == expected.info.dtype
    for name in (tensor for rule in source.family.rules(source.info.model) for tensor in [rule.name]):
        assert torch.equal(source.read(name), expected.read(name)), name
        assert source.read(name).is_contiguous()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("model", [GPT2, TIED, BERT, ROBERTA], ids=["gpt2", "llama", "bert", "roberta"])
def test_pickles_are_read_as_safetensors_are(model: Model, dtype: torch.dtype, tmp_path: Path) -> None:
    tensors = _exported(tmp_path, model, dtype)
    torch.save(OrderedDict(tensors), tmp_path / "hf" / PICKLE)
    _assert_read(tmp_path / "hf", tmp_path / "run")
    report = convert_quietly("hf", "megalm", tmp_path / "hf", tmp_path / "again", tp=2, verify=True)
    assert any("pickled: megalm runs nothing" in note for note in report.notes)
    convert_quietly("megalm", "hf", tmp_path / "again", tmp_path / "hf-again")
    after = load_file(tmp_path / "hf-again" / SAFE)
    assert after.keys() == tensors.keys() and all(torch.equal(after[name], tensors[name]) for name in tensors)


def test_what_the_library_pickled_is_read(tmp_path: Path) -> None:
    """With the metadata of ``state_dict``, tied tensors that share a storage, and masks that mean nothing."""
    transformers = pytest.importorskip("transformers")
    config = transformers.GPT2Config(vocab_size=101, n_layer=2, n_embd=24, n_head=4, n_positions=32)
    theirs = transformers.GPT2LMHeadModel(config).eval()
    theirs.config.save_pretrained(tmp_path)
    state = theirs.state_dict()
    assert state["lm_head.weight"].data_ptr() == state["transformer.wte.weight"].data_ptr()
    state["transformer.h.0.attn.bias"] = torch.ones(1, 1, 32, 32, dtype=torch.bool)
    torch.save(state, tmp_path / PICKLE)
    source = HfSource(tmp_path)
    assert torch.equal(source.read("embedding.weight"), theirs.transformer.wte.weight)
    torch.save(state | {"lm_head.weight": state["lm_head.weight"] + 1.0}, tmp_path / PICKLE)
    with pytest.raises(CheckpointError, match=r"lm_head\.weight differs from transformer\.wte\.weight"):
        HfSource(tmp_path).read("embedding.weight")


def test_strides_and_parts_of_storages_are_understood(tmp_path: Path) -> None:
    tensors = _exported(tmp_path, TIED)
    whole = torch.cat([value.flatten() for value in tensors.values()])
    offset, views = 0, {}
    for name, value in tensors.items():
        view = whole[offset : offset + value.numel()].view(value.shape)
        views[name] = value.t().contiguous().t() if "up_proj" in name else view
        offset += value.numel()
    assert any(not view.is_contiguous() for view in views.values())
    torch.save(views, tmp_path / "hf" / PICKLE)
    _assert_read(tmp_path / "hf", tmp_path / "run")


def _shards(tensors: dict[str, torch.Tensor], folder: Path) -> Path:
    names, half = list(tensors), len(tensors) // 2
    files = {f"pytorch_model-0000{i}-of-00002.bin": part for i, part in ((1, names[:half]), (2, names[half:]))}
    for file, part in files.items():
        torch.save({name: tensors[name] for name in part}, folder / file)
    index = folder / "pytorch_model.bin.index.json"
    places = {name: file for file, part in files.items() for name in part}
    index.write_text(json.dumps({"metadata": {}, "weight_map": places}))
    return index


def test_an_index_of_pickles_is_followed(tmp_path: Path) -> None:
    index = _shards(_exported(tmp_path, LLAMA), tmp_path / "hf")
    _assert_read(tmp_path / "hf", tmp_path / "run")
    values = json.loads(index.read_text())
    for place, fragment in (
        ("../x.bin", "leaves the folder"),
        ("none.bin", "none.bin: missing; pytorch_model.bin.index.json names it"),
        ("pytorch_model-00001-of-00002.bin", "lm_head.weight: not in pytorch_model-00001-of-00002.bin"),
    ):
        index.write_text(json.dumps({"weight_map": values["weight_map"] | {"lm_head.weight": place}}))
        _refused(tmp_path / "hf", fragment)


def test_safetensors_are_preferred(tmp_path: Path) -> None:
    write_random_run(tmp_path / "run", GPT2)
    convert_quietly("megalm", "hf", tmp_path / "run", tmp_path / "hf")
    (tmp_path / "hf" / PICKLE).write_bytes(b"cos\nsystem\n(S'touch ran'\ntR.")
    assert not any("pickled" in note for note in HfSource(tmp_path / "hf").info.notes)


def _spoil(tensors: dict[str, torch.Tensor], name: str, value: Any) -> Callable[[Path], None]:
    return lambda file: torch.save(tensors | {name: value}, file)


def test_what_is_no_tensor_of_the_model_is_named(tmp_path: Path) -> None:
    tensors = _exported(tmp_path, GPT2)
    file, name = tmp_path / "hf" / PICKLE, "transformer.ln_f.weight"
    for change, fragments in (
        (_spoil(tensors, name, "text"), (f"{PICKLE}: {name}: a str, not a tensor",)),
        (_spoil(tensors, name, torch.ones(24, dtype=torch.float64)), ("dtype torch.float64",)),
        (_spoil(tensors, name, torch.ones(23)), ("shape [23], expected [24]",)),
        (_spoil(tensors, "more", torch.ones(2)), ("more: not a tensor of this model",)),
        (_spoil(tensors, name, torch.ones(1).expand(24)), ("fewer in the file",)),
        (lambda file: torch.save([tensors], file), ("holds a list, not tensors by their names",)),
        (lambda file: torch.save({}, file), ("holds a dict, not tensors by their names",)),
        (lambda file: torch.save({"model": tensors}, file), ("model: a dict, not a tensor",)),
        (lambda file: file.write_bytes(b""), ("no whole file of torch.save",)),
    ):
        change(file)
        _refused(tmp_path / "hf", str(tmp_path / "hf"), *fragments)


def test_files_of_torch_before_1_6_are_refused_with_the_remedy(tmp_path: Path) -> None:
    torch.save(_exported(tmp_path, GPT2), tmp_path / "hf" / PICKLE, _use_new_zipfile_serialization=False)
    _refused(tmp_path / "hf", PICKLE, "a torch before 1.6", "save it again")


def _with_pickle(file: Path, pickled: bytes) -> None:
    """A file of ``torch.save`` with another pickle in it."""
    torch.save({}, file)
    with zipfile.ZipFile(file) as archive:
        parts = {member.filename: archive.read(member) for member in archive.infolist()}
    with zipfile.ZipFile(file, "w", zipfile.ZIP_STORED) as archive:
        for name, data in parts.items():
            archive.writestr(name, pickled if name.endswith("data.pkl") else data)


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
def test_code_is_refused_by_what_it_would_have_imported(protocol: int, tmp_path: Path) -> None:
    _exported(tmp_path, GPT2)
    ran = tmp_path / "ran"
    _with_pickle(tmp_path / "hf" / PICKLE, pickle.dumps({"w": Marker(ran)}, protocol=protocol))
    _refused(tmp_path / "hf", f"{PICKLE}: holds posix.mkdir", "which could run code")
    assert not ran.exists()


@pytest.mark.parametrize("protocol", [0, 2, 4])
def test_a_bare_pickle_with_code_is_refused_by_its_name(protocol: int, tmp_path: Path) -> None:
    _exported(tmp_path, GPT2)
    file = tmp_path / "hf" / PICKLE
    file.write_bytes(pickle.dumps({"w": Marker(tmp_path / "ran")}, protocol=protocol))
    _refused(tmp_path / "hf", f"{PICKLE}: holds posix.mkdir (a bare pickle", "which could run code")
    with file.open("wb") as old:  # as a torch before 1.6 wrote, with code in the fourth of its pickles
        for part in (0x1950A86A20F9469CFC6C, 1001, {"little_endian": True}, {"w": Marker(tmp_path / "ran")}, ["0"]):
            pickle.dump(part, old, protocol=2)
    _refused(tmp_path / "hf", f"{PICKLE}: holds posix.mkdir (a bare pickle", "which could run code")
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize(
    ("code", "name"),
    [
        (b"cos\nsystem\n(S'touch ran'\ntR.", "os.system"),
        (b"\x80\x02cbuiltins\neval\nX\x04\x00\x00\x001 + \x85R.", "builtins.eval"),
        (b"\x80\x02csubprocess\nPopen\nX\x01\x00\x00\x00a\x85R.", "subprocess.Popen"),
        (b"(S'touch ran'\nios\nsystem\n.", "os.system"),
        (b"\x80\x04\x8c\x02os\x94\x8c\x06system\x94\x93\x8c\x01a\x85R.", "os.system"),
        (b"\x80\x04\x8c\x02os\x94\x8c\x06system\x94h\x00h\x01\x93\x8c\x01a\x85R.", "os.system"),
        (b"ctorch.storage\n_load_from_bytes\nC\x01a\x85R.", "torch.storage._load_from_bytes"),
        (b"cwebbrowser\nopen\nX\x01\x00\x00\x00a\x85R.", "webbrowser.open"),
    ],
)
def test_hand_made_code_is_named(code: bytes, name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _exported(tmp_path, GPT2)
    _with_pickle(tmp_path / "hf" / PICKLE, code)
    monkeypatch.setattr(torch, "load", lambda *_, **__: pytest.fail("torch saw it"))
    _refused(tmp_path / "hf", PICKLE, name)
