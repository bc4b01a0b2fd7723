"""Parameters and floating-point operations of a model, in closed form. No torch.

Shape legend: H hidden, F inner width of the MLP, N heads, K key/value heads, D head dim, S sequence, V vocab,
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
    token_types: int
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
        return self.word_embedding + self.position_embedding + self.token_types


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
        position_embedding=position_row_count(model) * model.hidden_size,
        token_types=model.token_types * model.hidden_size,
        attention=model.num_layers * attention_parameter_count(model),
        mlp=model.num_layers * mlp_parameter_count(model),
        norm=norm_count(model) * norm_parameter_count(model),
        output=(0 if model.tie_embeddings else vocab * model.hidden_size) + head_parameter_count(model, vocab),
    )


def position_row_count(model: Model) -> int:
    """Rows of the position embedding: one per position, and those before the first."""
    return model.position_offset + model.sequence_length if model.position == "learned" else 0


def head_parameter_count(model: Model, vocab_size: int) -> int:
    """Parameters between the last block and the output embedding: none, or those of BERT's head."""
    if model.head == "linear":
        return 0
    return model.hidden_size * (model.hidden_size + 1) + norm_parameter_count(model) + vocab_size


def attention_parameter_count(model: Model) -> int:
    """Parameters of one attention: H·(N + 2K)·D for query, key and value, N·D·H for the projection, biases, QK-norm."""
    qkv = (model.num_heads + 2 * model.kv_heads) * model.head_size
    biases = qkv * model.has_qkv_bias + model.hidden_size * model.has_projection_bias
    norms = 2 * model.head_size if model.qk_norm else 0
    return model.hidden_size * (qkv + model.attention_size) + biases + norms


def mlp_parameter_count(model: Model) -> int:
    """Parameters of one MLP: 2·H·F for GELU, 3·H·F for SwiGLU (gate, up, down), and biases."""
    ffn = model.ffn_size
    inner = 2 * ffn if model.activation == "swiglu" else ffn
    biases = inner + model.hidden_size if model.bias else 0
    return model.hidden_size * (inner + ffn) + biases


def norm_parameter_count(model: Model) -> int:
    """Parameters of one normalisation: a gain, and the bias of a LayerNorm that has one."""
    return model.hidden_size * (2 if model.has_norm_bias else 1)


def norm_count(model: Model) -> int:
    """Norms of a whole model: two per layer, one after the last unless layers end with one, one after the embedding."""
    return 2 * model.num_layers + (model.residual != "post_norm") + model.embedding_norm


def layer_flops_per_token(model: Model, layer: int = 0) -> int:
    """Model FLOPs of one layer, forward and backward, per token: 6 per matrix weight, and 12·N·D·S of attention.

    A multiply-add is 2 FLOPs and the backward pass costs twice the forward pass, hence 6 per weight. Scores and their
    product with the values cost 2·(2·N·D·S) forward. Causal attention is counted in full, not halved, as in Chowdhery
    et al. 2022 and Narayanan et al. 2021, so that utilisations compare with theirs. A banded layer counts the keys of
    its window.
    """
    ffn = model.ffn_size
    qkv = (model.num_heads + 2 * model.kv_heads) * model.head_size
    mlp_matrices = 3 if model.activation == "swiglu" else 2
    weights = model.hidden_size * (qkv + model.attention_size + mlp_matrices * ffn)
    keys = min(model.attention_window(layer) or model.sequence_length, model.sequence_length)
    return 6 * weights + 12 * model.attention_size * keys


def head_flops_per_token(model: Model, vocab_size: int | None = None) -> int:
    """Model FLOPs of the logits, forward and backward, per token: 6·H·V, tied or not; 6·H² more for BERT's head."""
    dense = model.hidden_size if model.head == "masked_lm" else 0
    return 6 * model.hidden_size * (resolve_vocab_size(model, vocab_size) + dense)


def flops_per_token(model: Model, vocab_size: int | None = None) -> int:
    """Model FLOPs of one token's forward and backward pass: what MFU counts (Chowdhery et al. 2022, appendix B).

    For multi-head attention and GELU this is 72·L·H²·(1 + S/(6H) + V/(12·L·H)), which is Narayanan et al. 2021,
    equation 3, without their recomputation of the forward pass (they count 96·L·H²·(1 + S/(6H) + V/(16·L·H))).
    Embedding look-ups, norms, biases and activations are not counted; nor is recomputation, which is no progress.
    """
    layers = sum(layer_flops_per_token(model, layer) for layer in range(model.num_layers))
    return layers + head_flops_per_token(model, vocab_size)


def resolve_vocab_size(model: Model, vocab_size: int | None = None) -> int:
    """The vocabulary that the model is built with: ``model.vocab_size``, or else that of the data."""
    if model.vocab_size is not None:
        return model.vocab_size
    if vocab_size is None:
        raise ValueError("model.vocab_size is null and no vocabulary of the data is given")
    return vocab_size
