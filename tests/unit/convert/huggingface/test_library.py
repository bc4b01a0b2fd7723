"""What the library itself makes of folders that megalm wrote, and megalm of those that the library wrote."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from foreign_models import BERT, GPT2, LLAMA, MODELS, NEOX, convert_quietly, write_random_run
from safetensors.torch import load_file, save_file

from megalm.config.schema import Model
from megalm.convert.huggingface.read import HfSource
from megalm.convert.run import RunSource
from megalm.convert.weights import WeightSource
from megalm.errors import CheckpointError
from megalm.models.transformer import build_full_model

transformers = pytest.importorskip("transformers")

LONG_LLAMA = replace(LLAMA, sequence_length=64)
SCALED = {
    "linear": replace(LONG_LLAMA, rotary_scaling="linear", rotary_factor=4.0),
    "llama3": replace(LONG_LLAMA, rotary_scaling="llama3", rotary_factor=8.0, rotary_original_length=16),
    "llama3-factors": replace(
        LONG_LLAMA,
        rotary_scaling="llama3",
        rotary_factor=2.0,
        rotary_base=500.0,
        rotary_low_frequency_factor=1.5,
        rotary_high_frequency_factor=6.0,
        rotary_original_length=32,
    ),
    "yarn": replace(LONG_LLAMA, rotary_scaling="yarn", rotary_factor=4.0),
    "yarn-betas": replace(
        LONG_LLAMA,
        hidden_size=64,
        rotary_scaling="yarn",
        rotary_factor=2.0,
        rotary_base=50.0,
        rotary_original_length=32,
        rotary_beta_fast=4.0,
        rotary_beta_slow=0.5,
    ),
    "neox-linear": replace(NEOX, hidden_size=64, rotary_scaling="linear", rotary_factor=2.0),
    "neox-yarn": replace(NEOX, hidden_size=64, rotary_fraction=0.5, rotary_scaling="yarn", rotary_factor=2.0),
}


@pytest.fixture(autouse=True)
def _no_gradients_and_no_disk(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(os, "fsync", lambda _: None)  # takes most of the time
    with torch.no_grad():
        yield


def _tokens(model: Model) -> torch.Tensor:
    """Without padding, which has no position where positions are numbered from its id + 1."""
    low = model.position_offset
    generator = torch.Generator().manual_seed(1)
    return torch.randint(low, model.vocab_size or 0, (3, model.sequence_length), generator=generator)


def _own_logits(source: WeightSource) -> torch.Tensor:
    model = source.info.model
    whole = build_full_model(model, model.vocab_size or 0).eval()
    for declared in whole.tensors():
        declared.parameter.copy_(source.read(declared.name))
    return whole(_tokens(model))


def _library_logits(folder: Path, model: Model) -> torch.Tensor:
    kind = transformers.AutoModelForCausalLM if model.causal else transformers.AutoModelForMaskedLM
    loaded, found = kind.from_pretrained(folder, output_loading_info=True, dtype=torch.float32)
    assert not any(found.values()), found
    return loaded.eval()(input_ids=_tokens(model)).logits


@pytest.mark.parametrize("name", [*MODELS, *SCALED])
def test_the_library_computes_the_same_logits(name: str, tmp_path: Path) -> None:
    model = (MODELS | SCALED)[name]
    source = write_random_run(tmp_path / "run", model, tp=2)
    convert_quietly("megalm", "hf", tmp_path / "run", tmp_path / "hf")
    torch.testing.assert_close(_library_logits(tmp_path / "hf", model), _own_logits(source), rtol=0, atol=1e-4)
    # What is read again is the same architecture, in all that its logits depend on.
    torch.testing.assert_close(_own_logits(HfSource(tmp_path / "hf")), _own_logits(source), rtol=0, atol=0)


@pytest.mark.parametrize("name", SCALED)
def test_scaling_changes_the_logits(name: str) -> None:
    """Else the test above would prove nothing."""
    from foreign_models import RandomSource

    model = SCALED[name]
    plain = replace(model, rotary_scaling="none", rotary_factor=1.0, rotary_original_length=None)
    assert (_own_logits(RandomSource(model)) - _own_logits(RandomSource(plain))).abs().max() > 1e-2


def _tiny(kind: str, **changes: Any) -> Any:
    sizes: dict[str, dict[str, Any]] = {
        "GPT2": {"n_layer": 2, "n_embd": 24, "n_head": 4, "n_positions": 32},
        "GPTNeoX": {
            "num_hidden_layers": 2,
            "hidden_size": 32,
            "num_attention_heads": 4,
            "intermediate_size": 48,
            "max_position_embeddings": 32,
        },
        "Llama": {
            "num_hidden_layers": 2,
            "hidden_size": 32,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "intermediate_size": 48,
            "max_position_embeddings": 32,
        },
        "Bert": {
            "num_hidden_layers": 2,
            "hidden_size": 24,
            "num_attention_heads": 4,
            "intermediate_size": 48,
            "max_position_embeddings": 32,
        },
    }
    return getattr(transformers, f"{kind}Config")(vocab_size=101, initializer_range=0.2, **sizes[kind] | changes)


LIBRARY_MODELS: dict[str, tuple[str, str, dict[str, Any]]] = {
    "gpt2": ("GPT2", "GPT2LMHeadModel", {}),
    "gpt2-wide": ("GPT2", "GPT2LMHeadModel", {"n_inner": 36, "activation_function": "gelu"}),
    "neox": ("GPTNeoX", "GPTNeoXForCausalLM", {}),
    "neox-sequential": ("GPTNeoX", "GPTNeoXForCausalLM", {"use_parallel_residual": False, "hidden_act": "gelu_new"}),
    "llama": ("Llama", "LlamaForCausalLM", {}),
    "llama-tied": ("Llama", "LlamaForCausalLM", {"tie_word_embeddings": True}),
    "llama-llama3": (
        "Llama",
        "LlamaForCausalLM",
        {
            "rope_parameters": {
                "rope_type": "llama3",
                "rope_theta": 500.0,
                "factor": 4.0,
                "low_freq_factor": 1.0,
                "high_freq_factor": 4.0,
                "original_max_position_embeddings": 16,
            }
        },
    ),
    "llama-yarn": (
        "Llama",
        "LlamaForCausalLM",
        {"rope_parameters": {"rope_type": "yarn", "factor": 2.0, "original_max_position_embeddings": 16}},
    ),
    "llama-linear": ("Llama", "LlamaForCausalLM", {"rope_parameters": {"rope_type": "linear", "factor": 2.0}}),
    "neox-14-of-50": (
        "GPTNeoX",
        "GPTNeoXForCausalLM",
        {"hidden_size": 100, "num_attention_heads": 2, "rotary_pct": 0.28},
    ),
    "bert": ("Bert", "BertForMaskedLM", {}),
    "bert-pretraining": ("Bert", "BertForPreTraining", {}),
    "bert-untied": ("Bert", "BertForMaskedLM", {"tie_word_embeddings": False}),
}


LLAMA3 = {"rope_type": "llama3", "factor": 4.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
LINEAR = {"rope_type": "linear", "factor": 2.0}
ROTARY_FIELDS: dict[str, tuple[str, dict[str, Any]]] = {
    "base-in-scaling": ("Llama", {"rope_scaling": LINEAR | {"rope_theta": 500.0}, "rope_theta": 100.0}),
    "fraction-in-scaling": ("GPTNeoX", {"rope_scaling": LINEAR | {"partial_rotary_factor": 0.5}, "rotary_pct": 1.0}),
    "empty-parameters": ("Llama", {"rope_parameters": {}, "rope_scaling": LINEAR}),
    "empty-scaling": ("Llama", {"rope_parameters": LINEAR | {"rope_theta": 500.0}, "rope_scaling": {}}),
    "both-agree": (
        "Llama",
        {"rope_parameters": LINEAR | {"rope_theta": 500.0}, "rope_scaling": LINEAR, "rope_theta": 500.0},
    ),
    "original-at-the-top": ("Llama", {"rope_scaling": LLAMA3, "original_max_position_embeddings": 8}),
    "original-of-yarn-at-the-top": (
        "Llama",
        {"rope_scaling": {"rope_type": "yarn", "factor": None}, "original_max_position_embeddings": 8},
    ),
}
"""What files say of rotation, in places where the library looks too."""


@pytest.mark.parametrize("name", ROTARY_FIELDS)
def test_rotary_fields_count_wherever_the_library_finds_them(name: str, tmp_path: Path) -> None:
    kind, changes = ROTARY_FIELDS[name]
    transformers.AutoModelForCausalLM.from_config(_tiny(kind)).save_pretrained(tmp_path / "theirs")
    file = tmp_path / "theirs" / "config.json"
    values = json.loads(file.read_text())
    values.pop("rope_parameters")
    file.write_text(json.dumps(values | changes))
    model = HfSource(tmp_path / "theirs").info.model
    own = _own_logits(HfSource(tmp_path / "theirs"))
    torch.testing.assert_close(_library_logits(tmp_path / "theirs", model), own, rtol=0, atol=1e-4)
    file.write_text(json.dumps(values))
    assert (_own_logits(HfSource(tmp_path / "theirs")) - own).abs().max() > 1e-3  # else nothing were proven


@pytest.mark.parametrize("name", LIBRARY_MODELS)
def test_models_that_the_library_saved_are_read(name: str, tmp_path: Path) -> None:
    config, kind, changes = LIBRARY_MODELS[name]
    model = getattr(transformers, kind)(_tiny(config, **changes)).eval()
    for parameter in model.parameters():
        parameter.add_(torch.randn(parameter.shape) * 0.05)  # biases and norms too
    model.save_pretrained(tmp_path / "theirs")
    report = convert_quietly("hf", "megalm", tmp_path / "theirs", tmp_path / "run", tp=2, pp=2, verify=True)
    run = RunSource(tmp_path / "run")
    outputs = model(input_ids=_tokens(run.info.model))
    theirs = outputs.prediction_logits if name == "bert-pretraining" else outputs.logits
    torch.testing.assert_close(_own_logits(run), theirs, rtol=0, atol=1e-4)
    assert any("transformers" in line for line in report.verified)
    assert any("pooler" in note for note in report.notes) is (name == "bert-pretraining")
    convert_quietly("megalm", "hf", tmp_path / "run", tmp_path / "ours")
    theirs_saved, ours = (load_file(tmp_path / folder / "model.safetensors") for folder in ("theirs", "ours"))
    names = {"lm_head.weight": "embed_out.weight"} if config == "GPTNeoX" else {}
    if name == "bert-untied":  # a second bias, which the library keeps and does not use
        theirs_saved["cls.predictions.bias"] = theirs_saved["cls.predictions.decoder.bias"]
    for saved, value in theirs_saved.items():
        if "pooler" not in saved and "seq_relationship" not in saved:
            assert torch.equal(ours[names.get(saved, saved)], value), saved


def test_one_bias_of_an_untied_bert_is_the_decoders(tmp_path: Path) -> None:
    source = write_random_run(tmp_path / "run", MODELS["bert-untied"])
    convert_quietly("megalm", "hf", tmp_path / "run", tmp_path / "hf", verify=True)
    file = tmp_path / "hf" / "model.safetensors"
    tensors = load_file(file)
    bias = tensors.pop("cls.predictions.decoder.bias")
    assert torch.equal(tensors["cls.predictions.bias"], bias)
    save_file(tensors, file)
    assert torch.equal(HfSource(tmp_path / "hf").read("masked_lm.bias"), source.values["masked_lm.bias"])


def test_spellings_of_published_files_are_understood(tmp_path: Path) -> None:
    """GPT-2 without its prefix and with masks; BERT with gamma and beta, and with the tied tensors under both names."""
    for name, model in (("gpt2", GPT2), ("bert", BERT), ("neox", NEOX), ("llama", replace(LLAMA, tie_embeddings=True))):
        source = write_random_run(tmp_path / f"{name}-run", model)
        convert_quietly("megalm", "hf", tmp_path / f"{name}-run", tmp_path / name)
        file = tmp_path / name / "model.safetensors"
        tensors = load_file(file)
        if name == "bert":
            tensors = {
                n.replace("Norm.weight", "Norm.gamma").replace("Norm.bias", "Norm.beta"): t for n, t in tensors.items()
            }
            tensors["cls.predictions.decoder.weight"] = tensors["bert.embeddings.word_embeddings.weight"].clone()
            tensors["cls.predictions.decoder.bias"] = tensors["cls.predictions.bias"].clone()
            tensors["bert.embeddings.position_ids"] = torch.arange(32)
        else:
            prefix = {"gpt2": "transformer.", "neox": "gpt_neox.", "llama": "model."}[name]
            word = {"gpt2": "wte", "neox": "embed_in", "llama": "embed_tokens"}[name]
            tensors = {n.removeprefix(prefix): t for n, t in tensors.items()}
            tensors["lm_head.weight"] = tensors[f"{word}.weight"].clone()
        if name == "gpt2":
            tensors["h.0.attn.bias"] = torch.ones(1, 1, 32, 32, dtype=torch.bool)
            tensors["h.0.attn.masked_bias"] = torch.tensor(-1e4)
        if name == "neox":
            tensors["layers.0.attention.rotary_emb.inv_freq"] = torch.ones(1)
        save_file(tensors, file)
        for tensor, value in source.values.items():
            assert torch.equal(HfSource(tmp_path / name).read(tensor), value)
        if name != "neox":
            duplicate = "cls.predictions.decoder.weight" if name == "bert" else "lm_head.weight"
            save_file(tensors | {duplicate: tensors[duplicate] + 1.0}, file)
            with pytest.raises(CheckpointError, match="differs from"):
                convert_quietly("hf", "megalm", tmp_path / name, tmp_path / "out")
            assert not (tmp_path / "out").exists()


def test_configs_of_either_generation_are_read(tmp_path: Path) -> None:
    write_random_run(tmp_path / "run", SCALED["llama3"])
    convert_quietly("megalm", "hf", tmp_path / "run", tmp_path / "hf")
    file = tmp_path / "hf" / "config.json"
    values = json.loads(file.read_text())
    expected = HfSource(tmp_path / "hf").info.model
    scaling, theta = values.pop("rope_scaling"), values.pop("rope_theta")
    file.write_text(json.dumps(values | {"rope_parameters": {**scaling, "rope_theta": theta}}))
    assert HfSource(tmp_path / "hf").info.model == expected
    scaling["type"] = scaling.pop("rope_type")
    file.write_text(json.dumps(values | {"rope_scaling": scaling, "rope_theta": theta}))
    assert HfSource(tmp_path / "hf").info.model == expected
