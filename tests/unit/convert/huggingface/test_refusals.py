"""Folders that are not what they say: refused by name, and nothing is written."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from foreign_models import (
    BERT,
    DISTILBERT,
    GPT2,
    LLAMA,
    MISTRAL,
    NEOX,
    PHI3,
    QWEN2,
    QWEN3,
    ROBERTA,
    STARCODER2,
    convert_quietly,
    write_random_run,
)
from safetensors.torch import load_file, save_file

from megalm.convert.huggingface.read import HfSource
from megalm.errors import CheckpointError, ConfigError

FAMILIES = {
    "gpt2": GPT2,
    "gpt_neox": NEOX,
    "llama": LLAMA,
    "mistral": MISTRAL,
    "qwen2": QWEN2,
    "qwen3": QWEN3,
    "phi3": PHI3,
    "starcoder2": STARCODER2,
    "bert": BERT,
    "roberta": ROBERTA,
    "distilbert": DISTILBERT,
}


@pytest.fixture(scope="module")
def originals(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A sound folder of each family; and a Llama in several files."""
    folder = tmp_path_factory.mktemp("sound")
    for name, model in FAMILIES.items():
        write_random_run(folder / "runs" / name, model)
        convert_quietly("megalm", "hf", folder / "runs" / name, folder / name)
    convert_quietly("megalm", "hf", folder / "runs" / "llama", folder / "sharded", shard_bytes=30_000)
    return folder


@pytest.fixture
def copy_of(originals: Path, tmp_path: Path) -> Callable[[str], Path]:
    """A copy of one, to be spoiled."""

    def copy(name: str) -> Path:
        return Path(shutil.copytree(originals / name, tmp_path / "source"))

    return copy


def _refused(source: Path, *fragments: str, kind: type[Exception] = CheckpointError, **options: Any) -> None:
    before = sorted(source.parent.iterdir())
    with pytest.raises(kind) as refusal:
        convert_quietly("hf", "megalm", source, source.parent / "target", **options)
    for fragment in fragments:
        assert fragment in str(refusal.value)
    assert sorted(source.parent.iterdir()) == before


def _change_config(folder: Path, **changes: Any) -> Path:
    file = folder / "config.json"
    values = json.loads(file.read_text()) | changes
    file.write_text(json.dumps({name: value for name, value in values.items() if value != "absent"}))
    return folder


@pytest.mark.parametrize(
    ("family", "field", "value"),
    [
        ("gpt2", "model_type", "mamba"),
        ("gpt2", "model_type", "absent"),
        ("gpt2", "model_type", ["gpt2"]),
        ("gpt2", "n_layer", "2"),
        ("gpt2", "n_layer", "absent"),
        ("gpt2", "n_layer", -1),
        ("gpt2", "n_layer", True),
        ("gpt2", "n_embd", 2.5),
        ("gpt2", "n_embd", 10**30),
        ("gpt2", "vocab_size", {}),
        ("gpt2", "activation_function", "relu"),
        ("gpt2", "activation_function", 7),
        ("gpt2", "layer_norm_epsilon", "small"),
        ("gpt2", "layer_norm_epsilon", float("nan")),
        ("gpt2", "scale_attn_by_inverse_layer_idx", True),
        ("gpt2", "scale_attn_weights", False),
        ("gpt2", "add_cross_attention", True),
        ("gpt2", "tie_word_embeddings", "yes"),
        ("gpt2", "quantization_config", {"bits": 4}),
        ("gpt_neox", "hidden_act", "swish"),
        ("gpt_neox", "rope_scaling", {"rope_type": "dynamic", "factor": 2.0}),
        ("llama", "pretraining_tp", 2),
        ("llama", "head_dim", "4"),
        ("llama", "head_dim", 3),
        ("llama", "sliding_window", 128),
        ("llama", "hidden_act", "gelu"),
        ("llama", "attention_bias", 1),
        ("mistral", "sliding_window", -1),
        ("mistral", "sliding_window", "all"),
        ("mistral", "layer_types", ["full_attention", "sliding_attention"]),
        ("qwen2", "use_sliding_window", "no"),
        ("qwen2", "layer_types", ["full_attention"]),
        ("qwen2", "layer_types", ["full_attention", "linear_attention"]),
        ("qwen2", "layer_types", "full_attention"),
        ("qwen3", "attention_bias", "yes"),
        ("phi3", "rope_scaling", {"type": "longrope", "short_factor": [1.0], "long_factor": [1.0]}),
        ("phi3", "rope_scaling", {"type": "su", "short_factor": [1.0], "long_factor": [1.0]}),
        ("phi3", "rope_scaling", {"type": "linear", "factor": 2.0}),
        ("phi3", "hidden_act", "gelu"),
        ("starcoder2", "hidden_act", "silu"),
        ("starcoder2", "use_bias", 0),
        ("roberta", "hidden_act", "gelu_new"),
        ("roberta", "pad_token_id", None),
        ("roberta", "pad_token_id", -1),
        ("roberta", "max_position_embeddings", 2),
        ("roberta", "is_decoder", True),
        ("distilbert", "activation", "relu"),
        ("distilbert", "n_heads", "absent"),
        ("llama", "rope_scaling", {"rope_type": "longrope", "factor": 2.0}),
        ("llama", "rope_scaling", {"rope_type": "llama3", "factor": 2.0}),
        ("llama", "rope_scaling", {"type": "linear"}),
        ("llama", "rope_scaling", {"type": "linear", "factor": 0.5}),
        ("llama", "rope_scaling", {"type": "yarn", "factor": 2.0, "attention_factor": 0.7}),
        ("llama", "rope_scaling", {"type": "yarn", "factor": 2.0, "truncate": False}),
        ("llama", "rope_scaling", "linear"),
        ("llama", "rope_theta", "10k"),
        ("llama", "partial_rotary_factor", 0.5),
        ("bert", "position_embedding_type", "relative_key"),
        ("bert", "is_decoder", True),
        ("bert", "hidden_act", "relu"),
    ],
)
def test_configs_that_megalm_cannot_be_are_named_field_and_value(
    family: str, field: str, value: Any, copy_of: Callable[[str], Path]
) -> None:
    source = _change_config(copy_of(family), **{field: value})
    name = "model.head_dim" if (field, value) == ("head_dim", 3) else field  # what no config of megalm could describe
    _refused(source, "config.json: ", f"{name}=" if name != "rope_scaling" or value == "linear" else "rope_scaling.")


@pytest.mark.parametrize(
    ("changes", "fragment"),
    [
        (
            {
                "rope_parameters": {"rope_type": "linear", "factor": 4.0},
                "rope_scaling": {"type": "linear", "factor": 2},
            },
            'rope_scaling={"type": "linear", "factor": 2}: contradicts rope_parameters',
        ),
        (
            {
                "rope_scaling": {"rope_type": "yarn", "factor": 2.0, "original_max_position_embeddings": 16},
                "original_max_position_embeddings": 8,
            },
            "original_max_position_embeddings=8: contradicts the 16 beside",
        ),
        ({"rope_scaling": {"type": "linear", "factor": 2.0, "rope_theta": "10k"}}, "rope_scaling.rope_theta=10k"),
        ({"rope_scaling": {"partial_rotary_factor": 0.5}}, "rope_scaling.partial_rotary_factor=0.5"),
    ],
)
def test_rotary_fields_that_contradict_each_other(
    changes: dict[str, Any], fragment: str, copy_of: Callable[[str], Path]
) -> None:
    _refused(_change_config(copy_of("llama"), **changes), fragment)


def test_all_mistakes_of_a_config_are_named_at_once(copy_of: Callable[[str], Path]) -> None:
    source = _change_config(copy_of("gpt2"), n_layer="two", scale_attn_weights=False, activation_function="relu")
    _refused(source, "n_layer=two: not an integer", "scale_attn_weights=false", "activation_function=relu")


@pytest.mark.parametrize(
    ("changes", "fragment"),
    [
        ({"num_attention_heads": 5, "num_key_value_heads": 5, "head_dim": "absent"}, "does not divide"),
        ({"num_key_value_heads": 3}, "model.num_kv_heads=3"),
        ({"num_hidden_layers": 2**31 - 1}, "another model"),
        ({"hidden_size": 2**30, "num_attention_heads": 2**20, "head_dim": 2**10}, "another model"),
        ({"num_hidden_layers": 3}, "model.layers.2.input_layernorm.weight: missing"),
        ({"num_hidden_layers": 1}, "model.layers.1.input_layernorm.weight: not a tensor of this model"),
        ({"intermediate_size": 44}, "model.layers.0.mlp.gate_proj.weight: shape [40, 32], expected [44, 32]"),
        ({"vocab_size": 102}, "model.embed_tokens.weight: shape [101, 32], expected [102, 32]"),
        ({"tie_word_embeddings": True}, "lm_head.weight differs"),
    ],
)
def test_configs_of_other_models_are_refused(
    changes: dict[str, Any], fragment: str, copy_of: Callable[[str], Path]
) -> None:
    _refused(_change_config(copy_of("llama"), **changes), fragment)


@pytest.mark.parametrize("text", ["", "{", "[]", "[" * 100_000, '"gpt2"', "\x00", "NaN"])
def test_configs_that_are_no_json(text: str, copy_of: Callable[[str], Path]) -> None:
    source = copy_of("gpt2")
    (source / "config.json").write_text(text)
    _refused(source, "config.json")


def test_configs_that_are_no_text(copy_of: Callable[[str], Path]) -> None:
    source = copy_of("gpt2")
    (source / "config.json").write_bytes(b"\xff\xfe\x00")
    _refused(source, "config.json")


def _header_of(file: Path) -> tuple[dict[str, Any], bytes]:
    data = file.read_bytes()
    length = int.from_bytes(data[:8], "little")
    return json.loads(data[8 : 8 + length]), data[8 + length :]


def _write_header(file: Path, header: dict[str, Any], rest: bytes) -> None:
    text = json.dumps(header).encode()
    file.write_bytes(len(text).to_bytes(8, "little") + text + rest)


@pytest.mark.parametrize(
    "offsets", [[0, 4], [0, 10**12], [-4, 0], [10**12, 10**12 + 96], "overlap", [96, 0], [0.5, 96]]
)
def test_headers_that_lie_about_offsets(offsets: Any, copy_of: Callable[[str], Path]) -> None:
    source = copy_of("gpt2")
    header, rest = _header_of(source / "model.safetensors")
    other = header["transformer.h.1.ln_1.bias"]["data_offsets"]
    header["transformer.h.0.ln_1.bias"]["data_offsets"] = other if offsets == "overlap" else offsets
    _write_header(source / "model.safetensors", header, rest)
    _refused(source, "model.safetensors: no whole safetensors file")


@pytest.mark.parametrize(
    "spoil",
    [
        lambda data: data[:-1],
        lambda data: data + b"\x00",
        lambda data: data[:100],
        lambda data: data[:4],
        lambda data: b"",
        lambda data: (2**62).to_bytes(8, "little") + data[8:],
        lambda data: data[:8] + b"\xff" * 20 + data[28:],
    ],
)
def test_files_that_are_cut_or_spoiled(spoil: Callable[[bytes], bytes], copy_of: Callable[[str], Path]) -> None:
    source = copy_of("gpt2")
    file = source / "model.safetensors"
    file.write_bytes(spoil(file.read_bytes()))
    _refused(source, "model.safetensors: no whole safetensors file")


def _spoil_index(folder: Path, file: str) -> Path:
    index = folder / "model.safetensors.index.json"
    values = json.loads(index.read_text())
    values["weight_map"]["model.embed_tokens.weight"] = file
    index.write_text(json.dumps(values))
    return folder


@pytest.mark.parametrize(
    "file", ["../sharded.safetensors", "/etc/passwd", "..", ".", "", "sub/model.safetensors", "x/.."]
)
def test_paths_that_leave_the_folder(file: str, copy_of: Callable[[str], Path]) -> None:
    source = copy_of("sharded")
    if file.startswith("../"):
        shutil.copy(source / "model-00001-of-00003.safetensors", source / file)
    _refused(_spoil_index(source, file), "leaves the folder")


def test_links_that_leave_the_folder(copy_of: Callable[[str], Path], originals: Path) -> None:
    source = copy_of("sharded")
    file = source / "model-00001-of-00003.safetensors"
    file.unlink()
    file.symlink_to(originals / "sharded" / file.name)
    _refused(source, "a link to", "outside the folder")
    file.unlink()
    (source / "config.json").rename(source / "real.json")
    (source / "config.json").symlink_to("real.json")
    shutil.copy(originals / "sharded" / file.name, file)
    HfSource(source)  # links inside are fine


def test_the_librarys_cache_is_made_of_links(originals: Path, tmp_path: Path) -> None:
    blobs, snapshot = tmp_path / "models--x" / "blobs", tmp_path / "models--x" / "snapshots" / "abc"
    blobs.mkdir(parents=True)
    snapshot.mkdir(parents=True)
    for number, file in enumerate(sorted((originals / "gpt2").iterdir())):
        shutil.copy(file, blobs / f"{number:064x}")
        (snapshot / file.name).symlink_to(f"../../blobs/{number:064x}")
    assert HfSource(snapshot).read("embedding.weight").shape == (101, 24)


@pytest.mark.parametrize(
    ("place", "fragment"),
    [
        (None, "weight_map is no mapping"),
        ([], "weight_map is no mapping"),
        ({"model.norm.weight": 7}, "weight_map is no mapping"),
        ({"model.norm.weight": "model-00009-of-00003.safetensors"}, "model-00009-of-00003.safetensors: missing"),
        ({"model.norm.weight": "model-00001-of-00003.safetensors"}, "model.norm.weight: not in model-00001"),
        ({"invented": "model-00001-of-00003.safetensors"}, "invented: not in model-00001"),
    ],
)
def test_indexes_that_do_not_fit_their_files(place: Any, fragment: str, copy_of: Callable[[str], Path]) -> None:
    source = copy_of("sharded")
    index = source / "model.safetensors.index.json"
    values = json.loads(index.read_text())
    values["weight_map"] = {**values["weight_map"], **place} if isinstance(place, dict) else place
    index.write_text(json.dumps(values))
    _refused(source, fragment)


def test_a_tensor_that_the_index_does_not_name(copy_of: Callable[[str], Path]) -> None:
    source = copy_of("sharded")
    index = source / "model.safetensors.index.json"
    values = json.loads(index.read_text())
    del values["weight_map"]["model.layers.0.mlp.up_proj.weight"]
    index.write_text(json.dumps(values))
    _refused(source, "model.layers.0.mlp.up_proj.weight: in model-0", "not in model.safetensors.index.json")


def _respelt(family: str, **tensors: torch.Tensor | None) -> Callable[[Path], Path]:
    def spoil(source: Path) -> Path:
        file = source / "model.safetensors"
        found = load_file(file) | {name.replace("__", "."): value for name, value in tensors.items()}
        save_file({name: value for name, value in found.items() if value is not None}, file)
        return source

    return spoil


@pytest.mark.parametrize(
    ("tensors", "fragment"),
    [
        ({"transformer__ln_f__weight": None}, "transformer.ln_f.weight: missing"),
        ({"transformer__h__7__ln_1__bias": torch.zeros(24)}, "transformer.h.7.ln_1.bias: not a tensor of this model"),
        (
            {"transformer__wpe__weight": torch.zeros(32, 23)},
            "transformer.wpe.weight: shape [32, 23], expected [32, 24]",
        ),
        ({"transformer__h__0__mlp__c_fc__weight": torch.zeros(40, 24)}, "shape [40, 24], expected [24, 40]"),
        ({"transformer__ln_f__weight": torch.ones(24, dtype=torch.int32)}, "dtype I32, not F32, BF16 or F16"),
        ({"transformer__ln_f__weight": torch.ones(24, dtype=torch.int8)}, "dtype I8"),
        ({"transformer__ln_f__weight": torch.ones(24).to(torch.float8_e4m3fn)}, "dtype F8_E4M3"),
        ({"transformer__ln_f__weight": torch.ones(24, dtype=torch.float64)}, "dtype F64"),
        ({"transformer__ln_f__weight": torch.ones(24, dtype=torch.bool)}, "dtype BOOL"),
        ({"transformer__ln_f__weight": torch.ones(24, dtype=torch.bfloat16)}, "dtype BF16 where others are F32"),
        ({"lm_head__weight": torch.zeros(101, 23)}, "lm_head.weight: not a tensor of this model"),
        ({"lm_head__weight": torch.zeros(101, 24)}, "lm_head.weight differs from transformer.wte.weight"),
    ],
)
def test_tensors_that_are_not_the_models(
    tensors: dict[str, torch.Tensor | None], fragment: str, copy_of: Callable[[str], Path]
) -> None:
    _refused(_respelt("gpt2", **tensors)(copy_of("gpt2")), fragment)


def test_two_names_of_one_tensor(copy_of: Callable[[str], Path]) -> None:
    source = copy_of("bert")
    _refused(_respelt("bert", bert__embeddings__LayerNorm__gamma=torch.ones(24))(source), "two names of one tensor")


def test_a_folder_without_weights(copy_of: Callable[[str], Path]) -> None:
    source = copy_of("gpt2")
    (source / "model.safetensors").rename(source / "weights.safetensors")
    _refused(source, "holds neither model.safetensors nor model.safetensors.index.json nor pytorch_model.bin")


def test_what_is_no_folder(tmp_path: Path) -> None:
    _refused(tmp_path / "nothing", "no such folder")
    (tmp_path / "file").touch()
    _refused(tmp_path / "file", "not a folder")
    (tmp_path / "empty").mkdir()
    _refused(tmp_path / "empty", "holds no config.json")
    (tmp_path / "odd" / "config.json").mkdir(parents=True)
    _refused(tmp_path / "odd", "config.json: not a file")


def test_a_target_that_holds_something_is_left_alone(copy_of: Callable[[str], Path], tmp_path: Path) -> None:
    source = copy_of("gpt2")
    (tmp_path / "target").mkdir()
    convert_quietly("hf", "megalm", source, tmp_path / "target")  # an empty folder is as good as none
    _refused(source, "target: exists and is not empty", kind=ConfigError)
    (tmp_path / "file").write_text("precious")
    with pytest.raises(ConfigError, match="exists and is no folder"):
        convert_quietly("hf", "megalm", source, tmp_path / "file")
    assert (tmp_path / "file").read_text() == "precious"


TITLES = ["GPT-2", "GPT-NeoX", "Llama", "Mistral", "Qwen2", "Qwen3", "Phi-3", "StarCoder2"]
TITLES += ["BERT", "RoBERTa", "XLM-R", "DistilBERT"]


def test_models_that_no_family_can_be_are_refused_with_each_familys_reasons(tmp_path: Path) -> None:
    from dataclasses import replace

    cases = {
        "model.qk_norm=true": replace(LLAMA, qk_norm=True, norm="layernorm"),
        "model.attention_windows=[0, 4]": replace(GPT2, attention_windows=(0, 4)),
        "model.attention_windows=[3, 4], not one width": replace(QWEN3, attention_windows=(3, 4)),
        "model.attention_windows=[0, 4], not one window": replace(STARCODER2, attention_windows=(0, 4)),
        "model.qkv_bias=true, not false": replace(LLAMA, qkv_bias=True, bias=True, projection_bias=False),
        "model.projection_bias=false, not true": replace(QWEN3, qkv_bias=True),
        "model.norm_bias=false, not true": replace(STARCODER2, norm_bias=False),
        "model.head_dim=5, not 6": replace(GPT2, head_dim=5),
        "model.rotary_fraction=0.5": replace(LLAMA, rotary_fraction=0.5, bias=True),
        "model.position=rotary": replace(BERT, position="rotary"),
        "model.token_types=0": replace(ROBERTA, token_types=0),
        "model.position_offset=0, not 1 or more": replace(DISTILBERT, norm_epsilon=1e-5),
        "model.position_offset=2, not 0": replace(GPT2, position_offset=2),
    }
    for number, (reason, model) in enumerate(cases.items()):
        write_random_run(tmp_path / str(number), model)
        with pytest.raises(CheckpointError) as refusal:
            convert_quietly("megalm", "hf", tmp_path / str(number), tmp_path / "out")
        lines = str(refusal.value).splitlines()
        assert [line.split(":")[0].strip() for line in lines[1:]] == TITLES
        assert reason in str(refusal.value)
        assert not (tmp_path / "out").exists()
