"""OpenAI's GPT-2, as TensorFlow's own saver writes it: what is read is what TensorFlow computed with."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from golden import GOLDEN, logits_of, refused

from megalm.convert.openai.read import open_source

GPT2 = GOLDEN / "openai_gpt2"


@pytest.mark.parametrize(("name", "dtype"), [("124M", torch.float32), ("sharded", torch.float16)])
def test_logits_are_tensorflows(name: str, dtype: torch.dtype) -> None:
    expected = np.load(GPT2 / "expected.npz")
    source = open_source(GPT2 / name)
    assert source.info.dtype == dtype and source.info.tokenizer == GPT2 / name
    assert source.info.model.vocab_size == 261 and source.info.model.activation == "gelu"
    assert np.abs(logits_of(source, expected["tokens"]) - expected[f"{name}/logits"]).max() < 1e-4


def test_what_fine_tuning_leaves_is_left_out() -> None:
    (note,) = open_source(GPT2 / "sharded").info.notes
    assert "2 tensors that are no weights" in note
    assert not open_source(GPT2 / "124M").info.notes


@pytest.fixture
def copy(tmp_path: Path) -> Path:
    return Path(shutil.copytree(GPT2 / "124M", tmp_path / "124M"))


@pytest.mark.parametrize(
    ("change", "fragment"),
    [
        ({"n_embd": 32}, "model/wte: shape [261, 16], expected [261, 32]"),
        ({"n_layer": 1}, "model/h1/"),
        ({"n_layer": 3}, "model/h2/ln_1/g: missing"),
        ({"n_layer": 10**6}, "belongs to another model"),
        ({"n_embd": 2 * 10**9}, "belongs to another model"),
        ({"n_head": 5}, "num_heads=5"),
        ({"n_vocab": -1}, "n_vocab=-1"),
        ({"n_ctx": None}, "n_ctx=(missing)"),
    ],
)
def test_hparams_that_do_not_fit(copy: Path, change: dict, fragment: str) -> None:
    hparams = json.loads((copy / "hparams.json").read_text())
    (copy / "hparams.json").write_text(json.dumps(hparams | change))
    refused(lambda: open_source(copy), str(copy), fragment)


def test_missing_and_foreign_files(copy: Path, tmp_path: Path) -> None:
    refused(lambda: open_source(tmp_path / "nowhere"), "nowhere: no such folder")
    (copy / "hparams.json").write_text("{")
    refused(lambda: open_source(copy), "hparams.json", "no JSON")
    (copy / "hparams.json").unlink()
    refused(lambda: open_source(copy), "hparams.json")


def test_without_a_tokenizer(copy: Path) -> None:
    (copy / "vocab.bpe").unlink()
    assert open_source(copy).info.tokenizer is None
