"""Values of a model that follow from others, each computed in this one place. No torch."""

from __future__ import annotations

from megalm.config.schema import Model


def kv_heads(model: Model) -> int:
    """Key/value heads: ``num_kv_heads``, or one per query head."""
    return model.num_heads if model.num_kv_heads is None else model.num_kv_heads


def head_dim(model: Model) -> int:
    """Width of one attention head."""
    return model.hidden_size // model.num_heads


def ffn_size(model: Model) -> int:
    """Inner width of the MLP: ``ffn_hidden_size``, or 4H (GELU), or 8H/3 rounded up to a multiple of 64 (SwiGLU).

    SwiGLU has three matrices for GELU's two; 8H/3 keeps the parameter count of 4H (Shazeer 2020).
    """
    if model.ffn_hidden_size is not None:
        return model.ffn_hidden_size
    if model.activation == "swiglu":
        return -(-8 * model.hidden_size // (3 * 64)) * 64
    return 4 * model.hidden_size
