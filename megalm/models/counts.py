"""Parameters and floating-point operations of a model, in closed form. No torch.

Shape legend: H hidden, F inner width of the MLP, N heads, K key/value heads, D = H / N head dim, S sequence, V vocab,
L layers.
"""

from __future__ import annotations

from dataclasses import dataclass

from megalm.config.schema import Model


@dataclass(frozen=True)
class ParameterCount:
    """Parameters of a whole model by part, padding excluded; a tied output projection counts once, as embedding."""

    word_embedding: int
    position_embedding: int
    attention: int
    mlp: int
    norm: int
    output: int

    @property
    def total(self) -> int:
        """All parameters."""
        return self.embedding + self.attention + self.mlp + self.norm + self.output

    @property
    def embedding(self) -> int:
        """Parameters that the first stage looks up."""
        return self.word_embedding + self.position_embedding


def parameter_count(model: Model, vocab_size: int | None = None) -> ParameterCount:
    """Parameters of the full model.

    Args:
        model: architecture.
        vocab_size: words of the data; wanted only where ``model.vocab_size`` is None.

    Raises:
        ValueError: neither ``model`` nor the caller says how large the vocabulary is.
    """
    vocab = resolve_vocab_size(model, vocab_size)
    return ParameterCount(
        word_embedding=vocab * model.hidden_size,
        position_embedding=model.sequence_length * model.hidden_size if model.position == "learned" else 0,
        attention=model.num_layers * attention_parameter_count(model),
        mlp=model.num_layers * mlp_parameter_count(model),
        norm=(2 * model.num_layers + 1) * norm_parameter_count(model),
        output=0 if model.tie_embeddings else vocab * model.hidden_size,
    )


def attention_parameter_count(model: Model) -> int:
    """Parameters of one attention: H·(N + 2K)·D for query, key and value, H·H for the projection, and biases."""
    qkv = (model.num_heads + 2 * model.kv_heads) * (model.hidden_size // model.num_heads)
    biases = qkv + model.hidden_size if model.bias else 0
    return model.hidden_size * (qkv + model.hidden_size) + biases


def mlp_parameter_count(model: Model) -> int:
    """Parameters of one MLP: 2·H·F for GELU, 3·H·F for SwiGLU (gate, up, down), and biases."""
    ffn = model.ffn_size
    inner = 2 * ffn if model.activation == "swiglu" else ffn
    biases = inner + model.hidden_size if model.bias else 0
    return model.hidden_size * (inner + ffn) + biases


def norm_parameter_count(model: Model) -> int:
    """Parameters of one normalisation: a gain, and a bias for a LayerNorm with biases."""
    return model.hidden_size * (2 if model.norm == "layernorm" and model.bias else 1)


def layer_parameter_count(model: Model) -> int:
    """Parameters of one Transformer layer: attention, MLP and two norms."""
    return attention_parameter_count(model) + mlp_parameter_count(model) + 2 * norm_parameter_count(model)


def embedding_parameter_count(model: Model, vocab_size: int | None = None) -> int:
    """Parameters that the first pipeline stage holds besides its layers."""
    return parameter_count(model, vocab_size).embedding


def head_parameter_count(model: Model, vocab_size: int | None = None, *, shares_stage_with_embedding: bool) -> int:
    """Parameters that the last pipeline stage holds besides its layers: final norm and output projection.

    A tied projection costs the last stage a copy of the word embedding, unless it is the first stage too.
    """
    is_free = model.tie_embeddings and shares_stage_with_embedding
    projection = 0 if is_free else resolve_vocab_size(model, vocab_size) * model.hidden_size
    return norm_parameter_count(model) + projection


def layer_flops_per_token(model: Model) -> int:
    """Model FLOPs of one layer, forward and backward, per token: 6 per matrix weight, and 12·H·S of attention.

    A multiply-add is 2 FLOPs and the backward pass costs twice the forward pass, hence 6 per weight. Scores and their
    product with the values cost 2·(2·H·S) forward. Causal attention is counted in full, not halved, as in Chowdhery
    et al. 2022 and Narayanan et al. 2021, so that utilisations compare with theirs.
    """
    ffn = model.ffn_size
    qkv = (model.num_heads + 2 * model.kv_heads) * (model.hidden_size // model.num_heads)
    mlp_matrices = 3 if model.activation == "swiglu" else 2
    weights = model.hidden_size * (qkv + model.hidden_size + mlp_matrices * ffn)
    return 6 * weights + 12 * model.hidden_size * model.sequence_length


def head_flops_per_token(model: Model, vocab_size: int | None = None) -> int:
    """Model FLOPs of the logits, forward and backward, per token: 6·H·V, whether or not the weight is tied."""
    return 6 * model.hidden_size * resolve_vocab_size(model, vocab_size)


def flops_per_token(model: Model, vocab_size: int | None = None) -> int:
    """Model FLOPs of one token's forward and backward pass: what MFU counts (Chowdhery et al. 2022, appendix B).

    For multi-head attention and GELU this is 72·L·H²·(1 + S/(6H) + V/(12·L·H)), which is Narayanan et al. 2021,
    equation 3, without their recomputation of the forward pass (they count 96·L·H²·(1 + S/(6H) + V/(16·L·H))).
    Embedding look-ups, norms, biases and activations are not counted; nor is recomputation, which is no progress.
    """
    return model.num_layers * layer_flops_per_token(model) + head_flops_per_token(model, vocab_size)


def resolve_vocab_size(model: Model, vocab_size: int | None = None) -> int:
    """The vocabulary that the model is built with: ``model.vocab_size``, or else that of the data."""
    if model.vocab_size is not None:
        return model.vocab_size
    if vocab_size is None:
        raise ValueError("model.vocab_size is null and no vocabulary of the data is given")
    return vocab_size
