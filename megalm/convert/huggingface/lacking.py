"""What architectures of the library have that megalm's models do not, so that a refusal can say why.

An architecture that is known is in a table by its name; of any other the fields of its ``config.json`` tell. From the
modeling files of the library.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from megalm.config.violation import format_value
from megalm.convert.huggingface.decoder import FULL, SLIDING

_EXPERTS = "a mixture of experts"
_GEGLU = "a GELU-gated MLP"
_LARGE_NORMS = "norms that scale by 1 + weight"
_LATER_NORMS = "norms on what sublayers give"
_ONE_NORM = "one norm for attention and MLP together"
_NEIGHBOURS = "rotation of neighbouring elements of a head"
_BLOCKED = "attention in blocks of a long text"
_ALIBI = "biases by distance (ALiBi)"
_DISENTANGLED = "attention to content and position apart"
_SCALED = "scaled embeddings, residuals, attention and logits"
_SINUSOIDS = "positions of fixed sines"
_NARROW = "an embedding narrower than the residual stream"

_ARCHITECTURES: dict[str, tuple[str, ...]] = {
    "albert": ("layers that share their weights",),
    "bamba": ("state-space layers",),
    "big_bird": (_BLOCKED,),
    "bloom": (_ALIBI,),
    "codegen": (_NEIGHBOURS, _ONE_NORM),
    "cohere": (_NEIGHBOURS, _ONE_NORM, "scaled logits"),
    "cohere2": (_NEIGHBOURS, _ONE_NORM, "scaled logits"),
    "convbert": ("convolutions",),
    "ctrl": (_SINUSOIDS, "scaled embeddings"),
    "dbrx": (_EXPERTS, "clipped queries, keys and values"),
    "deberta": (_DISENTANGLED,),
    "deberta-v2": (_DISENTANGLED,),
    "ernie": ("an embedding of the task",),
    "ernie4_5": (_NEIGHBOURS,),
    "exaone4": (_LATER_NORMS, "layers without positions"),
    "funnel": ("layers that shorten the text",),
    "gemma": (_LARGE_NORMS, _GEGLU, "scaled embeddings"),
    "gemma2": (_LARGE_NORMS, _LATER_NORMS, _GEGLU),
    "gemma3": (_LARGE_NORMS, _LATER_NORMS, _GEGLU, "rotary positions of two bases"),
    "gemma3_text": (_LARGE_NORMS, _LATER_NORMS, _GEGLU, "rotary positions of two bases"),
    "glm": (_NEIGHBOURS,),
    "glm4": (_NEIGHBOURS, _LATER_NORMS),
    "gpt_neo": ("attention that is not divided by the root of the head's width",),
    "gpt_oss": (_EXPERTS, "attention sinks"),
    "gptj": (_NEIGHBOURS, _ONE_NORM),
    "granite": (_SCALED,),
    "helium": (_NEIGHBOURS,),
    "hunyuan_v1_dense": ("norms of queries and keys after their rotation",),
    "lfm2": ("convolutions",),
    "longformer": (_BLOCKED,),
    "modernbert": (_GEGLU, "rotary positions of two bases"),
    "nystromformer": ("attention to landmarks",),
    "olmo": ("norms without weights",),
    "olmo2": (_LATER_NORMS, "norms of all query heads together"),
    "olmo3": (_LATER_NORMS, "norms of all query heads together"),
    "phi": (_ONE_NORM, "a bias on the logits"),
    "recurrent_gemma": ("recurrent layers", _GEGLU),
    "roformer": (_NEIGHBOURS,),
    "rwkv": ("recurrent layers",),
    "xglm": (_SINUSOIDS, "scaled embeddings"),
    "xlnet": ("attention to permuted words", "relative positions"),
}
"""By ``model_type``: what every model of the architecture has; what only some have is told by its fields."""

_FIELDS: dict[str, tuple[str, ...]] = {
    _EXPERTS: ("num_experts", "num_local_experts", "n_routed_experts", "moe_intermediate_size"),
    "an encoder and a decoder": ("is_encoder_decoder", "num_decoder_layers"),
    "state-space layers": ("state_size", "ssm_cfg", "mamba_d_state", "d_state", "mamba_num_heads", "ssm_state_size"),
    "latent attention (MLA)": ("kv_lora_rank", "q_lora_rank"),
    _BLOCKED: ("attention_window", "block_size"),
    "layers of different kinds": ("layers_block_type", "attn_layer_period", "hybrid_override_pattern", "block_types"),
    "linear attention": ("linear_num_key_heads", "attention_hidden_size", "lin_attn_config"),
    "layers without positions": ("no_rope_layers",),
    "soft-capped logits": ("attn_logit_softcapping", "final_logit_softcapping", "logits_soft_cap"),
    "relative position biases": ("relative_attention_num_buckets", "relative_attention"),
    _ALIBI: ("alibi",),
    "images, audio or several modalities": (
        "vision_config",
        "audio_config",
        "text_config",
        "image_token_id",
        "patch_size",
        "num_mel_bins",
    ),
}
"""What megalm's models do not have ▶ the fields of a ``config.json`` that tell of it."""

_ACTIVATION_FIELDS = ("hidden_act", "hidden_activation", "activation_function", "activation", "afn", "dense_act_fn")
_KNOWN_ACTIVATIONS = ("gelu", "gelu_new", "gelu_fast", "gelu_pytorch_tanh", "silu", "swish")


def what_megalm_lacks(values: Mapping[str, Any]) -> list[str]:
    """What the architecture of a ``config.json`` has and megalm has not: each with the field that tells, if one does.

    Empty where neither the name nor a field tells of anything.
    """
    found = dict.fromkeys(_ARCHITECTURES.get(str(values.get("model_type")), ()), "")
    for what, names in _FIELDS.items():
        name = next((name for name in names if _is_there(values.get(name))), None)
        if name is not None:
            found[what] = f" ({name})" if isinstance(values[name], dict) else f" ({name}={format_value(values[name])})"
    for name in _ACTIVATION_FIELDS:
        if isinstance(values.get(name), str) and values[name] not in _KNOWN_ACTIVATIONS:
            found[f"another activation than GELU and SwiGLU ({name}={values[name]})"] = ""
    found |= dict.fromkeys(_compared(values), "")
    return [what + where for what, where in found.items()]


def _compared(values: Mapping[str, Any]) -> list[str]:
    """What fields tell that mean something by their values alone, or beside each other."""
    found = []
    kinds = values.get("layer_types")
    others = sorted({str(kind) for kind in kinds} - {FULL, SLIDING}) if isinstance(kinds, list) else []
    if others:
        found.append(f"layers of different kinds (layer_types has {', '.join(others[:3])})")
    if values.get("model_type") == "falcon" and not values.get("new_decoder_architecture"):
        found.append(_ONE_NORM)
    attention = values.get("attn_config")
    if values.get("model_type") == "mpt" and (not isinstance(attention, dict) or attention.get("alibi", True)):
        found.append(_ALIBI)
    width, embedding = values.get("hidden_size"), values.get("embedding_size")
    if isinstance(width, int) and isinstance(embedding, int) and width != embedding:
        found.append(f"{_NARROW} (embedding_size={embedding})")
    return found


def _is_there(value: Any) -> bool:
    """Whether a field asks for a feature; null, false, 0, or 1 expert mean that the model does not have it."""
    if isinstance(value, list) and value and all(isinstance(item, str) for item in value):
        return len(set(value)) > 1
    if isinstance(value, list) and value and all(type(item) is int for item in value):
        return not all(value)  # of layers, 1 is one with positions
    return value is True or (bool(value) and value not in (1, "none"))
