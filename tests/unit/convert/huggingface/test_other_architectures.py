"""Architectures that megalm does not convert, by the library's own configs: each refused with what megalm lacks."""

from __future__ import annotations

import json
import random
import time
from pathlib import Path
from typing import Any

import pytest

from megalm.convert.huggingface.families import FAMILIES
from megalm.convert.huggingface.names import read_architecture
from megalm.errors import CheckpointError

transformers = pytest.importorskip("transformers")

LACKS: dict[str, tuple[str, ...]] = {
    "Gemma": ("1 + weight", "GELU-gated", "scaled embeddings"),
    "Gemma2": ("1 + weight", "norms on what sublayers give", "soft-capped logits (attn_logit_softcapping=50.0)"),
    "Gemma3Text": ("1 + weight", "rotary positions of two bases"),
    "Gemma3": ("several modalities (vision_config)",),
    "GptOss": ("mixture of experts (num_local_experts=128)", "attention sinks"),
    "Mixtral": ("mixture of experts (num_local_experts=8)",),
    "Qwen2Moe": ("mixture of experts (num_experts=60)",),
    "Qwen3Moe": ("mixture of experts",),
    "Qwen3Next": ("linear attention (linear_num_key_heads=16)", "layer_types has linear_attention"),
    "Qwen2VL": ("several modalities (vision_config)",),
    "Falcon": ("one norm for attention and MLP together",),
    "OPT": ("activation_function=relu",),
    "Bloom": ("ALiBi",),
    "Mpt": ("ALiBi",),
    "DeepseekV2": ("mixture of experts (n_routed_experts=64)", "latent attention (MLA) (kv_lora_rank=512)"),
    "DeepseekV3": ("mixture of experts (n_routed_experts=256)", "latent attention (MLA) (kv_lora_rank=512)"),
    "Phi": ("one norm for attention and MLP together", "a bias on the logits"),
    "GPTJ": ("neighbouring elements", "one norm"),
    "CodeGen": ("neighbouring elements", "one norm"),
    "GPTNeo": ("not divided by the root of the head's width",),
    "Albert": ("share their weights", "embedding_size=128"),
    "Deberta": ("content and position apart",),
    "DebertaV2": ("content and position apart",),
    "Electra": ("narrower than the residual stream (embedding_size=128)",),
    "T5": ("an encoder and a decoder", "relative position biases"),
    "Bart": ("an encoder and a decoder",),
    "Whisper": ("an encoder and a decoder",),
    "ViT": ("patch_size=16",),
    "Mamba": ("state-space layers (state_size=16)",),
    "Jamba": ("mixture of experts", "state-space layers"),
    "RecurrentGemma": ("recurrent layers",),
    "XLNet": ("permuted words",),
    "Longformer": ("attention in blocks",),
    "BigBird": ("attention in blocks",),
    "ModernBert": ("GELU-gated", "two bases"),
    "MPNet": ("relative position biases",),
    "Cohere": ("neighbouring elements", "scaled logits"),
    "Olmo": ("norms without weights",),
    "Olmo2": ("norms on what sublayers give",),
    "Granite": ("scaled embeddings",),
    "SmolLM3": ("layers without positions",),
    "Nemotron": ("hidden_act=relu2",),
    "Glm": ("neighbouring elements",),
    "XGLM": ("fixed sines",),
    "StableLm": ("does not know the names of its tensors",),
    "GPTBigCode": ("does not know the names of its tensors",),
    "Ministral": ("does not know the names of its tensors",),
}
"""The library's config ▶ what its refusal says."""


def _refusal(folder: Path) -> str:
    with pytest.raises(CheckpointError) as refusal:
        read_architecture(folder / "config.json")
    return str(refusal.value)


@pytest.mark.parametrize("name", LACKS)
def test_what_megalm_lacks_is_said_in_one_sentence(name: str, tmp_path: Path) -> None:
    config = getattr(transformers, f"{name}Config")()
    config.save_pretrained(tmp_path)
    text = _refusal(tmp_path)
    assert len(text.splitlines()) == 1
    assert f"model_type={config.model_type}: " in text
    for fragment in LACKS[name]:
        assert fragment in text, text
    assert "megalm converts GPT-2, GPT-NeoX, Llama, Mistral, Qwen2, Qwen3" in text
    assert "sliding" not in text.split("; megalm converts")[0]


def _config_of(family: str) -> dict[str, Any]:
    """What the library takes where nothing is said."""
    names = {"gpt_neox": "GPTNeoX", "gpt2": "GPT2", "xlm-roberta": "XLMRoberta", "distilbert": "DistilBert"}
    config = getattr(transformers, f"{names.get(family, family.capitalize())}Config")()
    return dict(json.loads(config.to_json_string(use_diff=False)))


@pytest.mark.parametrize("family", FAMILIES)
def test_what_megalm_has_is_not_said_to_be_lacking(family: str) -> None:
    from megalm.convert.huggingface.lacking import what_megalm_lacks

    values = _config_of(family)
    assert what_megalm_lacks(values) == []
    window = {
        "sliding_window": 4096,
        "layer_types": ["full_attention", "sliding_attention"],
        "use_sliding_window": True,
    }
    assert what_megalm_lacks(values | window) == []


@pytest.mark.parametrize(
    ("values", "fragment"),
    [
        ({"model_type": "unheard-of"}, "does not know the names of its tensors"),
        ({"model_type": "unheard-of", "num_experts": 1}, "does not know the names of its tensors"),
        ({"model_type": "unheard-of", "num_experts": 4}, "a mixture of experts (num_experts=4)"),
        ({"model_type": "falcon", "new_decoder_architecture": True}, "does not know the names of its tensors"),
        ({"model_type": "falcon", "new_decoder_architecture": True, "alibi": True}, "ALiBi"),
        ({"model_type": "opt", "activation_function": "gelu"}, "does not know the names of its tensors"),
        ({"model_type": "mpt", "attn_config": {"alibi": False}}, "does not know the names of its tensors"),
        ({"model_type": ["llama"]}, "megalm converts"),
        ({}, "model_type=(missing): megalm converts"),
        ({"model_type": "x", "layer_types": 7, "hidden_act": 3, "attn_config": 1, "embedding_size": "wide"}, "names"),
    ],
)
def test_fields_tell_of_architectures_that_nobody_knows(values: dict[str, Any], fragment: str, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(values))
    assert fragment in _refusal(tmp_path)


JUNK = (None, True, -1, 0, 1, 2.5, 10**30, float("nan"), "", "x", [], [1], ["a", {}], [[]], {}, {"a": 1}, {"type": []})


@pytest.mark.parametrize("family", FAMILIES)
def test_no_config_ends_in_a_traceback(family: str, tmp_path: Path) -> None:
    """Fields replaced by what they never are, one and several at a time: read, or refused line by line."""
    rng = random.Random(family)
    sound = _config_of(family)
    names = [*sound, "head_dim", "sliding_window", "layer_types", "rope_scaling", "rope_parameters", "pad_token_id"]
    for _ in range(300):
        values = sound | {name: rng.choice(JUNK) for name in rng.sample(names, rng.randint(1, 3))}
        (tmp_path / "config.json").write_text(json.dumps(values | {"model_type": family}))
        try:
            read_architecture(tmp_path / "config.json")
        except CheckpointError as error:
            assert all(line.startswith(str(tmp_path)) for line in str(error).splitlines())


def test_a_pattern_of_a_million_layers_takes_no_time() -> None:
    from megalm.convert.huggingface.decoder import rotation

    started = time.perf_counter()
    assert rotation([0, 5] * 500_000) == (0, 5)
    assert len(rotation([0] * 999_999 + [5])) == 1_000_000
    assert time.perf_counter() - started < 5.0
    assert [rotation(windows) for windows in ([], [7], [0, 0], [0, 5, 0], [0, 5, 5], [0, 0, 5, 0, 0])] == [
        (0,),
        (7,),
        (0,),
        (0, 5),
        (0, 5, 5),
        (0, 0, 5),
    ]
