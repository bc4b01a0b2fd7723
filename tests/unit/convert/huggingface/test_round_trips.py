"""megalm ▶ Hugging Face ▶ megalm ▶ Hugging Face: the same bytes, whatever the layout of the runs."""

from __future__ import annotations

import json
import os
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from foreign_models import GPT2, LLAMA, MODELS, RandomSource, convert_quietly, write_random_run
from safetensors import safe_open

from megalm.checkpoint.manifest import read_manifest
from megalm.checkpoint.store import locate
from megalm.config.schema import Model
from megalm.convert.checks import same_values
from megalm.convert.huggingface.model_card import CARD_FILE
from megalm.convert.huggingface.read import HfSource
from megalm.convert.run import RunSource
from megalm.convert.weights import WeightSource, full_shapes
from megalm.errors import ConfigError

FAMILIES = ("gpt2", "neox", "llama", "llama-tied-2kv", "bert", "qwen3")
CASES = [(name, tp, pp) for name in FAMILIES for tp in (1, 2, 4) for pp in (1, 2)]
CASES += [(name, 2, 2) for name in MODELS if name not in FAMILIES]


@pytest.fixture(autouse=True)
def _no_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    """Bytes are compared, not their way to the disk, which takes most of the time."""
    monkeypatch.setattr(os, "fsync", lambda _: None)


def _assert_equal(source: RandomSource, other: WeightSource) -> None:
    assert other.info.dtype == source.info.dtype
    assert list(full_shapes(other.info.model)) == list(source.values)
    for name, value in source.values.items():
        assert same_values(other.read(name), value), name


def _assert_same_files(one: Path, other: Path) -> None:
    names = sorted(file.name for file in one.iterdir())
    assert names == sorted(file.name for file in other.iterdir())
    for name in set(names) - {CARD_FILE}:  # which says where the model is from
        assert (one / name).read_bytes() == (other / name).read_bytes(), name


def _round_trip(folder: Path, model: Model, tp: int, pp: int, dtype: torch.dtype = torch.float32) -> None:
    source = write_random_run(folder / "run", model, tp=tp, pp=pp, dtype=dtype)
    convert_quietly("megalm", "hf", folder / "run", folder / "hf")
    _assert_equal(source, HfSource(folder / "hf"))
    convert_quietly("hf", "megalm", folder / "hf", folder / "again", tp=tp, pp=pp)
    again = RunSource(folder / "again")
    _assert_equal(source, again)
    first, second = (read_manifest(locate(folder / name).path) for name in ("run", "again"))
    assert {name: record.fingerprint for name, record in first.tensors.items()} == {
        name: record.fingerprint for name, record in second.tensors.items()
    }
    convert_quietly("megalm", "hf", folder / "again", folder / "hf-again")
    _assert_same_files(folder / "hf", folder / "hf-again")


@pytest.mark.parametrize(("name", "tp", "pp"), CASES)
def test_round_trips_keep_every_byte(name: str, tp: int, pp: int, tmp_path: Path) -> None:
    _round_trip(tmp_path, MODELS[name], tp, pp)


@pytest.mark.parametrize("name", ["gpt2", "llama"])
def test_a_padded_vocabulary_comes_out_without_its_padding(name: str, tmp_path: Path) -> None:
    _round_trip(tmp_path, replace(MODELS[name], vocab_size=50257), 4, 2)


def test_six_heads_that_share_three(tmp_path: Path) -> None:
    _round_trip(tmp_path, replace(LLAMA, hidden_size=36, num_heads=6, num_kv_heads=3), 1, 1)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", ["gpt2", "neox", "llama", "bert"])
def test_sixteen_bits_stay_sixteen_bits(name: str, dtype: torch.dtype, tmp_path: Path) -> None:
    _round_trip(tmp_path, MODELS[name], 2, 2, dtype)


def test_a_cast_is_made_where_it_is_asked_for_and_remembered(tmp_path: Path) -> None:
    source = write_random_run(tmp_path / "run", LLAMA)
    convert_quietly("megalm", "hf", tmp_path / "run", tmp_path / "hf", dtype="bf16", verify=True)
    convert_quietly("megalm", "megalm", tmp_path / "run", tmp_path / "short", dtype="bf16", verify=True)
    for converted in (HfSource(tmp_path / "hf"), RunSource(tmp_path / "short")):
        assert converted.info.dtype is torch.bfloat16
        for name, value in source.values.items():
            assert torch.equal(converted.read(name), value.to(torch.bfloat16))
    assert json.loads((tmp_path / "hf" / "config.json").read_text())["dtype"] == "bfloat16"


def test_large_models_are_written_in_several_files_with_an_index(tmp_path: Path) -> None:
    source = write_random_run(tmp_path / "run", LLAMA)
    convert_quietly("megalm", "hf", tmp_path / "run", tmp_path / "hf", shard_bytes=30_000, verify=True)
    index = json.loads((tmp_path / "hf" / "model.safetensors.index.json").read_text())
    files = sorted(set(index["weight_map"].values()))
    assert len(files) >= 3
    assert files == [f"model-{n:05d}-of-{len(files):05d}.safetensors" for n in range(1, len(files) + 1)]
    assert index["metadata"]["total_size"] == 4 * sum(value.numel() for value in source.values.values())
    for file in files:
        with safe_open(tmp_path / "hf" / file, "pt") as opened:
            assert opened.metadata() == {"format": "pt"}
            assert {name for name, place in index["weight_map"].items() if place == file} == set(opened.keys())
    _assert_equal(source, HfSource(tmp_path / "hf"))


def test_tied_weights_are_written_once_and_say_so(tmp_path: Path) -> None:
    for name, tied in (("gpt2", True), ("gpt2-untied", False)):
        write_random_run(tmp_path / name, MODELS[name], tp=2, pp=2)
        convert_quietly("megalm", "hf", tmp_path / name, tmp_path / f"{name}-hf")
        with safe_open(tmp_path / f"{name}-hf" / "model.safetensors", "pt") as opened:
            assert ("lm_head.weight" in opened.keys()) is not tied  # noqa: SIM118
        assert json.loads((tmp_path / f"{name}-hf" / "config.json").read_text())["tie_word_embeddings"] is tied
        pieces = [p for r in read_manifest(locate(tmp_path / name).path).tensors.values() for p in r.pieces]
        assert len({(p.file, p.key) for p in pieces}) == len(pieces)


def test_what_changes_no_logits_and_has_no_place_is_noted(tmp_path: Path) -> None:
    write_random_run(tmp_path / "llama", replace(LLAMA, dropout=0.1))
    report = convert_quietly("megalm", "hf", tmp_path / "llama", tmp_path / "llama-hf")
    assert report.notes[-1] == "left out model.dropout=0.1: Llama drops attention only"
    write_random_run(tmp_path / "gpt2", GPT2)
    convert_quietly("megalm", "hf", tmp_path / "gpt2", tmp_path / "hf")
    for file, changes in (
        ("config.json", {"embd_pdrop": 0.3}),
        ("generation_config.json", {"eos_token_id": 0, "_from_model_config": True, "temperature": 0.7, "top_k": 5}),
    ):
        values = json.loads((tmp_path / "hf" / file).read_text())
        (tmp_path / "hf" / file).write_text(json.dumps(values | changes))
    notes = convert_quietly("hf", "megalm", tmp_path / "hf", tmp_path / "again").notes
    assert notes[:2] == (
        "left out embd_pdrop=0.3: megalm drops as much of the embedding as resid_pdrop=0",
        "generation_config.json: kept for exports, and not what megalm generate goes by: temperature and top_k",
    )


def test_a_layout_that_does_not_divide_the_model_is_refused(tmp_path: Path) -> None:
    write_random_run(tmp_path / "run", GPT2)
    with pytest.raises(ConfigError, match=r"parallel\.tp=3.*does not divide"):
        convert_quietly("megalm", "megalm", tmp_path / "run", tmp_path / "out", tp=3)
    with pytest.raises(ConfigError, match=r"--to hf has no layout"):
        convert_quietly("megalm", "hf", tmp_path / "run", tmp_path / "out", tp=2)
    assert not (tmp_path / "out").exists()
